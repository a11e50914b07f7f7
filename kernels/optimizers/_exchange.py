"""Whole matrices from the shards of several ranks: each at one rank, its owner.

What is elementwise every rank does with its own shards. What needs a whole matrix its owner does:
`gather` brings the shards of all matrices to their owners, `scatter` brings back what they have
become, each by one all-to-all whatever the number of matrices. Shapes alone decide who owns what,
so that all ranks know it. Two buffers on every rank:

    sent        by owner: its shards of their matrices, and the second moments of their rows
    received    by rank: their shards of the matrices that it owns, and the moments
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritium.kernels.optimizers._dtensor import Sharing, chunk_of, sharing

ALIGNMENT = 64  # elements, at multiples of which a shard begins in a buffer


class Matrix(NamedTuple):
    """A matrix, or a stack of them, on its way."""

    p: Tensor
    """The parameter `[R, C]`, a DTensor or not."""
    cost: int
    """Time of what its owner does, in any unit."""
    stacked: tuple[int, ...] | None
    """Rows of each matrix that is stacked in every shard of rows; None: a shard's rows are next to
    each other in the parameter."""
    moments: Tensor | None
    """Second moments of this rank's rows `[r, 1]`, float32, if there are any."""


class _Part(NamedTuple):
    """Rows and columns of a matrix that a rank has, rows in the order of its shard."""

    rows: list[range]
    columns: range


class _Slot(NamedTuple):
    """Place of a shard in a buffer."""

    start: int
    shape: tuple[int, int]
    moments: int
    """Element at which the moments of its rows begin, -1 if there are none."""

    def shard(self, buffer: Tensor) -> Tensor:
        n_rows, n_columns = self.shape
        return buffer[self.start :][: n_rows * n_columns].view(self.shape)

    def rows(self, buffer: Tensor) -> Tensor:
        n = 4 * self.shape[0] // buffer.element_size()
        return buffer[self.moments :][:n].view(torch.float32).view(-1, 1)


class _Space:
    """Slots of a buffer, one behind another."""

    def __init__(self, dtype: torch.dtype):
        self.size, self._unit = 0, dtype.itemsize

    def slot(self, part: _Part, matrix: Matrix) -> _Slot:
        shape = sum(map(len, part.rows)), len(part.columns)
        start = self._take(shape[0] * shape[1])
        moments = -1 if matrix.moments is None else self._take(4 * shape[0] // self._unit)
        return _Slot(start, shape, moments)

    def _take(self, n: int) -> int:
        start = self.size
        self.size += -(-n // ALIGNMENT) * ALIGNMENT
        return start


class _Copies:
    """Copies of the second tensor of each pair to the first; many in one launch on a GPU."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Any]]):
        # One launch takes tensors of one dtype that are contiguous.
        alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for x, y in pairs:
            key = x.dtype, x.is_contiguous() and y.is_contiguous()
            alike.setdefault(key, []).append((x, y))
        self._lists = [tuple(map(list, zip(*same, strict=True))) for same in alike.values()]

    def __call__(self) -> None:
        for to, source in self._lists:
            torch.ops.aten._foreach_copy_.default(to, source)


class _Route(NamedTuple):
    """Ranks that send each other shards: where theirs begin and end in the buffers."""

    group: Any
    sent: list[int]
    received: list[int]


class Exchange:
    """The way of matrices from their shards to their owners, and back.

    Args:
        op: name of the optimizer.
        matrices: by index of the parameter, the same on every rank.
        dtype: dtype of what is sent, except moments.
        device: where it is.

    Attributes:
        sent: the buffer of this rank's shards.
        starts: where each begins in it, by index.
        shards: the shards `[r, c]` in it, by index.
        owned: shapes of the matrices that this rank owns, by index. Those that are not sharded
            every rank owns.
        whole: those matrices `[R, C]`, by index, where `gather` leaves them.
        moments: second moments of the rows of those that have any, `[R, 1]` float32, by index.
    """

    def __init__(
        self, op: str, matrices: dict[int, Matrix], dtype: torch.dtype, device: torch.device
    ):
        sent, received = _Space(dtype), _Space(dtype)
        alike: dict[Sharing, list[int]] = {}
        for i, matrix in matrices.items():
            alike.setdefault(sharing(op, matrix.p), []).append(i)
        self._routes, slots = [], {}
        arrived: list[tuple[int, _Part, _Slot]] = []
        owned: dict[int, torch.Size] = {}
        for shared, indices in alike.items():
            size, mine = len(shared.places), shared.rank
            parts = {i: _parts(matrices[i], shared) for i in indices}
            owners = balanced({i: matrices[i].cost for i in indices}, size)
            ends, got = [sent.size], [received.size]
            for owner in range(size):
                for i in [i for i in indices if owners[i] == owner]:
                    slots[i] = sent.slot(parts[i][mine], matrices[i])
                ends.append(sent.size)
            own = [i for i in indices if owners[i] == mine]
            owned |= {i: matrices[i].p.shape for i in own}
            for rank in range(size):
                for i in own:
                    arrived.append((i, parts[i][rank], received.slot(parts[i][rank], matrices[i])))
                got.append(received.size)
            self._routes.append(_Route(shared.group, ends, got))
        self.owned = dict(sorted(owned.items()))
        self.sent = torch.empty(sent.size, dtype=dtype, device=device)
        self._received = torch.empty(received.size, dtype=dtype, device=device)
        self._arrived = arrived
        self.starts = {i: slot.start for i, slot in slots.items()}
        self.shards = {i: slot.shard(self.sent) for i, slot in slots.items()}
        with_moments = [i for i, matrix in matrices.items() if matrix.moments is not None]
        rows = [(slots[i].rows(self.sent), matrices[i].moments) for i in with_moments]
        self._leaving_rows = _Copies(rows)
        self._returned_rows = _Copies([(moments, slot) for slot, moments in rows])
        self.moments = {
            i: torch.empty(shape[0], 1, dtype=torch.float32, device=device)
            for i, shape in self.owned.items()
            if i in with_moments
        }

    def connect(
        self, whole: dict[int, Tensor], made: dict[int, Tensor] | None = None
    ) -> "Exchange":
        """Set where matrices `[R, C]` arrive and from where they return, by the indices of `owned`.

        Args:
            whole: filled by `gather`.
            made: those that `scatter` takes. None: the same.
        """
        self.whole = whole
        self._arrivals = _Copies(self._pairs(whole))
        leaving = self._pairs(whole if made is None else made)
        self._departures = _Copies([(part, whole) for whole, part in leaving])
        return self

    def _pairs(self, wholes: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each part of the matrices and their moments, and where it is in the buffer."""
        pairs = []
        for i, part, slot in self._arrived:
            shard, columns, first = slot.shard(self._received), part.columns, 0
            for rows in part.rows:
                own, these = slice(first, first + len(rows)), slice(rows.start, rows.stop)
                pairs.append((wholes[i][these, columns.start : columns.stop], shard[own]))
                if i in self.moments:
                    pairs.append((self.moments[i][these], slot.rows(self._received)[own]))
                first += len(rows)
        return [pair for pair in pairs if pair[0].numel()]

    def gather(self) -> None:
        """Bring the shards, and the moments of rows, to the owners; every rank calls it."""
        self._leaving_rows()
        for route in self._routes:
            _all_to_all(route.group, self.sent, route.sent, self._received, route.received)
        self._arrivals()

    def scatter(self) -> None:
        """Bring the parts of the matrices, and the moments, to their ranks; every rank calls it."""
        self._departures()
        for route in self._routes:
            _all_to_all(route.group, self._received, route.received, self.sent, route.sent)
        self._returned_rows()


def balanced(costs: dict[int, int], size: int) -> dict[int, int]:
    """Return which of `size` ranks takes each task, the next most costly the least busy one."""
    busy, owners = [0] * size, {}
    for i in sorted(costs, key=lambda i: -costs[i]):
        owners[i] = min(range(size), key=busy.__getitem__)
        busy[owners[i]] += costs[i]
    return owners


def _parts(matrix: Matrix, shared: Sharing) -> list[_Part]:
    """Return the part of each rank that shares a matrix."""
    n_rows, n_columns = matrix.p.shape
    stacked, parts = matrix.stacked or (n_rows,), []
    for place in shared.places:
        (row, among_rows), columns = (chunk_of(matrix.p, dim, place) for dim in (0, 1))
        starts = accumulate(stacked, initial=0)
        rows = [_chunk(a, n, row, among_rows) for a, n in zip(starts, stacked, strict=False)]
        parts.append(_Part(rows, _chunk(0, n_columns, *columns)))
    return parts


def _chunk(first: int, n: int, index: int, count: int) -> range:
    """Return a part of `n` numbers from `first`, as `torch.chunk` cuts them into `count`."""
    length = -(-n // count)
    return range(first + min(index * length, n), first + min((index + 1) * length, n))


def _all_to_all(group: Any, x: Tensor, ends: list[int], y: Tensor, y_ends: list[int]) -> None:
    """Send each rank its part of `x`; the parts that begin and end at `y_ends` arrive in `y`."""
    if group is None:  # nothing is sharded
        y[y_ends[0] : y_ends[-1]].copy_(x[ends[0] : ends[-1]])
        return
    # Bytes, since backends do not send all dtypes.
    sizes = [[(b - a) * x.element_size() for a, b in pairwise(e)] for e in (y_ends, ends)]
    torch.distributed.all_to_all_single(
        y[y_ends[0] : y_ends[-1]].view(torch.uint8), x[ends[0] : ends[-1]].view(torch.uint8),
        *sizes, group=group,
    )  # fmt: skip
