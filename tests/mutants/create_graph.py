"""Faults of first gradients that have a graph of their own."""

from functools import partial

from tests.mutants import Mutant

_cpu_backward = partial(Mutant, file="kernels/_cpu_backward.py")
_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _cpu_backward(
        what="what reaches one input by way of another counted twice",
        original="ends = [None if x is None else x.view_as(x) for x in xs]",
        replacement="ends = xs",
    ),
    _cpu_backward(
        what="inputs cut off from their history",
        original="x.view_as(x) for x in xs",
        replacement="x.detach().requires_grad_() for x in xs",
    ),
    _cpu_backward(
        what="one end for inputs that are the same tensor",
        original="ends = [None if x is None else x.view_as(x) for x in xs]",
        replacement="ends = [*{id(x): x.view_as(x) for x in xs}.values()] * len(xs)",
    ),
    Mutant(
        file="kernels/swiglu.py",
        what="the formulas' own graph",
        original="if torch.is_grad_enabled():",
        replacement="if False:",
    ),
    Mutant(
        file="kernels/rope.py",
        what="turned on instead of back",
        original="rope_reference(dy, cos, -sin, **ctx.how)",
        replacement="rope_reference(dy, cos, sin, **ctx.how)",
    ),
    _runtime(
        what="many gradients at once handed to a kernel",
        original="        refuse_batched(*grads)\n",
        replacement="",
    ),
    _runtime(
        what="many gradients at once not seen",
        original="is_legacy_batchedtensor(g) or is_batchedtensor(g)",
        replacement="is_batchedtensor(g)",
    ),
    _runtime(
        what="many gradients at once not seen under torch.func.vmap",
        original="is_legacy_batchedtensor(g) or is_batchedtensor(g)",
        replacement="is_legacy_batchedtensor(g)",
    ),
    Mutant(
        file="kernels/swiglu.py",
        what="many gradients at once handed to the formulas of swiglu",
        original="        refuse_batched(dh)\n",
        replacement="",
    ),
    Mutant(
        file="kernels/rms_norm.py",
        what="many gradients at once handed to the formulas of rms_norm",
        original="        refuse_batched(dy)\n",
        replacement="",
    ),
    Mutant(
        file="kernels/_qk_norm_rope_cpu.py",
        what="many gradients at once handed to the formulas of qk_norm_rope",
        original="        refuse_batched(dq, dk, dv)\n",
        replacement="",
    ),
]
