"""Faults of kernels/optimizers/adamw.py, adam.py and _step_kernels.py: rule, corrections, groups, clip, skip."""

from functools import partial

from tests.mutants import Mutant

_adamw = partial(Mutant, file="kernels/optimizers/adamw.py")
_adam = partial(Mutant, file="kernels/optimizers/adam.py")
_update = partial(Mutant, file="kernels/optimizers/_step_kernels.py")

MUTANTS = [
    _adam(
        what="second moment without a square",
        original="v = beta2 * v + weight2 * g * g",
        replacement="v = beta2 * v + weight2 * g",
    ),
    _adam(
        what="eps inside the correction",
        original="tl.sqrt(square) * rsqrt + eps)",
        replacement="(tl.sqrt(square) + eps) * rsqrt)",
    ),
    _adam(
        what="bias correction in float32",
        original="1 - tl.exp2(t_N * tl.load(hyper_ptr_N + LOG2_BETA1))",
        replacement="1 - tl.exp2((t_N * tl.load(hyper_ptr_N + LOG2_BETA1)).to(tl.float32))",
    ),
    _adam(
        what="moment not stored",
        original="rsqrt + eps), (m, v, largest)",
        replacement="rsqrt + eps), (0 * m, v, largest)",
    ),
    _update(
        what="weight decay with the wrong sign",
        original="u += coefs[3] * p",
        replacement="u -= coefs[3] * p",
    ),
    _update(
        what="weight decay not in units of the learning rate",
        original="decay_N = lr_N * tl.load",
        replacement="decay_N = 0 * lr_N + tl.load",
    ),
    _adamw(
        what="decay inside the gradient",
        original="decoupled_weight_decay: bool = True",
        replacement="decoupled_weight_decay: bool = False",
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
        original="tl.load(skipped_ptr) + 1)\n            return\n",
        replacement="tl.load(skipped_ptr) + 1)\n",
    ),
    _update(
        what="steps not counted",
        original="tl.store(step_ptr_N, t_N, mask=step_N != 0)",
        replacement="tl.store(step_ptr_N, t_N - 1, mask=step_N != 0)",
    ),
]
