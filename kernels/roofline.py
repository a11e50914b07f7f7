"""Roofline: minimum bytes, FLOPs and time of an operation on a device.

    time of a phase = max(bytes / copy rate, operations / their rate)
    bound of a pass = sum of its phases, which wait for one another

Bytes are those that must cross device memory: every input read once, every output written once.
Per-row statistics, targets, weights `[D]` and partial sums are left out: they are a thousandth.
Operations count a multiplication, an addition, an exponential or a division as one each; those of
matrix products are counted apart, because they run at another rate.

A loss needs no gradient from above, so its gradient can be made in the pass that reads the inputs:
`both` of `cross_entropy`, `linear_cross_entropy`, the divergences and `mse_loss` is less than the
sum of forward and backward. With inplace=True `cross_entropy` saves a buffer, but no byte of its
bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add, mul

import torch

from tritium.kernels.units import duration, quantity

# Reachable shares of a datasheet's figures: 4.3 of 4.8 TB/s copying and 785 of 989 TFLOP/s in bf16
# products, on an H200. The other devices are assumed to reach the same shares.
COPY_SHARE = 4.3 / 4.8
MATRIX_SHARE = 785 / 989


@dataclass(frozen=True)
class Device:
    """A device's rates."""

    name: str
    cuda_name: str
    """End of the name by `torch.cuda.get_device_name`."""
    copy: float
    """Reachable bytes per second, read and written together."""
    matrix_16: float
    """Reachable operations per second of dense matrix products in bfloat16 or float16."""
    matrix_32: float
    """Reachable operations per second of matrix products in float32, without TF32."""
    arithmetic: float
    """Float32 operations per second outside matrix products."""


def _device(name: str, cuda_name: str, terabytes: float, bf16: float, fp32: float) -> Device:
    """Make a device from its datasheet: TB/s of memory, dense bf16 and fp32 TFLOP/s."""
    return Device(
        name, cuda_name, terabytes * 1e12 * COPY_SHARE,
        bf16 * 1e12 * MATRIX_SHARE, fp32 * 1e12 * MATRIX_SHARE, fp32 * 1e12,
    )  # fmt: skip


DEVICES = (
    _device("A100 80GB SXM", "A100-SXM4-80GB", 2.039, 312, 19.5),
    _device("H100 SXM", "H100 80GB HBM3", 3.35, 989, 67),
    _device("H200", "H200", 4.8, 989, 67),
    _device("B200", "B200", 8.0, 2250, 75),
    _device("RTX 4090", "RTX 4090", 1.008, 165, 82.6),
    _device("MI300X", "MI300X", 5.3, 1307, 163),
)


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one phase."""

    bytes: int = 0
    operations: int = 0
    products: int = 0
    """Operations in matrix products."""


@dataclass(frozen=True)
class Bound:
    """Minimum bytes, operations and time of a pass."""

    bytes: int
    flops: int
    microseconds: float
    resource: str
    """The limiting resource: "memory", "matrix products" or "arithmetic"."""

    def __str__(self) -> str:
        return (
            f"{quantity(self.bytes, 'B'):>9}  {quantity(self.flops, 'FLOP'):>12}  "
            f"{duration(self.microseconds / 1e6):>8}  bound by {self.resource}"
        )


@dataclass(frozen=True)
class Explanation:
    """The bounds of an operation's passes on a device."""

    op: str
    dims: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    device: Device
    forward: Bound
    """The pass forward; for an optimizer, the step."""
    backward: Bound | None
    """None for an optimizer."""
    both: Bound

    def __str__(self) -> str:
        dims = " ".join(f"{letter}={size}" for letter, size in self.dims)
        passes = [("forward", self.forward), ("backward", self.backward), ("both", self.both)]
        if self.backward is None:
            passes = [("step", self.both)]
        return "\n".join([
            f"{self.op} {dims} {str(self.dtype).removeprefix('torch.')}, on {self.device.name}: "
            f"copy {quantity(self.device.copy, 'B/s')}, "
            f"products in bf16 {quantity(self.device.matrix_16, 'FLOP/s')}",
            *(f"  {name:<9}{bound}" for name, bound in passes),
        ])  # fmt: skip


Phases = tuple[Work, ...]
Passes = tuple[Phases, Phases | None, Phases]  # forward, backward, both


# Operations that read and write whole tensors of one shape: its dimensions, how many of them move
# forward and backward, and operations per element forward and backward.
STREAMS: dict[str, tuple[str, int, int, int, int]] = {
    "softmax": ("MN", 2, 3, 6, 5),
    "log_softmax": ("MN", 2, 3, 6, 5),
    "rms_norm": ("TD", 2, 3, 4, 9),
    "add_rms_norm": ("TD", 4, 4, 5, 10),
    "layer_norm": ("TD", 2, 3, 7, 12),
    "add_layer_norm": ("TD", 4, 4, 8, 13),
    "rope": ("THK", 2, 2, 3, 3),
    "swiglu": ("TF", 3, 5, 5, 11),
    "geglu": ("TF", 3, 5, 6, 12),
    "relu_squared": ("TF", 2, 3, 2, 3),
    "dropout_add": ("TD", 3, 2, 3, 2),  # the random numbers are integer arithmetic, not counted
}


def _stream(op: str, sizes: list[int], s: int) -> Passes:
    _, *numbers = STREAMS[op]
    elements = reduce(mul, sizes)
    moved_f, moved_b, operations_f, operations_b = (elements * number for number in numbers)
    forward, backward = Work(moved_f * s, operations_f), Work(moved_b * s, operations_b)
    return (forward,), (backward,), (forward, backward)


def _cross_entropy(s: int, T: int, V: int) -> tuple[Phases, Phases, Phases]:
    forward, backward = Work(T * V * s, 4 * T * V), Work(2 * T * V * s, 4 * T * V)
    return (forward,), (backward,), (Work(2 * T * V * s, 8 * T * V),)


def _mse_loss(s: int, N: int) -> Passes:
    """Bound with the gradient of the input alone."""
    return (Work(2 * N * s, 3 * N),), (Work(3 * N * s, 2 * N),), (Work(3 * N * s, 4 * N),)


def _linear_cross_entropy(s: int, T: int, D: int, V: int) -> tuple[Phases, Phases, Phases]:
    """Three products, and between them the logits are read once and overwritten."""
    layer = (T * D + V * D) * s
    product = Work(layer, 0, 2 * T * D * V)
    gradients = Work(2 * layer, 0, 4 * T * D * V)
    (loss,), rows, both = _cross_entropy(s, T, V)
    return (product, loss), (*rows, gradients), (product, *both, gradients)


def _linear_log_prob(s: int, T: int, D: int, V: int) -> Passes:
    """Four products: the backward pass recomputes the logits and overwrites them."""
    forward, rows, _ = _linear_cross_entropy(s, T, D, V)
    backward = (forward[0], *rows)
    return forward, backward, (*forward, *backward)


def _linear_kl_div(s: int, T: int, D: int, V: int) -> Passes:
    """Four products, two of them logits, of a student and a teacher of the same width."""
    (product, _), (_, gradients), _ = _linear_cross_entropy(s, T, D, V)
    loss, rows = Work(2 * T * V * s, 12 * T * V), Work(3 * T * V * s, 8 * T * V)
    both = Work(3 * T * V * s, 20 * T * V)
    return (product, product, loss), (rows, gradients), (product, product, both, gradients)


def _linear_topk_kl_div(s: int, T: int, D: int, V: int, K: int) -> Passes:
    """Three products; of a teacher's K classes the int64 indices and log-probabilities are read."""
    (product, loss), (rows, gradients), (_, both, _) = _linear_cross_entropy(s, T, D, V)
    named = T * K * (8 + s)
    forward = Work(loss.bytes + named, loss.operations + 12 * T * K)
    backward = Work(rows.bytes + named, rows.operations + 8 * T * K)
    both = Work(both.bytes + named, both.operations + 20 * T * K)
    return (product, forward), (backward, gradients), (product, both, gradients)


def _info_nce(s: int, B: int, D: int) -> Passes:
    """Three products; the `[B, B]` similarities need never leave the chip."""
    forward = Work(2 * B * D * s, 4 * B * B, 2 * B * B * D)
    backward = Work(4 * B * D * s, 4 * B * B, 4 * B * B * D)
    return (forward,), (backward,), (forward, backward)


def _qk_norm_rope(s: int, T: int, H: int, G: int, K: int) -> Passes:
    """With the norm; the values are a view forward, and backward a copy."""
    turned, values = T * (H + G) * K, T * G * K
    forward = Work(2 * turned * s, 7 * turned)
    backward = Work((3 * turned + 2 * values) * s, 16 * turned)
    return (forward,), (backward,), (forward, backward)


def _embedding(s: int, T: int, D: int, V: int) -> Passes:
    """Rows read at most once each; the gradient is dense."""
    forward = Work((min(T, V) + T) * D * s)
    backward = Work((T + V) * D * s, T * D)
    return (forward,), (backward,), (forward, backward)


# Optimizers: states of a parameter, and operations per parameter. Rounding stochastically or to 8
# bits is integer arithmetic, not counted.
OPTIMIZERS = {
    "adamw": (2, 14), "adamw_clipped": (2, 14), "adam": (2, 14), "sgd": (0, 4),
    "sgd_momentum": (1, 6), "rmsprop": (1, 11), "adagrad": (1, 9), "lion": (1, 10),
}  # fmt: skip
MASTERS = ("float32", "split", None)
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
STATE_BLOCK = 128  # elements of an 8-bit state that share a float32 scale


def _optimizer(op: str, s: int, N: int, master: str | None, state_dtype: torch.dtype) -> Passes:
    """Gradient read once, weight and states read and written once.

    With a float32 master the rounded weight is written and not read; a split weight is read and
    written together with its 16 bits more.
    """
    states, operations = OPTIMIZERS[op]
    state = N * state_dtype.itemsize
    if state_dtype == torch.uint8:
        state += 4 * -(-N // STATE_BLOCK)
    kept = {"float32": 2 + 8, "split": 2 * 4} if s == 2 else {}
    weight = kept.get(master, 2 * s)
    step = (Work(N * (s + weight) + 2 * states * state, operations * N),)
    if op == "adamw_clipped":  # the norm of all gradients is known before the first is used
        step = _grad_norm(s, N)[0] + step
    return step, None, step


def _grad_norm(s: int, N: int) -> Passes:
    step = (Work(N * s, 2 * N),)
    return step, None, step


OTHERS: dict[str, tuple[str, Callable[..., Passes]]] = {
    "cross_entropy": ("TV", _cross_entropy),
    "linear_cross_entropy": ("TDV", _linear_cross_entropy),
    "linear_log_prob": ("TDV", _linear_log_prob),
    "linear_kl_div": ("TDV", _linear_kl_div),
    "linear_topk_kl_div": ("TDVK", _linear_topk_kl_div),
    "mse_loss": ("N", _mse_loss),
    "info_nce": ("BD", _info_nce),
    "qk_norm_rope": ("THGK", _qk_norm_rope),
    "embedding": ("TDV", _embedding),
    "grad_norm": ("N", _grad_norm),
}
OPERATIONS = {  # and their dimensions
    **{op: entry[0] for op, entry in (STREAMS | OTHERS).items()},
    **dict.fromkeys(OPTIMIZERS, "N"),
}


def explain(
    op: str,
    *,
    B: int | None = None,
    T: int | None = None,
    M: int | None = None,
    N: int | None = None,
    D: int | None = None,
    F: int | None = None,
    G: int | None = None,
    V: int | None = None,
    H: int | None = None,
    K: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    master: str | None = "float32",
    state_dtype: torch.dtype = torch.float32,
    device: Device | str | None = None,
) -> Explanation:
    """Compute the least bytes, operations and time of an operation, forward and backward.

    Args:
        op: a name of `OPERATIONS`, which gives its dimensions; "adamw_clipped" is `AdamW` with
            max_grad_norm.
        B: pairs of a contrastive batch.
        T: tokens.
        M: rows of a softmax.
        N: columns of a softmax; elements of a loss; parameters of an optimizer.
        D: width.
        F: features of a feed-forward block.
        G: heads of keys, and as many of values.
        V: vocabulary.
        H: heads; of queries, where there are G of keys.
        K: width of a head; classes that a teacher names.
        dtype: of the tensors; for an optimizer of weights and gradients.
        master: what an optimizer adds to 2-byte weights: a "float32" copy, 16 bits ("split"),
            or None, for stochastic rounding. Float32 weights need none.
        state_dtype: of an optimizer's moments: float32, bfloat16, or uint8 for 8 bits in blocks of
            128 with a float32 scale each.
        device: part of a name in `DEVICES` ("H200"), a `Device` with rates of your own, or None
            for the present CUDA device.

    Returns:
        The bounds. `str()` of them is a table.

    Raises:
        ValueError: an unknown operation, device, master or state_dtype, or dimensions other than
            the operation's own.
    """
    given = {"B": B, "T": T, "M": M, "N": N, "D": D, "F": F, "G": G, "V": V, "H": H, "K": K}
    dims = {letter: size for letter, size in given.items() if size is not None}
    if op not in OPERATIONS:
        raise ValueError(f"explain: op must be one of {', '.join(OPERATIONS)}; got {op!r}")
    if set(dims) != set(OPERATIONS[op]) or any(size < 1 for size in dims.values()):
        raise ValueError(
            f"explain: {op} needs {', '.join(OPERATIONS[op])}, each at least 1; got {dims or None}"
        )
    if master not in MASTERS:
        raise ValueError(f'explain: master must be "float32", "split" or None; got {master!r}')
    if state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"explain: state_dtype must be torch.float32, bfloat16 or uint8; got {state_dtype}"
        )
    sizes = [dims[letter] for letter in OPERATIONS[op]]
    rates = device if isinstance(device, Device) else find_device(device)
    s = dtype.itemsize
    if op in STREAMS:
        passes = _stream(op, sizes, s)
    elif op in OPTIMIZERS:
        passes = _optimizer(op, s, *sizes, master, state_dtype)
    else:
        passes = OTHERS[op][1](s, *sizes)
    forward, backward, both = passes
    return Explanation(
        op=op,
        dims=tuple(zip(OPERATIONS[op], sizes, strict=True)),
        dtype=dtype,
        device=rates,
        forward=_bound(forward, rates, dtype),
        backward=None if backward is None else _bound(backward, rates, dtype),
        both=_bound(both, rates, dtype),
    )


def _bound(phases: Phases, device: Device, dtype: torch.dtype) -> Bound:
    matrix = device.matrix_16 if dtype.itemsize == 2 else device.matrix_32
    spent = {"memory": 0.0, "matrix products": 0.0, "arithmetic": 0.0}
    for work in phases:
        seconds = {
            "memory": work.bytes / device.copy,
            "matrix products": work.products / matrix,
            "arithmetic": work.operations / device.arithmetic,
        }
        longest = max(seconds, key=seconds.__getitem__)
        spent[longest] += seconds[longest]
    return Bound(
        bytes=reduce(add, (work.bytes for work in phases), 0),
        flops=reduce(add, (work.operations + work.products for work in phases), 0),
        microseconds=sum(spent.values()) * 1e6,
        resource=max(spent, key=spent.__getitem__),
    )


def find_device(name: str | None) -> Device:
    """Return the entry of `DEVICES` that `name` is part of, or None: that of the present GPU.

    Raises:
        ValueError: no entry, or more than one, fits.
    """
    if name is None:
        present = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        found = [device for device in DEVICES if f" {present}".endswith(f" {device.cuda_name}")]
    else:
        present = repr(name)
        found = [device for device in DEVICES if name.lower() in device.name.lower()]
    if len(found) != 1:
        known = ", ".join(device.name for device in DEVICES)
        raise ValueError(f"explain: device must be one of {known}, or a Device; got {present}")
    return found[0]
