"""Steps by PyTorch's own fused kernels for CPUs, which pass over memory once where they fit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels.optimizers._pointer_table import SLICE, flat
from tritium.kernels.optimizers._rounding import ABSENT, FLOAT32
from tritium.kernels.optimizers._state import Item
from tritium.kernels.optimizers._step_inputs import Tensors
from tritium.kernels.optimizers._step_kernels import GRADS, UPDATES, WEIGHTS
from tritium.kernels.optimizers.grad_norm import squares_reference

Group = dict[str, Any]
Fused = Callable[[Group, list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]], None]
"""The step of parameters, from the options of their group, their gradients, each of the rule's
states, and their step counts, which it counts up."""


class _Part(NamedTuple):
    """Elements of one parameter, all of them but where there are too many."""

    index: int
    p: Tensor
    g: Tensor
    states: tuple[Tensor, ...]
    step: Tensor


def step_fused(
    fused: Fused | None, found: Tensors, groups: list[Group], coef: float, sums: Tensor | None,
    others: frozenset[int] = frozenset(),
) -> set[int]:  # fmt: skip
    """Take the steps that `fused` can take, of gradients times `coef`; return which they were.

    Those of parameters `others` it leaves alone.

    `sums` [N, 3], if given, receives the squares of gradients, updates and weights of those.
    """
    if fused is None or runtime.REFERENCE or found.device.type != "cpu":
        return set()
    plain = [
        i for i, item in enumerate(found.items)
        if i not in others and _is_plain(item, found.grads[i])
    ]  # fmt: skip
    taken = {i for i in plain if not groups[found.items[i].group]["l1"]}
    if sums is not None:
        sums[[*taken]] = 0
    for index, group in enumerate(groups):
        chosen = [i for i in sorted(taken) if found.items[i].group == index]
        for parts in _calls(found, chosen):
            _step(fused, group, parts, coef, sums)
    return taken


def _step(
    fused: Fused, group: Group, parts: Sequence[_Part], coef: float, sums: Tensor | None
) -> None:
    indices, ps, gs, states, steps = map(list, zip(*parts, strict=True))
    before = [] if sums is None else [p.clone() for p in ps]
    scaled = gs if coef == 1.0 else [g * coef for g in gs]
    fused(group, ps, scaled, list(map(list, zip(*states, strict=True))), steps)
    if sums is not None:
        moves = [x - p for x, p in zip(before, ps, strict=True)]
        for column, xs in ((GRADS, gs), (UPDATES, moves), (WEIGHTS, ps)):
            sums[:, column.value].index_add_(0, torch.tensor(indices), squares_reference(xs))


def _calls(found: Tensors, chosen: list[int]) -> Iterator[list[_Part]]:
    """Cut the parameters into parts, and group them into calls of `SLICE` elements."""
    parts, n = [], 0
    for i in chosen:
        for part in _parts(i, found.items[i], found.grads[i]):
            if n + part.g.numel() > SLICE and parts:
                yield parts
                parts, n = [], 0
            parts.append(part)
            n += part.g.numel()
    if parts:
        yield parts


def _parts(index: int, item: Item, g: Tensor) -> Iterator[_Part]:
    states = [x for x in item.states if x is not None]
    xs, step = (item.p, g, *states), item.step
    assert step is not None  # a rule of such a kernel counts its steps
    if g.numel() <= SLICE:
        yield _Part(index, *xs[:2], xs[2:], step)
        return
    *firsts, last = zip(*(flat(x).split(SLICE) for x in xs), strict=True)
    for part in firsts:  # only the last may count the step
        yield _Part(index, *part[:2], part[2:], step.clone())
    yield _Part(index, *last[:2], last[2:], step)


def _is_plain(item: Item, g: Tensor) -> bool:
    """Return whether everything is float32, and there is no state other than the rule's."""
    kinds = {item.param, *item.kinds} - {ABSENT.value}
    return kinds == {FLOAT32.value} and g.dtype == torch.float32 and item.ema is None
