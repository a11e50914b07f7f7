"""Faults of first gradients that have a graph of their own."""

from functools import partial

from tests.mutants import Mutant

_cpu_backward = partial(Mutant, file="kernels/_cpu_backward.py")

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
]
