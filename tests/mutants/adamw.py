"""Faults of kernels/adamw.py, adam.py and _update.py: rule, corrections, groups, clip, skip."""

from functools import partial

from . import Mutant

_adamw = partial(Mutant, file="kernels/adamw.py")
_adam = partial(Mutant, file="kernels/adam.py")
_update = partial(Mutant, file="kernels/_update.py")

MUTANTS = [
    _adam(
        what="second moment without a square",
        original="v = beta2 * v + weight2 * g * g",
        replacement="v = beta2 * v + weight2 * g",
    ),
    _adam(
        what="eps inside the correction",
        original="/ (tl.sqrt(v) * rsqrt + eps)",
        replacement="/ ((tl.sqrt(v) + eps) * rsqrt)",
    ),
    _adam(
        what="bias correction in float32",
        original="1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA1))",
        replacement="1 - tl.exp2((t_N * tl.load(hyper_ptr_N + LOG2_BETA1)).to(tl.float32))",
    ),
    _adam(
        what="moment not stored",
        original="rsqrt + eps), (m, v)",
        replacement="rsqrt + eps), (0 * m, v)",
    ),
    _adamw(
        what="weight decay with the wrong sign",
        original="p - (coefs[0] * p + step)",
        replacement="p - (step - coefs[0] * p)",
    ),
    _adamw(
        what="weight decay not in units of the learning rate",
        original="tl.load(hyper_ptr_N + LR) * tl.load(hyper_ptr_N + WEIGHT_DECAY)",
        replacement="tl.load(hyper_ptr_N + WEIGHT_DECAY)",
    ),
    _update(
        what="every group gets the options of the first",
        original="tl.load(row_ptr_N + GROUP, mask=mask_N, other=0) * HYPERS",
        replacement="0 * offs_N",
    ),
    _update(
        what="small gradients scaled up",
        original="clip = clip_coefficient(norm, max_norm)",
        replacement="clip = max_norm / (norm + 1e-6)",
    ),
    _update(
        what="the tail skipped",
        original="for first in range(full, end, THREADS):",
        replacement="for first in range(full, end - THREADS, THREADS):",
    ),
    _update(
        what="a step that is not finite taken",
        original="tl.load(norm_ptr)\n        if not is_finite(norm):\n            return",
        replacement="tl.load(norm_ptr)",
    ),
    _update(
        what="steps not counted",
        original="tl.store(step_ptr_N, t_N, mask=address_N != 0)",
        replacement="tl.store(step_ptr_N, t_N - 1, mask=address_N != 0)",
    ),
]
