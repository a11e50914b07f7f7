"""Faults of hand-written CPU gradients."""

from functools import partial

from tests.mutants import Mutant

_cpu_backward = partial(Mutant, file="kernels/_cpu_backward.py")
_rms_norm = partial(Mutant, file="kernels/rms_norm.py")
_swiglu = partial(Mutant, file="kernels/swiglu.py")
_rope = partial(Mutant, file="kernels/rope.py")

MUTANTS = [
    _rms_norm(
        what="the mean of the gradient forgotten",
        original=".addcmul_(normed, mean)",
        replacement="",
    ),
    _rms_norm(
        what="the offset forgotten",
        original="w = _scale(weight, s, ctx.offset)",
        replacement="w = _scale(weight, s, 0.0)",
    ),
    _rms_norm(
        what="a mean over all rows",
        original=".view(r.shape).div_(-D)",
        replacement=".mean().div_(-D)",
    ),
    _rms_norm(
        what="a second derivative of the formulas",
        original="if torch.is_grad_enabled():\n            define",
        replacement="if False:\n            define",
    ),
    _rms_norm(
        what="the incoming gradient overwritten",
        original="g = dy * normed",
        replacement="g = dy.mul_(normed)",
    ),
    _swiglu(
        what="gradients exchanged",
        original="        return dparts\n",
        replacement="        return dparts[::-1]\n",
    ),
    _swiglu(
        what="the incoming gradient overwritten",
        original="torch.mul(widen(dh), up)",
        replacement="widen(dh).mul_(up)",
    ),
    _rope(
        what="turned on instead of back",
        original="rope_reference(dy, cos, -sin, **ctx.how)",
        replacement="rope_reference(dy, cos, sin, **ctx.how)",
    ),
    _rope(
        what="the offset forgotten",
        original="rope_reference(dy, cos, -sin, **ctx.how)",
        replacement="rope_reference(dy, cos, -sin, interleaved=ctx.how['interleaved'])",
    ),
    _cpu_backward(
        what="torch.func meets a gradient it cannot see through",
        original="and not runtime.sees_through()",
        replacement="and True",
    ),
    _cpu_backward(
        what="never",
        original="return torch.is_grad_enabled() and",
        replacement="return not torch.is_grad_enabled() and",
    ),
    _cpu_backward(
        what="without a graph",
        original="create_graph=True",
        replacement="create_graph=False",
    ),
    _cpu_backward(
        what="no graph where a gradient is wanted",
        original="return not wants and _runs_on_cpu(xs)",
        replacement="return _runs_on_cpu(xs)",
    ),
    _rms_norm(
        what="the offset forgotten where there is no graph",
        original="if weight is None or offset or not",
        replacement="if weight is None or not",
    ),
]
