"""Dispatch between kernels and references; registration of PyTorch operators.

A CUDA tensor goes to Triton. A CPU tensor goes to the PyTorch reference, or, with
TRITON_INTERPRET=1, to the same Triton kernel in its interpreter. TRITIUM_REFERENCE=1 sends
everything to the references, `fall_back` single operations.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import (
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Parameter
from triton import knobs

CPU_KERNELS = (
    knobs.runtime.interpret
)  # run kernels on CPU tensors (tritium.bench.compiled.static sets it)
REFERENCE = os.environ.get("TRITIUM_REFERENCE") == "1"

OPERATIONS = frozenset({
    "softmax", "log_softmax", "cross_entropy", "mse_loss", "rms_norm", "add_rms_norm",
    "layer_norm", "add_layer_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "relu_squared",
    "dropout_add", "embedding", "clip_grad_norm_", "clip_grad_norms_", "AdamW", "Adam", "SGD",
    "RMSprop", "Adagrad", "Lion", "Muon", "linear_kl_div",
})  # fmt: skip
"""Operations that `fall_back` accepts."""
SHARED = {
    "linear_cross_entropy": "cross_entropy",
    "linear_log_prob": "cross_entropy",
    "info_nce": "cross_entropy",
    "linear_topk_kl_div": "linear_kl_div",
}
"""Operations that use the kernel of another."""

_library = torch.library.Library("tritium", "DEF")
_fallen: frozenset[str] = frozenset()


def uses_triton(x: Tensor, op: str | None = None) -> bool:
    """Return whether the kernel of `op`, rather than its reference, computes on `x`.

    Without `op`, whether kernels compute on `x` at all. Inside a transform of torch.func, and where
    derivatives are carried forward, references do: those can be transformed, any number of times.
    """
    kernels = (x.is_cuda or CPU_KERNELS) and not REFERENCE and op not in _fallen
    return kernels and not sees_through()


def sees_through() -> bool:
    """Return whether the caller must use PyTorch's own operators.

    True in a transform of torch.func, in forward-mode differentiation and in torch.export: the
    operators here have no gradient and no batching rule, their autograd functions neither.
    """
    # Not is_exporting(), which torch.compile of torch 2.11 takes for true whatever it compiles.
    if _are_functorch_transforms_active() or torch.compiler._is_exporting_flag:
        return True
    return not is_compiling() and forward_ad._current_level >= 0


def fall_back(*ops: str) -> None:
    """Send operations to their references, from now on and in this process.

    Functions compiled by torch.compile follow; captured CUDA graphs do not.

    Args:
        ops: names as they are imported from `kernels`, such as "rope" or "AdamW".
            `linear_cross_entropy`, `linear_log_prob` and `info_nce` share the kernel of
            `cross_entropy`: one of the four takes the others along. `linear_topk_kl_div` goes with
            `linear_kl_div`.

    Raises:
        ValueError: there "is no kernel" of that name.
    """
    global _fallen
    _fallen |= _named(ops)


def fallen_back() -> frozenset[str]:
    """Return the operations that `fall_back` has sent to their references."""
    return _fallen


@contextmanager
def references(*ops: str) -> Iterator[None]:
    """Send operations to their references inside the block."""
    global _fallen
    before, _fallen = _fallen, _fallen | _named(ops)
    try:
        yield
    finally:
        _fallen = before


def _named(ops: tuple[str, ...]) -> frozenset[str]:
    names = frozenset(SHARED.get(op, op) for op in ops)
    if unknown := sorted(names - OPERATIONS):
        raise ValueError(
            f"fall_back: there is no kernel of {', '.join(map(repr, unknown))}; "
            f"name some of {', '.join(sorted({*OPERATIONS, *SHARED}))}"
        )
    return names


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which a kernel computes on `dtype`: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def widen(x: Tensor) -> Tensor:
    """Convert `x` to the dtype of its reference: float64 for float64, else float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied only where its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(n: int, block: int) -> int:
    """Return how many blocks cover `n`: `triton.cdiv` without its 3 us on the host."""
    return -(-n // block)


def power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n`, 1 for 0: Triton's own takes 2 us."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def operator(
    schema: str, launch: Callable, fake: Callable, incoming: int | None = None,
    options: type[Any] | None = None,
) -> Callable:  # fmt: skip
    """Register `launch` as the operator `tritium::<schema>` and return a function that calls it.

    The operator, that function's `overload`, is opaque to torch.compile and has no gradient of its
    own: a classic `torch.autograd.Function` around it supplies that (25 us forward and backward on
    a CPU, against 50 us for `torch.library.custom_op` with `register_autograd`). Its first argument
    must be a tensor: the launch happens on that tensor's device, which need not be the current one.

    The function calls `launch` at once where only the device would see the operator (no compiler,
    mode, transform, trace, profiler or subclass of Tensor): PyTorch's dispatcher takes 3 to 6 us.
    An operator that overwrites an argument is always dispatched, which counts its version. Of
    a tuple of results those that are not needed may be None, of `fake` too; dispatched, they come
    back empty, as an operator returns a fixed number of tensors.

    The first `incoming` arguments, or all, come from outside: such a tensor may be negated, or
    zero, without memory that says so. Those behind them were an operator's before, or made by one.

    `options` is the class of a named tuple, whose fields the schema names last: the function,
    `launch` and `fake` take one of it as their last argument.
    """
    spread = 0 if options is None else len(options._fields)

    def gathered(args: tuple) -> tuple:
        return args if options is None else (*args[:-spread], options(*args[-spread:]))

    def flat(args: tuple) -> tuple:
        return (*args[:-1], *args[-1]) if spread else args

    def launch_on_its_device(x: Tensor, *args):
        if not x.is_cuda or x.get_device() == _current_cuda_device():
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)

    def launch_dispatched(x: Tensor, *args):
        return _without_none(x, launch_on_its_device(x, *gathered(args)))

    def fake_for_inductor(*args):
        _register_lowering(overload)
        return _without_none(args[0], fake(*gathered(args)))

    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, launch_dispatched, "CUDA")
    _library.impl(
        name, launch_dispatched, "CPU"
    )  # reached under the interpreter and by tritium.bench.compiled.static only
    torch.library.register_fake(f"tritium::{name}", fake_for_inductor, lib=_library)
    overload = getattr(torch.ops.tritium, name).default
    overwrites = "!" in schema

    others = slice(None if incoming is None else incoming - 1)
    alone = incoming == 1

    plain = _PLAIN | {options}

    def call(x: Tensor, *args):
        if overwrites or is_dynamo_compiling():
            return overload(x, *flat(args))
        if (
            _is_watched() or type(x) not in _TENSORS or not plain.issuperset(map(type, args))
            or (spread and not _PLAIN.issuperset(map(type, args[-1])))
            or x.is_neg() or x._is_zerotensor()
        ):  # fmt: skip
            return overload(*map(_with_memory, (x, *flat(args))))
        if not alone:
            for y in args[others]:
                if type(y) in _TENSORS and (y.is_neg() or y._is_zerotensor()):
                    return overload(*map(_with_memory, (x, *flat(args))))
        if x.is_cpu:
            return launch(x, *args)
        return launch_on_its_device(x, *args) if x.is_cuda else overload(x, *flat(args))

    call.overload = overload
    return call


# Without the question of `torch.cuda.current_device` whether CUDA was begun: a tensor is there.
_current_cuda_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _without_none(x: Tensor, results: Any) -> Any:
    if not isinstance(results, tuple):
        return results
    return tuple(x.new_empty(0) if y is None else y for y in results)


def apply(function: type[torch.autograd.Function], *args) -> Any:
    """Return `function.apply(*args)`, without the part of it that functorch's wrappers need.

    Unwrapping those costs 2 us. A dead one, of a transform that has returned, has no memory of its
    own, and is left to PyTorch. Dynamo takes no tensor twice: it is given a view of it instead.
    """
    if is_dynamo_compiling():
        return function.apply(*_distinct(args))
    if _are_functorch_transforms_active():
        return function.apply(*args)
    for x in args:
        if type(x) is Tensor and is_functorch_wrapped_tensor(x):
            return function.apply(*args)
    return _bare_apply(function)(*args)


def _distinct(args: tuple) -> list:
    tensors, found = [], []
    for x in args:
        if isinstance(x, Tensor):
            x = x.view_as(x) if any(x is y for y in tensors) else x
            tensors.append(x)
        found.append(x)
    return found


@functools.cache
def _bare_apply(function: type[torch.autograd.Function]) -> Callable:
    bare: Any = super(torch.autograd.Function, function)
    return bare.apply


def _is_watched() -> bool:
    """Return whether a mode, a transform, a trace or a profiler must see the operators called."""
    return (
        _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


_TENSORS = frozenset({Tensor, Parameter})
_PLAIN = _TENSORS | {type(None), bool, int, float, str, torch.dtype}
"""Types that the dispatcher hands to a device's kernel as they are."""


def _with_memory(x: Any) -> Any:
    """Return zeros for a tensor that has none: the dispatcher would expand a single one."""
    if type(x) in _TENSORS and x._is_zerotensor():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return x


def _register_lowering(op: Any) -> None:
    """Tell Inductor, where it is at work, to call `op` as it is.

    Inductor of torch 2.11 already does so, but formats the arguments for a log line first,
    whether anybody logs or not. Where operators return pairs that feed the next one that text
    doubles with each, and no model of twelve layers was ever compiled. Later versions format it
    only if it is logged.
    """
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is None or op in lowering.lowerings:
        return
    from torch._library.utils import get_layout_constraint_tag

    tag = get_layout_constraint_tag(op, with_default=True)
    lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag))


def once_differentiable(
    backward: Callable | None = None, *, made_in_forward: bool = False
) -> Callable:
    """Compute a backward without a graph, and make a derivative of its results an error.

    `torch.autograd.function.once_differentiable` does so only where the incoming gradient has a
    graph itself; otherwise a gradient penalty would be dropped silently. Here the results hang on
    all that they are computed from, the incoming gradients and the saved tensors: autograd comes
    by on its way to whatever a second derivative is asked of. What hangs on nothing is constant.

    Args:
        backward: of an autograd function, whose results depend on inputs by way of tensors that
            are saved with their graph: inputs or outputs.
        made_in_forward: they depend on inputs by way of others, as gradients made in the forward
            pass do: a graph of the gradients (`create_graph=True`) is refused at once.
    """
    if backward is None:
        return functools.partial(once_differentiable, made_in_forward=made_in_forward)
    differentiate = backward

    @functools.wraps(differentiate)
    def refusing(ctx, *grads):
        refuse_batched(*grads)
        if not torch.is_grad_enabled():
            return differentiate(ctx, *grads)
        if is_compiling():
            with torch.no_grad():
                return differentiate(ctx, *grads)
        if made_in_forward:
            raise RuntimeError(FIRST_ONLY)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            outputs = differentiate(unpacked, *grads)
        used = [
            x for x in (*unpacked.saved_tensors, *grads) if x is not None and x.requires_grad
        ]  # fmt: skip
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(None if x is None else _NoSecondDerivative.apply(x, *used) for x in outputs)

    return refusing


def refuse_batched(*grads: Tensor | None) -> None:
    """Raise where a backward pass is asked for many gradients at once, which vmap makes one."""
    if is_compiling():
        return
    for g in grads:
        if g is not None and (is_legacy_batchedtensor(g) or is_batchedtensor(g)):
            raise RuntimeError(
                "a Tritium kernel takes one incoming gradient at a time; leave out "
                "is_grads_batched and vectorize, or set TRITIUM_REFERENCE=1"
            )


FIRST_ONLY = (
    "a Tritium kernel has a first derivative only; set TRITIUM_REFERENCE=1 to differentiate twice"
)


class _Unpacked:
    """The context of a backward, whose saved tensors are asked for once, as checkpoints allow."""

    def __init__(self, ctx: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "saved_tensors", ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *used: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(FIRST_ONLY)
