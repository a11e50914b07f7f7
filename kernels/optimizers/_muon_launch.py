"""Tables and launches of Muon's kernels: which matrices there are, and in which order they run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritium.kernels.optimizers import _pointer_table, _step_kernels
from tritium.kernels.optimizers._exchange import ALIGNMENT, Exchange
from tritium.kernels.optimizers._matrices import Recipe
from tritium.kernels.optimizers._muon_kernels import (
    EVEN,
    WIDTH,
    _muon_gram_kernel,
    _muon_momentum_kernel,
    _muon_product_kernel,
    _muon_row_moments_kernel,
    _muon_row_scale_kernel,
    _muon_square_kernel,
)
from tritium.kernels.optimizers._orthogonalize import SMALLEST_SQUARE
from tritium.kernels.optimizers._pointer_table import THREADS, Tables, upload
from tritium.kernels.optimizers._rounding import ABSENT
from tritium.kernels.optimizers._step_kernels import BASE
from tritium.kernels.optimizers._storage import Format

TILE = 128  # rows and columns of a tile
DEPTH = 32  # elements of the summed axis that are multiplied at a time
ROWS = 4  # rows that a program normalizes
ROW_BLOCK = 256  # elements of a row that it takes at a time


class Batch(NamedTuple):
    """Matrices of all shapes, in tables on the device."""

    matrices: Tensor
    gram_tiles: Tensor
    """Tiles of A and B on and above the diagonal."""
    tiles: Tensor
    """Tiles of X, by tile of R and of C."""
    row_tiles: Tensor
    """Matrix and tile of `ROWS` rows `[K, 3]`, and the first such tile of the matrix: NorMuon."""
    numbers: Tensor
    """`[M, 3 + 3 · steps]` float32: eps, 1 - beta2, scale, and coefficients of each step."""
    steps: int
    n_partials: int
    n_gram: int
    even: bool
    """Whether offsets and strides are multiples of `EVEN`."""


class Plan(NamedTuple):
    """Places of a model's matrices in the buffers, and how they are orthogonalized."""

    offsets: Tensor
    """`[N]` int64 on the device: where each parameter begins, -1 for those of AdamW."""
    starts: dict[int, int]
    """The same of matrices alone, on the host."""
    momentum: Tensor
    """The buffer, bfloat16, in which they begin there."""
    results: Tensor
    """The one in which they are orthogonalized then; it keeps its address."""
    batch: Batch | None
    """None: other ranks have the matrices."""
    x: Tensor
    """The buffer, bfloat16, in which the last X is."""
    y: Tensor
    """Another one, for every second step."""
    exchange: Exchange | None
    """The way from `momentum` to the matrices, and to `results`, where some are sharded."""
    matrices: Tensor
    """`[M]` int64 on the device: the indices of the parameters."""

    def result(self, i: int) -> int:
        """Return the address of the orthogonalized parameter `i`, or of this rank's shard of it."""
        return self.results.data_ptr() + self.starts[i] * self.results.element_size()


def make_plan(
    ps: Sequence[Tensor], recipes: dict[int, Recipe], moments: dict[int, Tensor],
    exchange: Exchange | None,
) -> Plan:  # fmt: skip
    """Choose where the matrices among parameters `ps` are, and upload their tables.

    Of sharded ones `ps` and `moments` are this rank's shards.
    """
    device, starts, size = ps[0].device, {}, 0
    shapes = {i: ps[i].shape for i in recipes} if exchange is None else exchange.owned
    moments = moments if exchange is None else exchange.moments
    for i, shape in shapes.items():
        starts[i] = size
        size += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
    x = torch.empty(size, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    found = [
        (i if exchange is None else -1, shape, starts[i], recipes[i], moments.get(i))
        for i, shape in shapes.items()
    ]
    batch = _make_batch(found, device) if found else None
    momentum, results = (x, y)[batch.steps % 2] if batch else x, x
    if exchange is not None:
        both = [
            {i: buffer[starts[i] :][: shape.numel()].view(shape) for i, shape in shapes.items()}
            for buffer in (momentum, results)
        ]
        exchange.connect(*both)
        momentum, results, starts = exchange.sent, exchange.sent, exchange.starts
    offsets = torch.tensor([starts.get(i, -1) for i in range(len(ps))])
    return Plan(
        upload(offsets, device), starts, momentum, results, batch, x, y, exchange,
        upload(torch.tensor([*recipes]), device),
    )  # fmt: skip


def _make_batch(
    found: list[tuple[int, torch.Size, int, Recipe, Tensor | None]], device: torch.device
) -> Batch:
    steps = len(found[0][3].coefficients)
    matrices, grams, tiles, rows, numbers = [], [], [], [], []
    n_gram = n_partials = 0
    for tensor, (rows_of_all, n_columns), start, recipe, moment in found:
        offset, address = start, 0 if moment is None else moment.data_ptr()
        for k, n_rows in enumerate(recipe.splits or (rows_of_all,)):
            small, large = sorted((n_rows, n_columns))
            lead, m = -(-small // EVEN.value) * EVEN.value, len(matrices)
            matrices.append(
                (offset, small, large, n_rows > n_columns, n_gram, lead, n_partials,
                 -1 if k else tensor, address)
            )  # fmt: skip
            across, along = -(-small // TILE), -(-large // TILE)
            grams += [(m, i, j) for i in range(across) for j in range(i, across)]
            tiles += [(m, i, j) for i in range(across) for j in range(along)]
            numbers.append(_numbers(recipe, n_rows, n_columns))
            if moment is not None:
                first = len(rows)
                rows += [(m, i, first) for i in range(-(-n_rows // ROWS))]
                address += n_rows * moment.element_size()
            offset, n_gram = offset + n_rows * n_columns, n_gram + lead * lead
            n_partials += across
    even = all(x % EVEN.value == 0 for row in matrices for x in row[:3])
    tables = [
        upload(torch.tensor(x, dtype=dtype).view(-1, width), device)
        for x, dtype, width in (
            (matrices, torch.int64, WIDTH.value), (grams, torch.int32, 3), (tiles, torch.int32, 3),
            (rows, torch.int32, 3), (numbers, torch.float32, 3 + 3 * steps),
        )
    ]  # fmt: skip
    return Batch(*tables, steps, n_partials, n_gram, even)


def _numbers(recipe: Recipe, n_rows: int, n_columns: int) -> list[float]:
    """Return a row of `Batch.numbers`; without NorMuon the last step scales the result."""
    scale = recipe.scale(n_rows, n_columns)
    triples = [[*triple] for triple in recipe.coefficients]
    if recipe.beta2 is None:
        triples[-1] = [scale * x for x in triples[-1]]
    weight = 0.0 if recipe.beta2 is None else 1 - recipe.beta2
    return [recipe.eps, weight, scale, *(x for triple in triples for x in triple)]


def launch_momentum(
    plan: Plan, tables: Tables, formats: Sequence[Format], coefs: Tensor, norm: Tensor | None,
    n_states: int, zero: bool,
) -> None:  # fmt: skip
    """Launch the momentum of all matrices, of tensors `tables` in `formats`."""
    matrices = tuple(int(x) for x in formats if x.states[0] != ABSENT.value)
    _muon_momentum_kernel[(len(tables.chunks),)](
        *tables, coefs, norm, plan.offsets, plan.momentum,
        COEFS=coefs.shape[1] - BASE.value, STATES=n_states, FORMATS=matrices, ZERO=zero,
        COLUMNS=tables.tensors.shape[1], CHUNK=_pointer_table.CHUNK, BLOCK=2 * _step_kernels.BLOCK,
        num_warps=THREADS.value // 32, enable_fp_fusion=False,
    )  # fmt: skip


def launch_orthogonalization(plan: Plan, coefs: Tensor, norm: Tensor | None) -> None:
    """Launch all between `plan.momentum`, which `launch_momentum` has filled, and the results."""
    if plan.exchange is None:
        assert plan.batch is not None  # there are matrices
        _launch_steps(plan, plan.batch, coefs, norm)
        return
    plan.exchange.gather()
    if plan.batch is not None:
        _launch_steps(plan, plan.batch, coefs, norm)
    plan.exchange.scatter()
    # Of all matrices: the gradients are the results from here on, which have been clipped.
    coefs.select(1, 0).index_fill_(0, plan.matrices, 1.0)


def _launch_steps(plan: Plan, batch: Batch, coefs: Tensor, norm: Tensor | None) -> None:
    new, xs = plan.x.new_empty, (plan.x, plan.y)
    a, b = new(batch.n_gram), new(batch.n_gram)
    partials = new(batch.n_partials, dtype=torch.float32)
    n_numbers, options = batch.numbers.shape[1], {"num_warps": 8, "num_stages": 3}
    for step in range(batch.steps):
        first, left = step == 0, batch.steps - step
        x, y = xs[left % 2], xs[(left - 1) % 2]
        _muon_gram_kernel[(len(batch.gram_tiles),)](
            x, a, batch.matrices, batch.gram_tiles, partials, coefs,
            COEFS=coefs.shape[1] - BASE.value, FIRST=first, EVEN_=batch.even, TILE=TILE,
            DEPTH=DEPTH, enable_fp_fusion=True, **options,
        )  # fmt: skip
        _muon_square_kernel[(len(batch.gram_tiles),)](
            a, b, batch.matrices, batch.gram_tiles, partials, batch.numbers, step,
            NUMBERS=n_numbers, FIRST=first, TILE=TILE, DEPTH=DEPTH,
            enable_fp_fusion=True, **options,
        )  # fmt: skip
        _muon_product_kernel[(len(batch.tiles),)](
            x, b, y, batch.matrices, batch.tiles, partials, batch.numbers, step,
            NUMBERS=n_numbers, FIRST=first, EVEN_=batch.even, TILE=TILE, DEPTH=DEPTH,
            enable_fp_fusion=True, **options,
        )  # fmt: skip
    if n_rows := len(batch.row_tiles):
        sums = new(n_rows, 2, dtype=torch.float32)
        tables = xs[0], batch.matrices, batch.row_tiles, batch.numbers, norm, sums
        constants = {
            "NUMBERS": n_numbers,
            "EVEN_": batch.even,
            "ROWS": ROWS,
            "SMALLEST": SMALLEST_SQUARE,
        }
        for kernel in (_muon_row_moments_kernel, _muon_row_scale_kernel):
            kernel[(n_rows,)](*tables, **constants, BLOCK=ROW_BLOCK, enable_fp_fusion=True)
