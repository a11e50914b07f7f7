"""Faults of kernels/adamw.py: the rule, its corrections, groups, clipping and skipping."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/adamw.py")

MUTANTS = [
    _mutant(
        what="second moment without a square",
        original="v = beta2 * v + weight2 * g * g",
        replacement="v = beta2 * v + weight2 * g",
    ),
    _mutant(
        what="eps inside the correction",
        original="/ (tl.sqrt(v) * rsqrt + eps)",
        replacement="/ ((tl.sqrt(v) + eps) * rsqrt)",
    ),
    _mutant(
        what="bias correction in float32",
        original="return 1 - tl.exp2(t_N.to(tl.float64) * log2_beta_N)",
        replacement="return 1 - tl.exp2(t_N * log2_beta_N.to(tl.float32))",
    ),
    _mutant(
        what="every group gets the options of the first",
        original="_coefs(hyper_ptr + tl.load(row_ptr + GROUP) * HYPERS,",
        replacement="_coefs(hyper_ptr,",
    ),
    _mutant(
        what="small gradients scaled up",
        original="clip = clip_coefficient(norm, max_norm)",
        replacement="clip = max_norm / (norm + 1e-6)",
    ),
    _mutant(
        what="the tail skipped",
        original="for first in range(full, end, THREADS):",
        replacement="for first in range(full, end - THREADS, THREADS):",
    ),
    _mutant(
        what="a step that is not finite taken",
        original="        if not is_finite(norm):\n            return\n        clip",
        replacement="        clip",
    ),
    _mutant(
        what="weight decay with the wrong sign",
        original="p -= decay * p + step_size",
        replacement="p -= -decay * p + step_size",
    ),
    _mutant(
        what="steps not counted",
        original="tl.store(step_ptr_N, t_N, mask=mask_N)",
        replacement="tl.store(step_ptr_N, t_N - 1, mask=mask_N)",
    ),
    _mutant(
        what="moment not stored",
        original="store(m_ptr, offs, m, end",
        replacement="store(m_ptr, offs, 0 * m, end",
    ),
]
