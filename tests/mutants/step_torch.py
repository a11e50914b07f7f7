"""Faults of _step_torch.py: PyTorch's kernels on the wrong elements, or with other results."""

from functools import partial

from tests.mutants import Mutant

_fused = partial(Mutant, file="kernels/optimizers/_step_torch.py")

MUTANTS = [
    _fused(
        what="every part counts the step",
        original="step.clone())",
        replacement="step)",
    ),
    _fused(
        what="clipping forgotten",
        original="[g * coef for g in gs]",
        replacement="gs",
    ),
    _fused(
        what="gradients clipped in place",
        original="[g * coef for g in gs]",
        replacement="[g.mul_(coef) for g in gs]",
    ),
    _fused(
        what="norms of one group's options",
        original="if found.items[i].group == index",
        replacement="if index == 0",
    ),
    _fused(
        what="l1 forgotten",
        original='if not groups[found.items[i].group]["l1"]',
        replacement="",
    ),
    _fused(
        what="the mean forgotten",
        original=" and item.ema is None",
        replacement="",
    ),
    _fused(
        what="bfloat16 gradients taken for float32",
        original=" and g.dtype == torch.float32",
        replacement="",
    ),
    _fused(
        what="moments in bfloat16 taken for float32",
        original="kinds = {item.param, *item.kinds}",
        replacement="kinds = {item.param}",
    ),
    _fused(
        what="the last norms kept",
        original="sums[[*taken]] = 0",
        replacement="pass",
    ),
    _fused(
        what="the last part's norm alone",
        original=".index_add_(0,",
        replacement=".index_copy_(0,",
    ),
    _fused(
        what="the last part left out",
        original="    yield _Part(index, *last[:2], last[2:], step)",
        replacement="    return",
    ),
    _fused(
        what="PyTorch's kernels where references are asked for",
        original=" or runtime.REFERENCE",
        replacement="",
    ),
]
