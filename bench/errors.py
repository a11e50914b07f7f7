"""Errors of an operation's passes against float64, on the inputs that are timed.

The truth is computed on chunks of rows: of 8192 x 128256 logits a copy in float64 has 8 GiB, and
the truth needs several. Gradients of what all rows share are summed over the chunks in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PASSES = ("forward", "backward")


@dataclass
class Squares:
    """Sums of squares of a tensor's error and of its exact values, chunk by chunk."""

    error: float = 0.0
    exact: float = 0.0

    def add(self, x: Tensor, exact: Tensor) -> None:
        """Count the elements of `x`, which would be `exact`."""
        self.error += (x.double() - exact).square().sum().item()
        self.exact += exact.square().sum().item()

    @property
    def relative(self) -> float:
        """|x - exact| / |exact|; NaN where one of either is not finite."""
        return math.sqrt(self.error) / max(math.sqrt(self.exact), 1e-300)


@dataclass
class Sums:
    """Sums over the chunks, for one pass."""

    squares: dict[int, Squares] = field(default_factory=dict)
    """By output, of those that every row has its own of."""
    totals: dict[int, Tensor] = field(default_factory=dict)
    """By output, of those that the rows share: a mean loss, the gradient of a weight."""

    def add(self, i: int, actual: Tensor, exact: Tensor, rows: slice | None) -> None:
        """Count a chunk of output `i`: its `rows`, or its part of a sum."""
        if rows is None:
            self.totals[i] = self.totals[i] + exact if i in self.totals else exact
        else:
            self.squares.setdefault(i, Squares()).add(actual[rows], exact)

    def worst(self, actual: Sequence[Tensor]) -> float:
        """The largest relative error of the outputs."""
        found = [squares.relative for squares in self.squares.values()]
        return largest([*found, *(relative_rms([actual[i]], [x]) for i, x in self.totals.items())])


def largest(values: Sequence[float]) -> float:
    """The maximum; NaN where one value is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def relative_rms(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest over the tensors of |x - exact| / |exact|, as root mean squares."""
    found = []
    for x, e in zip(outputs, exact, strict=True):
        squares = Squares()
        squares.add(x, e)
        found.append(squares.relative)
    return largest(found)


def errors(
    function: Callable,
    truth: Callable,
    inputs: Sequence[Tensor],
    shared: Sequence[int] = (),
    rows: int | None = None,
) -> dict[str, float]:
    """Measure the relative RMS error of every pass of `function`.

    Args:
        function: the implementation, on copies of `inputs`.
        truth: the same in float64. Of scalar outputs it returns the mean over the rows.
        inputs: as they are timed.
        shared: positions of the inputs that all rows share; others have their rows in dimension 0.
        rows: rows of a chunk of the truth, halved until it fits the memory; all if None.

    Returns:
        The error by pass: forward, backward, and both, the larger of the two.
    """
    outputs, dys, grads = actual_passes(function, inputs)
    N = next(len(x) for i, x in enumerate(inputs) if i not in shared)
    rows = min(rows or N, N)
    while True:
        try:
            sums = _exact_sums(truth, inputs, shared, rows, outputs, dys, grads)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows = max(rows // 2, 1)  # outside of the handler, which keeps the tensors of the failure
        torch.cuda.empty_cache()
    found = {name: sums[name].worst(x) for name, x in zip(PASSES, (outputs, grads), strict=True)}
    return found | {"both": largest([*found.values()])}


def actual_passes(
    function: Callable, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of `function`, the gradients that come in, always the same, and those of inputs."""
    fresh = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    ys = as_tuple(function(*fresh))
    generator = torch.Generator(ys[0].device).manual_seed(0)
    # Rounded to bfloat16, so that every dtype has the same.
    dys = [
        torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)
        if y.dim() else torch.ones_like(y)
        for y in ys
    ]  # fmt: skip
    grads = torch.autograd.grad(ys, [x for x in fresh if x.requires_grad], dys)
    return [y.detach() for y in ys], dys, list(grads)


def as_tuple(ys: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an operation that has one or several."""
    return ys if isinstance(ys, tuple) else (ys,)


def _exact_sums(
    truth: Callable,
    inputs: Sequence[Tensor],
    shared: Sequence[int],
    rows: int,
    outputs: list[Tensor],
    dys: list[Tensor],
    grads: list[Tensor],
) -> dict[str, Sums]:
    N = next(len(x) for i, x in enumerate(inputs) if i not in shared)
    wide = {i: in_float64(inputs[i]) for i in shared}  # once for all chunks
    leaves = [i for i, x in enumerate(inputs) if x.requires_grad]
    sums = {name: Sums() for name in PASSES}
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        share = (part.stop - start) / N
        xs = [wide[i] if i in wide else in_float64(x[part]) for i, x in enumerate(inputs)]
        ys = as_tuple(truth(*xs))
        # The mean over all rows has this share of its gradient from these.
        dys_part = [
            dy[part].to(y) if y.dim() else torch.full_like(y, share)
            for y, dy in zip(ys, dys, strict=True)
        ]
        dxs = torch.autograd.grad(ys, [xs[i] for i in leaves], dys_part)
        for i, y in enumerate(ys):
            exact = y.detach()
            if exact.dim():
                sums["forward"].add(i, outputs[i], exact, part)
            else:
                sums["forward"].add(i, outputs[i], exact * share, None)
        for i, (leaf, dx) in enumerate(zip(leaves, dxs, strict=True)):
            sums["backward"].add(i, grads[i], dx, None if leaf in wide else part)
    return sums


def in_float64(x: Tensor) -> Tensor:
    """A copy of `x` in float64, integers as they are."""
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)
