"""Fixes of the arithmetic of Triton's interpreter: one function for each error.

`mend` replaces one attribute of Triton and remembers the original, so that the self-test can
take each mend away and see its probe fail. The attributes are private to Triton, so a version that
is not in `TRIED` may lack them.
"""

import ast
from collections.abc import Callable
from functools import reduce

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

# (owner, attribute) -> (Triton's original, its replacement)
MENDS: dict[tuple[object, str], tuple[Callable | None, Callable]] = {}

# The versions of Triton that the mends and the strict interpreter were tried on.
TRIED = ((3, 6), (3, 7), (3, 8), (3, 9))
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
RIGHT: set[str] = set()
"""Names that this version of Triton answers correctly without the replacements."""


def mend(owner: object, name: str, right_from: tuple[int, int] | None = None) -> Callable:
    """Plan to replace `owner.name` by the decorated function, which is also given the original.

    From the version `right_from` of Triton on, the original is right as well.
    """
    if right_from is not None and right_from <= VERSION:
        RIGHT.add(name)

    def plan(replacement: Callable) -> Callable:
        original = getattr(owner, name, None)

        def mended(*args, **kwargs):
            return replacement(original, *args, **kwargs)

        MENDS[owner, name] = original, mended
        return replacement

    return plan


def _widen(bits: np.ndarray) -> np.ndarray:
    """Bfloat16, which numpy lacks and the interpreter keeps as uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """To bfloat16's bits, to the nearest, ties to even; a NaN stays one."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


@mend(InterpreterBuilder, "cast_impl")
def _cast_rounds_bf16(original, builder, x, dtype):
    """Bfloat16 is truncated, or its bits are taken for an integer."""
    if _is_bf16(x) and dtype.scalar != tl.bfloat16:
        x = TensorHandle(_widen(x.data), tl.float32)
    elif dtype.scalar == tl.bfloat16 and not _is_bf16(x):
        return TensorHandle(_round(x.data), tl.bfloat16)
    return TensorHandle(x.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)


@mend(InterpreterBuilder, "get_bf16", right_from=(3, 9))
def _bf16_constant(original, builder, value):
    """A bfloat16 constant cannot be made."""
    return TensorHandle(_round(np.array([value])), tl.bfloat16)


@mend(InterpreterBuilder, "binary_op")
def _bf16_operands(original, builder, a, b, op):
    """Bfloat16 is added, multiplied and compared as integers."""
    if not _is_bf16(a):
        return original(builder, a, b, op)
    result = op(_widen(a.data), _widen(b.data))
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    return TensorHandle(_round(result), tl.bfloat16)


@mend(InterpreterBuilder, "create_fma")
def _bf16_fma(original, builder, x, y, z):
    """Bfloat16 is multiplied and added as integers."""
    if not _is_bf16(x):
        return original(builder, x, y, z)
    return TensorHandle(_round(_widen(x.data) * _widen(y.data) + _widen(z.data)), tl.bfloat16)


@mend(InterpreterBuilder, "create_dot")
def _bf16_dot(original, builder, a, b, *rest):
    """Bfloat16 is multiplied as integers."""
    a, b = (TensorHandle(_widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
    return original(builder, a, b, *rest)


@mend(ReduceOps, "sum")
def _bf16_sum(original, reduction, x):
    """Bfloat16 is summed as integers. A GPU rounds every partial sum, so this does: pairwise."""
    if x.dtype != tl.bfloat16:
        return original(reduction, x)
    data, axis = x.handle.data, reduction.axis
    lanes = _widen(data.reshape(-1) if axis is None else np.moveaxis(data, axis, -1))
    while lanes.shape[-1] > 1:
        left, right = np.split(lanes, 2, axis=-1)
        lanes = _widen(_round(left + right))
    shape = np.any(data, axis=axis, keepdims=reduction.keep_dims).shape
    return reduction.to_tensor(_round(lanes).reshape(shape), tl.bfloat16)


@mend(ReduceOps, "min_max")
def _all_nan_is_no_warning(original, reduction, x, val_reduce_op, idx_reduce_op=None):
    """A row of nothing but NaN warns, and the tests turn warnings into errors."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
    return original(reduction, x, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)


@mend(InterpreterBuilder, "create_maxnumf", right_from=(3, 8))
def _maximum_drops_nan(original, builder, a, b):
    """The maximum of a number and NaN is NaN; a GPU answers the number."""
    return builder.binary_op(a, b, np.fmax)


@mend(InterpreterBuilder, "create_minnumf", right_from=(3, 8))
def _minimum_drops_nan(original, builder, a, b):
    """The minimum of a number and NaN is NaN; a GPU answers the number."""
    return builder.binary_op(a, b, np.fmin)


@mend(interpreter, "_implicit_cvt", right_from=(3, 8))
def _arguments_are_typed(original, value):
    """A float argument stays a double without a type; a bool is refused."""
    if isinstance(value, bool):
        return scalar(value, tl.int1)
    return scalar(value, tl.float32) if isinstance(value, float) else original(value)


@mend(interpreter.ASTTransformer, "visit_Name")
def _range_is_typed(original, transformer, node):
    """A loop variable is a Python integer, which forgets that its bounds were int64."""
    if node.id != "range":
        return node
    tl_range = ast.Attribute(ast.Name("tl", ast.Load()), "range", node.ctx)
    return ast.copy_location(tl_range, node)


def typed_range(*bounds, step=1, **pipelining):
    """Stand for `tl.range`: a loop variable of the type that the compiler gives it."""
    start, stop, step = bounds if len(bounds) == 3 else (*(0, *bounds)[-2:], step)
    if not any(isinstance(bound, tl.tensor) for bound in (start, stop, step)):
        return range(start, stop, step)
    semantic = interpreter.interpreter_semantic
    tensors = [semantic.to_tensor(bound) for bound in (start, stop, step)]
    dtype = reduce(semantic.integer_promote_impl, [x.dtype for x in tensors])
    return (scalar(i, dtype) for i in range(*(int(x.handle.data.item()) for x in tensors)))


def scalar(value: float, dtype: tl.dtype) -> tl.tensor:
    """An argument of a kernel."""
    data = np.array([value], interpreter._get_np_dtype(dtype))
    return tl.tensor(TensorHandle(data, dtype), dtype)
