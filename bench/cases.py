"""The launches that `static` compiles: every operation, forward and backward, at real shapes.

64 rows stand for any number of them: what is compiled depends on the widths alone. Nothing runs, so
the inputs hold whatever the memory held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.adamw import AdamW
from kernels.cross_entropy import cross_entropy
from kernels.grad_norm import clip_grad_norm_
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.softmax import log_softmax, softmax
from kernels.swiglu import swiglu

T = 64
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One way to call an operation, and what its machine code may look like."""

    label: str
    launch: Callable[[], object]
    wide: bool = True
    """Every row starts at a multiple of 16 elements: large tiles must move 16 bytes per thread."""
    exempt: tuple[str, ...] = ()
    """Kernels of a single program, which may compute in float64 and move as little as they like."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _train(function: Callable, *inputs: Tensor) -> None:
    """Call `function`, and go backward through all that it returns."""
    y = function(*(x.requires_grad_() for x in inputs))
    ys = y if isinstance(y, tuple) else (y,)
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def _softmax(dtype: torch.dtype, N: int, function=softmax, **options) -> Case:
    label = f"{function.__name__} {_name(dtype)} [{T}, {N}] {options or ''}"
    x = torch.empty(T, N, dtype=dtype)
    return Case(label, lambda: _train(partial(function, **options), x), wide=N % 16 == 0)


def _rms_norm(dtype: torch.dtype, D: int) -> Case:
    x, w = torch.empty(T, D, dtype=dtype), torch.empty(D, dtype=dtype)
    return Case(f"{_name(dtype)} [{T}, {D}]", lambda: _train(rms_norm, x, w), wide=D % 16 == 0)


def _add_rms_norm(dtype: torch.dtype, D: int, stream: torch.dtype) -> Case:
    x, w = torch.empty(T, D, dtype=dtype), torch.empty(D, dtype=dtype)
    residual = torch.empty(T, D, dtype=stream)
    label = f"{_name(dtype)} [{T}, {D}], residual {_name(stream)}"
    return Case(label, lambda: _train(add_rms_norm, x, residual, w))


def _rope(dtype: torch.dtype, H: int, K: int, packed: int) -> Case:
    cos, sin = torch.empty(2, T, K // 2)
    x = torch.empty(2, T, packed * H, K, dtype=dtype)[:, :, :H]
    label = f"{_name(dtype)} [2, {T}, {H}, {K}], one of {packed} in a row"
    return Case(label, lambda: _train(lambda x: rope(x, cos, sin), x))


def _swiglu(dtype: torch.dtype, F: int, packed: int) -> Case:
    gate, up = torch.empty(T, packed * F, dtype=dtype)[:, :F], torch.empty(T, F, dtype=dtype)
    label = f"{_name(dtype)} [{T}, {F}], gate one of {packed} in a row"
    return Case(label, lambda: _train(swiglu, gate, up))


def _cross_entropy(dtype: torch.dtype, V: int, **options) -> Case:
    logits, target = torch.empty(T, V, dtype=dtype), torch.zeros(T, dtype=torch.int64)

    def loss(x: Tensor) -> Tensor:
        x = x.view_as(x) if "inplace" in options else x
        return cross_entropy(x, target, **options)

    named = {key: value for key, value in options.items() if key != "weight"}
    label = f"{_name(dtype)} [{T}, {V}] {named or ''}"
    return Case(label, lambda: _train(loss, logits), wide=V % 16 == 0)


def _linear_cross_entropy(dtype: torch.dtype, V: int) -> Case:
    hidden, weight = torch.empty(T, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype)
    target = torch.zeros(T, dtype=torch.int64)
    label = f"{_name(dtype)} [{T}, 64] × [{V}, 64]"
    loss = partial(linear_cross_entropy, target=target)
    return Case(label, lambda: _train(loss, hidden, weight))


def _parameters(dtype: torch.dtype) -> list[Tensor]:
    parameters = [torch.empty(size, dtype=dtype) for size in (768, 4097, 100_000)]
    for p in parameters:
        p.grad = torch.empty_like(p)
    return parameters


def _adamw(max_grad_norm: float | None) -> Case:
    step = AdamW(_parameters(F32), max_grad_norm=max_grad_norm).step
    return Case(f"float32, max_grad_norm {max_grad_norm}", step, exempt=("_adamw_prepare_kernel",))


def _clip_grad_norm_() -> Case:
    parameters = [*_parameters(F32), *_parameters(BF16), *_parameters(torch.float16)]
    return Case("float32, bfloat16, float16", lambda: clip_grad_norm_(parameters, 1.0))


CASES: dict[str, Callable[[], list[Case]]] = {
    "softmax": lambda: [
        *(_softmax(BF16, N) for N in (128, 1024, 4096, 16384, 50257, 50304, 131072)),
        *(_softmax(F32, N) for N in (128, 4096, 16384, 50304)),
        *(_softmax(dtype, 4096, causal=True) for dtype in (F32, BF16)),
        *(_softmax(BF16, N, log_softmax) for N in (4096, 50304)),
    ],
    "rms_norm": lambda: [
        *(_rms_norm(BF16, D) for D in (64, 128, 768, 2048, 4096, 4097, 8192)),
        *(_rms_norm(F32, D) for D in (64, 768, 4096, 4097, 8192)),
    ],
    "add_rms_norm": lambda: [
        *(_add_rms_norm(BF16, D, BF16) for D in (768, 2048, 4096)),
        *(_add_rms_norm(dtype, D, F32) for dtype in (BF16, F32) for D in (768, 4096)),
    ],
    "rope": lambda: [
        _rope(dtype, *shape)
        for dtype in (F32, BF16)
        for shape in ((12, 64, 1), (12, 64, 3), (32, 128, 1))
    ],
    "swiglu": lambda: [
        _swiglu(dtype, F, packed)
        for dtype in (F32, BF16)
        for F in (2048, 11008)
        for packed in (1, 2)
    ],
    "cross_entropy": lambda: [
        *(_cross_entropy(dtype, V) for dtype in (F32, BF16) for V in (50304, 50257)),
        _cross_entropy(BF16, 128256),
        _cross_entropy(BF16, 50304, inplace=True),
        _cross_entropy(BF16, 50304, softcap=30.0, z_loss=1e-4),
        _cross_entropy(BF16, 50304, label_smoothing=0.1, weight=torch.empty(50304)),
    ],
    "linear_cross_entropy": lambda: [
        _linear_cross_entropy(dtype, V) for dtype in (F32, BF16) for V in (50304, 50257)
    ],
    "AdamW": lambda: [_adamw(None), _adamw(1.0)],
    "clip_grad_norm_": lambda: [_clip_grad_norm_()],
}
