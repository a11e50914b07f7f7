"""The launches that `static` compiles: every operation, forward and backward, at real shapes.

64 rows stand for any number of them: what is compiled depends on the widths alone, but where a
label names another number. Nothing runs, so the inputs hold whatever the memory held.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tritium.bench.compiled._case import Case, Limit, name_of
from tritium.bench.compiled._optimizer_cases import OPTIMIZER_CASES
from tritium.kernels.cross_entropy import cross_entropy
from tritium.kernels.dropout_add import dropout_add
from tritium.kernels.embedding import embedding
from tritium.kernels.geglu import geglu
from tritium.kernels.layer_norm import add_layer_norm, layer_norm
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.kernels.linear_kl_div import linear_kl_div
from tritium.kernels.linear_log_prob import linear_log_prob
from tritium.kernels.linear_topk_kl_div import linear_topk_kl_div
from tritium.kernels.mse_loss import mse_loss
from tritium.kernels.qk_norm_rope import qk_norm_rope
from tritium.kernels.relu_squared import relu_squared
from tritium.kernels.rms_norm import add_rms_norm, rms_norm
from tritium.kernels.rope import rope
from tritium.kernels.softmax import log_softmax, softmax
from tritium.kernels.swiglu import swiglu

T = 64
MANY = 4096  # rows: enough for softmax to give each a program of its own
F32, BF16 = torch.float32, torch.bfloat16


def _label(dtype: torch.dtype, *shape: int, **options: object) -> str:
    named = [f"{key} {value}" for key, value in options.items() if value is not None]
    return ", ".join([f"{name_of(dtype)} {list(shape)}", *named])


def _train(function: Callable, *inputs: Tensor) -> None:
    """Call `function`, and go backward through all that it returns."""
    y = function(*(x.requires_grad_() for x in inputs))
    ys = [y for y in (y if isinstance(y, tuple) else (y,)) if isinstance(y, Tensor)]
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])


def _softmax(dtype: torch.dtype, N: int, M: int = T, function=softmax, **options) -> Case:
    x = torch.empty(M, N, dtype=dtype)
    s = x.element_size()
    plain = N % 16 == 0 and not options.get("causal")
    limits = {
        f"_softmax_{way}_{kind}_kernel": Limit(moved * s, most if plain else math.inf)
        for way, moved, most in (("forward", 2, 22), ("backward", 3, 21))
        for kind in ("tile", "loop")
    }
    label = f"{function.__name__} {_label(dtype, M, N, **options)}"
    wide = N % 16 == 0
    return Case(label, lambda: _train(partial(function, **options), x), wide, limits=limits)


def _norm(dtype: torch.dtype, D: int, function=rms_norm, bias: bool = False) -> Case:
    x = torch.empty(T, D, dtype=dtype)
    vectors = [torch.empty(D, dtype=dtype) for _ in range(1 + bias)]
    label = _label(dtype, T, D, bias=bias or None)
    limits = _norm_limits(function, 2 * x.element_size(), 3 * x.element_size())

    def normalise(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return function(x, weight.shape, weight, *bias)

    return Case(label, lambda: _train(normalise, x, *vectors), D % 16 == 0, limits=limits)


def _add_norm(dtype: torch.dtype, D: int, stream: torch.dtype, function=add_rms_norm) -> Case:
    x, w = torch.empty(T, D, dtype=dtype), torch.empty(D, dtype=dtype)
    residual = torch.empty(T, D, dtype=stream)
    own, other = x.element_size(), residual.element_size()
    # Backward: dy, the residual, its gradient; the gradients of both where they differ in dtype.
    backward = 2 * own + (2 if own == other else 3) * other
    limits = _norm_limits(function, 2 * own + 2 * other, backward)
    label = f"{_label(dtype, T, D)}, residual {name_of(stream)}"
    return Case(label, lambda: _train(function, x, residual, w), limits=limits)


def _norm_limits(function: Callable, forward: int, backward: int) -> dict[str, Limit]:
    most = 20 if function in (rms_norm, add_rms_norm) else 26
    return {
        "_norm_forward_tile_kernel": Limit(forward, most),
        "_norm_forward_loop_kernel": Limit(forward),
        # Through shared memory it takes more of them, and less time (bench/LOG.md).
        "_norm_backward_tile_kernel": Limit(backward, most + 3),
        "_norm_backward_loop_kernel": Limit(backward),
    }


def _rope(dtype: torch.dtype, H: int, K: int, packed: int, **options) -> Case:
    cos, sin = torch.empty(2, T, K // 2)
    x = torch.empty(2, T, packed * H, K, dtype=dtype)

    def rotate(x: Tensor) -> Tensor:
        x = x.clone() if "inplace" in options else x
        return rope(x[:, :, :H], cos, sin, **options)

    named = {key: value for key, value in options.items() if key != "offset"}
    label = f"{_label(dtype, 2, T, H, K, **named)}, one of {packed} in a row"
    label += ", offsets" if "offset" in options else ""
    # Cosines and sines of a position serve all its heads.
    limit = Limit(bytes=2 * x.element_size() + 0.25, instructions=15)
    return Case(label, lambda: _train(rotate, x), limits={"_rope_kernel": limit})


def _qk_norm_rope(dtype: torch.dtype, H: int, G: int, K: int, norm: bool = True, **options) -> Case:
    J = options.pop("J", K // 2)
    cos, sin = torch.empty(2, T, J)
    qkv = torch.empty(2, T, H + 2 * G, K, dtype=dtype)
    weights = [torch.empty(K, dtype=dtype) for _ in range(2 * norm)]

    def turn(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight = weights or (None, None)
        return qk_norm_rope(qkv, cos, sin, q_weight, k_weight, kv_heads=G, **options)

    label = f"{_label(dtype, 2, T, H, K)}, {G} of keys" + ("" if norm else ", no norm")
    label += f", {2 * J} turned" if 2 * J < K else ""
    label += "".join(", offsets" if key == "offset" else f", {key}" for key in options)
    s, angles = qkv.element_size(), 8 * J / K / 4  # four heads share a program's cosines and sines
    limits = {
        "_qk_norm_rope_forward_kernel": Limit(2 * s + angles, instructions=24),
        # Through shared memory Triton 3.8 takes 37 where heads turn in part.
        "_qk_norm_rope_backward_kernel": Limit((3 if norm else 2) * s + angles, instructions=38),
    }
    return Case(label, lambda: _train(turn, qkv, *weights), limits=limits)


def _gated(dtype: torch.dtype, F: int, packed: int, function=swiglu, **options) -> Case:
    gate, up = torch.empty(T, packed * F, dtype=dtype)[:, :F], torch.empty(T, F, dtype=dtype)
    label = f"{_label(dtype, T, F, **options)}, gate one of {packed} in a row"
    name = function.__name__ + ("_tanh" if options.get("approximate") == "tanh" else "")
    most = (24, 32) if function is swiglu else (math.inf, math.inf)
    limits = _activation_limits(name, gate.element_size(), (3, 5), most)
    return Case(label, lambda: _train(partial(function, **options), gate, up), limits=limits)


def _relu_squared(dtype: torch.dtype, F: int) -> Case:
    x = torch.empty(T, F, dtype=dtype)
    limits = _activation_limits("relu_squared", x.element_size(), (2, 3))
    return Case(_label(dtype, T, F), lambda: _train(relu_squared, x), limits=limits)


def _activation_limits(
    name: str, s: int, moved: tuple[int, int], most: tuple[float, float] = (math.inf, math.inf)
) -> dict[str, Limit]:
    ways = zip(("forward", "backward"), moved, most, strict=True)
    return {f"_{name}_{way}_kernel": Limit(n * s, instructions) for way, n, instructions in ways}


def _cross_entropy(dtype: torch.dtype, V: int, target: Tensor | None = None, **options) -> Case:
    logits = torch.empty(T, V, dtype=dtype)
    soft = target is not None
    target = target if soft else torch.zeros(T, dtype=torch.int64)

    def loss(x: Tensor) -> object:
        x = x.view_as(x) if "inplace" in options else x
        return cross_entropy(x, target, **options)

    named = {key: value for key, value in options.items() if key != "weight"}
    label = _label(dtype, T, V, **named) + (f", targets {name_of(target.dtype)}" if soft else "")
    label += ", class weights" if "weight" in options else ""
    plain = not (soft or named.keys() - {"inplace"})
    limits = _loss_limits(logits, soft, 17 if plain else math.inf)
    return Case(label, lambda: _train(loss, logits), limits=limits)


def _linear_cross_entropy(dtype: torch.dtype, V: int, **options) -> Case:
    hidden, weight = torch.empty(T, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype)
    target = torch.zeros(T, dtype=torch.int64)
    label = f"{_label(dtype, T, 64)} × {_label(dtype, V, 64, **options)}"
    loss = partial(linear_cross_entropy, target=target, **options)
    limits = _loss_limits(hidden, False, math.inf if options else 17)
    return Case(label, lambda: _train(loss, hidden, weight), limits=limits)


def _linear_log_prob(dtype: torch.dtype, V: int, **options) -> Case:
    hidden, weight = torch.empty(T, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype)
    target = torch.zeros(T, dtype=torch.int64)
    label = f"{_label(dtype, T, 64)} × {_label(dtype, V, 64, **options)}"
    log_prob = partial(linear_log_prob, target=target, **options)
    limits = {"_log_prob_backward_kernel": Limit(2 * hidden.element_size(), 16)}
    return Case(label, lambda: _train(log_prob, hidden, weight), limits=limits)


def _linear_kl_div(dtype: torch.dtype, V: int, **options) -> Case:
    hidden, weight = torch.empty(T, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype)
    label = f"{_label(dtype, T, 64)} × {_label(dtype, V, 64, **options)}"
    loss = partial(
        linear_kl_div, teacher_input=hidden.clone(), teacher_weight=weight.clone(), **options
    )
    limits = {"_linear_kl_div_kernel": Limit(3 * hidden.element_size())}
    return Case(label, lambda: _train(loss, hidden, weight), limits=limits)


def _linear_topk_kl_div(dtype: torch.dtype, V: int, K: int, **options) -> Case:
    hidden, weight = torch.empty(T, 64, dtype=dtype), torch.empty(V, 64, dtype=dtype)
    label = f"{_label(dtype, T, 64)} × {_label(dtype, V, 64, classes=K, **options)}"
    loss = partial(
        linear_topk_kl_div, indices=torch.zeros(T, K, dtype=torch.int64),
        log_prob=torch.empty(T, K), **options,
    )  # fmt: skip
    limits = {"_linear_topk_kl_div_kernel": Limit(2 * hidden.element_size())}
    return Case(label, lambda: _train(loss, hidden, weight), limits=limits)


def _loss_limits(logits: Tensor, soft: bool, most: float) -> dict[str, Limit]:
    moved = 2 * logits.element_size() + (4 if soft else 0)
    return {"_cross_entropy_kernel": Limit(moved, most), "_mean_loss_kernel": Limit(single=True)}


def _dropout_add(dtype: torch.dtype, stream: torch.dtype) -> Case:
    x, residual = torch.empty(T, 4096, dtype=dtype), torch.empty(T, 4096, dtype=stream)
    label = f"{_label(dtype, T, 4096)}, residual {name_of(stream)}"
    limit = Limit(bytes=x.element_size() + 2 * residual.element_size())
    return Case(
        label, lambda: _train(dropout_add, x, residual), limits={"_dropout_add_kernel": limit}
    )


def _embedding(dtype: torch.dtype, D: int) -> Case:
    tokens, weight = torch.zeros(T, dtype=torch.int64), torch.empty(50304, D, dtype=dtype)
    limit = Limit(bytes=2 * weight.element_size())
    return Case(
        f"{T} of {_label(dtype, 50304, D)}",
        lambda: _train(partial(embedding, tokens), weight),
        limits={"_embedding_forward_kernel": limit},
    )


def _embedding_into_grad(dtype: torch.dtype, D: int) -> Case:
    tokens, dy = torch.zeros(T, dtype=torch.int64), torch.empty(T, D, dtype=dtype)
    weight = torch.empty(50304, D, requires_grad=True)
    weight.grad = torch.empty_like(weight)
    limit = Limit(bytes=weight.element_size() + dtype.itemsize)
    return Case(
        f"{T} of {_label(torch.float32, 50304, D)}, in {name_of(dtype)}, into its gradient",
        lambda: embedding(tokens, weight, dtype=dtype, into_grad=True).backward(dy),
        limits={"_embedding_forward_kernel": limit},
    )


def _mse_loss(dtype: torch.dtype, **options) -> Case:
    x, y = torch.empty(2, T, 4096, dtype=dtype)
    s = x.element_size()
    limits = {
        "_mse_loss_elements_kernel": Limit(bytes=2 * s + 4),
        "_mse_loss_partials_kernel": Limit(bytes=2 * s),
        "_mse_loss_sum_kernel": Limit(single=True),
        "_mse_loss_backward_kernel": Limit(bytes=4 * s + (4 if options else 0)),
    }
    label = _label(dtype, T, 4096, **options)
    return Case(label, lambda: _train(partial(mse_loss, **options), x, y), limits=limits)


CASES: dict[str, Callable[[], list[Case]]] = {
    "softmax": lambda: [
        *(_softmax(BF16, N) for N in (128, 1024, 4096, 16384)),
        *(_softmax(F32, N) for N in (128, 4096, 16384)),
        *(_softmax(dtype, N, MANY) for dtype in (BF16, F32) for N in (50257, 50304, 131072)),
        *(_softmax(dtype, 131072) for dtype in (BF16, F32)),
        *(_softmax(dtype, 4096, causal=True) for dtype in (F32, BF16)),
        *(_softmax(BF16, N, MANY, return_lse=True) for N in (4096, 50304)),
        *(_softmax(BF16, N, MANY, log_softmax) for N in (4096, 50304)),
    ],
    "rms_norm": lambda: [
        *(_norm(BF16, D) for D in (64, 128, 768, 2048, 4096, 4097, 8192, 16384, 65536)),
        *(_norm(F32, D) for D in (64, 768, 4096, 4097, 8192, 65536)),
    ],
    "add_rms_norm": lambda: [
        *(_add_norm(BF16, D, BF16) for D in (768, 2048, 4096, 16384)),
        *(_add_norm(dtype, D, F32) for dtype in (BF16, F32) for D in (768, 4096)),
    ],
    "layer_norm": lambda: [
        *(_norm(BF16, D, layer_norm) for D in (768, 4096, 8192)),
        *(_norm(BF16, D, layer_norm, bias=True) for D in (64, 768, 4096, 4097, 8192, 65536)),
        *(_norm(F32, D, layer_norm, bias=True) for D in (768, 8192, 65536)),
    ],
    "add_layer_norm": lambda: [
        *(_add_norm(BF16, D, BF16, add_layer_norm) for D in (768, 4096)),
        *(_add_norm(dtype, 4096, F32, add_layer_norm) for dtype in (BF16, F32)),
    ],
    "rope": lambda: [
        *(
            _rope(dtype, *shape)
            for dtype in (F32, BF16)
            for shape in ((12, 64, 1), (12, 64, 3), (32, 128, 1))
        ),
        _rope(BF16, 32, 128, 2, inplace=True),
        _rope(BF16, 32, 128, 1, offset=torch.zeros(2, dtype=torch.int64)),
    ],
    "qk_norm_rope": lambda: [
        *(_qk_norm_rope(dtype, 12, 12, 64) for dtype in (F32, BF16)),
        *(_qk_norm_rope(dtype, 32, 8, 128) for dtype in (F32, BF16)),
        _qk_norm_rope(BF16, 32, 8, 128, interleaved=True),
        _qk_norm_rope(BF16, 32, 8, 128, offset=torch.zeros(2, dtype=torch.int64)),
        _qk_norm_rope(BF16, 12, 12, 64, J=16),
        _qk_norm_rope(BF16, 32, 8, 128, J=32),
        *(_qk_norm_rope(BF16, H, G, K, norm=False) for H, G, K in ((12, 12, 64), (32, 8, 128))),
    ],
    "swiglu": lambda: [
        _gated(dtype, F, packed)
        for dtype in (F32, BF16)
        for F in (2048, 11008)
        for packed in (1, 2)
    ],
    "geglu": lambda: [
        _gated(dtype, 2048, 2, geglu, approximate=approximate)
        for dtype in (F32, BF16)
        for approximate in ("none", "tanh")
    ],
    "relu_squared": lambda: [_relu_squared(dtype, 8192) for dtype in (F32, BF16)],
    "cross_entropy": lambda: [
        *(_cross_entropy(dtype, V) for dtype in (F32, BF16) for V in (50304, 50257)),
        _cross_entropy(BF16, 128256),
        *(_cross_entropy(BF16, V, inplace=True) for V in (50304, 50257, 128256)),
        _cross_entropy(BF16, 50304, softcap=30.0, z_loss=1e-4),
        _cross_entropy(BF16, 50304, label_smoothing=0.1, weight=torch.empty(50304)),
        _cross_entropy(BF16, 50304, logit_scale=0.5, return_stats=True),
        _cross_entropy(BF16, 50304, torch.empty(T, 50304)),
    ],
    "linear_cross_entropy": lambda: [
        *(_linear_cross_entropy(dtype, V) for dtype in (F32, BF16) for V in (50304, 50257)),
        _linear_cross_entropy(BF16, 50304, return_stats=True),
    ],
    "linear_log_prob": lambda: [
        *(_linear_log_prob(dtype, 50257) for dtype in (F32, BF16)),
        _linear_log_prob(BF16, 128256, return_entropy=True),
    ],
    "linear_kl_div": lambda: [
        *(_linear_kl_div(dtype, 50257) for dtype in (F32, BF16)),
        _linear_kl_div(BF16, 128256, beta=0.5),
    ],
    "linear_topk_kl_div": lambda: [_linear_topk_kl_div(BF16, 128256, 64, tail=True)],
    "dropout_add": lambda: [
        _dropout_add(*dtypes) for dtypes in ((F32, F32), (BF16, F32), (BF16, BF16))
    ],
    "embedding": lambda: [
        *(_embedding(dtype, D) for dtype in (F32, BF16) for D in (768, 4096)),
        _embedding_into_grad(BF16, 768),
    ],
    "mse_loss": lambda: [
        *(_mse_loss(dtype) for dtype in (F32, BF16)),
        _mse_loss(BF16, reduction="none"),
    ],
} | OPTIMIZER_CASES
