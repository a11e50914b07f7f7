"""Normalised queries and keys at rotary positions, from one packed projection.

    x_N  = the heads of the projection: H queries, G keys, G values, each of K features
    r_N  = 1 / sqrt(mean_K(x_N²) + eps)           queries and keys; without weights r = w = 1
    z_N  = x_N · r_N · w                          w = q_weight or k_weight
    y1_N = z1_N · cos - z2_N · sin                the first J pairs of features, as in `rope`;
    y2_N = z2_N · cos + z1_N · sin                behind them y = z

Values stay as they are: a view of the projection. Backward rotates dy back to g, and writes the
gradient of the whole projection into one tensor, the values' part copied by the same kernel:

    dx_N = r_N · (g_N · w - x_N · r_N² · mean_K(g_N · w · x_N))
    dw   = sum over all heads that w scales of (g_N · x_N · r_N)

r_N is recomputed from the projection, which backward reads anyway.

B batch (every axis before L, flattened), L sequence, N = H + 2G heads, K head width, J pairs,
R = K - 2J features behind them, S rows of the tables, P programs that share the heads in backward.

Henry et al., "Query-Key Normalization for Transformers", 2020. https://arxiv.org/abs/2010.04245
Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
https://arxiv.org/abs/2104.09864
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritium.kernels._cpu_backward import needs_no_graph, uses_cpu_backward
from tritium.kernels._qk_norm_rope_cpu import HandWritten, Packed, side_by_side
from tritium.kernels._qk_norm_rope_kernels import (
    _qk_norm_rope_backward_kernel,
    _qk_norm_rope_forward_kernel,
    _qk_norm_rope_weights_kernel,
)
from tritium.kernels.launcher import Launcher, Plan, dtype_of, planned
from tritium.kernels.rms_norm import rms_norm_reference
from tritium.kernels.rope import _heads, _rows, rope_reference, validate_tables
from tritium.kernels.runtime import (
    accumulator,
    apply,
    cdiv,
    once_differentiable,
    operator,
    power_of_2,
    uses_triton,
    widen,
)

FORWARD_TILE = 4096  # elements per program
BACKWARD_TILE = 2048  # and as many sums in registers
STAGES = 3  # of the backward's loads, of 16 bits: two blocks are on their way while one is computed
BLOCK_N = 4  # heads of a position that share a program's cosines and sines
P_MAX = 792  # not the number of multiprocessors: weight gradients are the same on every GPU


def qk_norm_rope_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    kv_heads: int | None = None,
    offset: int | Tensor = 0,
    interleaved: bool = False,
) -> Packed:
    """Compute `qk_norm_rope` in plain PyTorch, in float32 (float64 for float64 `qkv`)."""

    G = _kv_heads(qkv, kv_heads)
    H, J, v = qkv.shape[-2] - 2 * G, cos.shape[1], qkv[..., -G:, :]
    z = widen(qkv[..., :-G, :])
    if q_weight is not None and k_weight is not None:
        parts = (z[..., :H, :], q_weight), (z[..., H:, :], k_weight)
        z = torch.cat([rms_norm_reference(x, w.shape, w, eps) for x, w in parts], -2)
    y = rope_reference(z[..., : 2 * J], cos, sin, offset=offset, interleaved=interleaved)
    y = torch.cat([y, z[..., 2 * J :]], -1) if z.shape[-1] > 2 * J else y
    q, k = y.to(qkv.dtype).split([H, G], -2)
    return q, k, v


def _kv_heads(qkv: Tensor, kv_heads: int | None) -> int:
    return qkv.shape[-2] // 3 if kv_heads is None else kv_heads


def _tile(elements: int, block_N: int, K: int, J: int) -> tuple[int, int, int, int]:
    """The constants BLOCK_L, BLOCK_N, BLOCK_J and BLOCK_R."""
    rest = K - 2 * J
    block_R = power_of_2(rest) if rest else 0
    return max(1, elements // (block_N * power_of_2(K))), block_N, power_of_2(J), block_R


_launch_turn = Launcher(_qk_norm_rope_forward_kernel)
_launch_back = Launcher(_qk_norm_rope_backward_kernel)
_launch_weights = Launcher(_qk_norm_rope_weights_kernel)


@planned
def _plan_forward(
    shape: torch.Size, strides: tuple[int, ...], G: int, angles: torch.Size,
    dtypes: tuple[torch.dtype | None, ...], eps: float, interleaved: bool, elements: int,
    block_N: int,
) -> Plan:  # fmt: skip
    (B, L, N, K), (S, J) = shape, angles
    H, tile = N - 2 * G, _tile(elements, block_N, K, J)
    tiles = cdiv(H, block_N) + cdiv(G, block_N)
    return Plan(
        (tiles * B * cdiv(L, tile[0]),), (L, H, G, J, K, S, *strides[:3]),
        (float(eps), interleaved, *tile, accumulator(dtypes[0])),
    )  # fmt: skip


def _launch_forward(
    qkv_BLNK: Tensor, cos_SJ: Tensor, sin_SJ: Tensor, offset_B: Tensor | None,
    q_weight_K: Tensor | None, k_weight_K: Tensor | None, eps: float, G: int, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, L, N, K = shape = qkv_BLNK.shape
    q_BLHK, k_BLGK = qkv_BLNK.new_empty(B, L, N - 2 * G, K), qkv_BLNK.new_empty(B, L, G, K)
    plan = _plan_forward(
        shape, qkv_BLNK.stride(), G, cos_SJ.shape,
        (qkv_BLNK.dtype, *map(dtype_of, (cos_SJ, sin_SJ, offset_B, q_weight_K, k_weight_K))),
        eps, interleaved,
        FORWARD_TILE, BLOCK_N,
    )  # fmt: skip
    _launch_turn.launch(
        plan, qkv_BLNK, cos_SJ, sin_SJ, offset_B, q_weight_K, k_weight_K, q_BLHK, k_BLGK
    )
    return q_BLHK, k_BLGK


class _BackwardPlan(NamedTuple):
    shares: int
    """Rows of the partial sums of the weights' gradients."""
    dtype: torch.dtype
    """Dtype of these sums."""
    back: Plan
    weights: Plan


@planned
def _plan_backward(
    shape: torch.Size, strides: tuple[tuple[int, ...], ...], G: int, angles: torch.Size,
    dtypes: tuple[torch.dtype | None, ...], eps: float, interleaved: bool, elements: int,
    block_N: int, p_max: int, stages: int,
) -> _BackwardPlan:  # fmt: skip
    """Plan the launches for dq, dk, dv and the projection, where there is one, of these strides."""
    (B, L, H, K), (S, J) = shape, angles
    tile = _tile(elements, block_N, K, J)
    q_tiles, k_tiles = cdiv(H, block_N), cdiv(G, block_N)
    tiles, blocks = q_tiles + 2 * k_tiles, B * cdiv(L, tile[0])
    shares = blocks if dtypes[-1] is None else max(1, min(blocks, p_max // tiles))
    back = Plan(
        (tiles * shares,),
        (blocks, L, H, G, J, K, S, *(n for each in strides for n in (each or (0, 0, 0))[:3])),
        (float(eps), interleaved, *tile, power_of_2(K), accumulator(dtypes[0]), stages),
    )  # fmt: skip
    weights = Plan(
        (cdiv(K, 16), 2), (tiles * shares, K, q_tiles, k_tiles), (512, 16), num_warps=8
    )  # fmt: skip
    wide = torch.promote_types(dtypes[0] or torch.float32, torch.float32)
    return _BackwardPlan(tiles * shares, wide, back, weights)


def _launch_backward(
    dq_BLHK: Tensor, dk_BLGK: Tensor, dv_BLGK: Tensor, qkv_BLNK: Tensor | None, cos_SJ: Tensor,
    sin_SJ: Tensor, offset_B: Tensor | None, q_weight_K: Tensor | None, k_weight_K: Tensor | None,
    eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    inputs = dq_BLHK, dk_BLGK, dv_BLGK, qkv_BLNK, cos_SJ, sin_SJ, offset_B, q_weight_K, k_weight_K
    dqkv_BLNK, dq_weight_K, dk_weight_K = _empty_backward(*inputs, eps, interleaved)
    strides = (
        dq_BLHK.stride(), dk_BLGK.stride(), dv_BLGK.stride(),
        () if qkv_BLNK is None else qkv_BLNK.stride(),
    )  # fmt: skip
    plan = _plan_backward(
        dq_BLHK.shape, strides, dk_BLGK.shape[2], cos_SJ.shape, (*map(dtype_of, inputs),), eps,
        interleaved, BACKWARD_TILE, BLOCK_N, P_MAX, STAGES if dq_BLHK.element_size() == 2 else 1,
    )  # fmt: skip
    partials_PK = None
    if q_weight_K is not None:
        partials_PK = dq_BLHK.new_empty(plan.shares, dq_BLHK.shape[3], dtype=plan.dtype)
    _launch_back.launch(plan.back, *inputs, dqkv_BLNK, partials_PK)
    if partials_PK is not None:
        _launch_weights.launch(plan.weights, partials_PK, dq_weight_K, dk_weight_K)
    return dqkv_BLNK, dq_weight_K, dk_weight_K


def _fake_forward(qkv: Tensor, *args) -> tuple[Tensor, Tensor]:
    *_, G, _ = args
    B, L, N, K = qkv.shape
    return qkv.new_empty(B, L, N - 2 * G, K), qkv.new_empty(B, L, G, K)


# Those that are not needed are None.
def _empty_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    offset: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    B, L, H, K = dq.shape
    dqkv = dq.new_empty(B, L, H + 2 * dk.shape[2], K)
    if q_weight is None or k_weight is None:
        return dqkv, None, None
    return dqkv, torch.empty_like(q_weight), torch.empty_like(k_weight)


_forward = operator(
    "qk_norm_rope_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor? offset, Tensor? q_weight,"
    " Tensor? k_weight, float eps, int kv_heads, bool interleaved) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    incoming=6,
)
_backward = operator(
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor cos, Tensor sin,"
    " Tensor? offset, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _empty_backward,
    incoming=3,
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv: Tensor, q_weight_K: Tensor | None, k_weight_K: Tensor | None, cos_SJ: Tensor,
        sin_SJ: Tensor, offset_B: Tensor | None, eps: float, G: int, interleaved: bool,
    ) -> Packed:  # fmt: skip
        angles, weights = (cos_SJ, sin_SJ, offset_B), (q_weight_K, k_weight_K)
        q_BLHK, k_BLGK = _forward(_heads(qkv), *angles, *weights, eps, G, interleaved)
        ctx.save_for_backward(None if q_weight_K is None else qkv, *angles, *weights)
        ctx.options = eps, interleaved
        v = qkv.narrow(-2, -G, G)
        if qkv.ndim == 4:
            ctx.shape = None
            return q_BLHK, k_BLGK, v
        ctx.shape = qkv.shape
        q, k = (x.view(*qkv.shape[:-2], *x.shape[2:]) for x in (q_BLHK, k_BLGK))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        qkv, *arguments = ctx.saved_tensors
        qkv_BLNK = None if qkv is None else _heads(qkv)
        dqkv_BLNK, *sums_K = _backward(*map(_heads, grads), qkv_BLNK, *arguments, *ctx.options)
        sums_K = [
            x if needs else None for needs, x in zip(ctx.needs_input_grad[1:3], sums_K, strict=True)
        ]
        dqkv = dqkv_BLNK if ctx.shape is None else dqkv_BLNK.view(ctx.shape)
        return dqkv, *sums_K, None, None, None, None, None, None


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    kv_heads: int | None = None,
    offset: int | Tensor = 0,
    interleaved: bool = False,
) -> Packed:
    """Normalise and rotate the queries and keys of a packed projection, head by head.

    Equal to `rms_norm`, then `rope`, of queries and of keys, without rounding in between. The
    gradient of the projection comes in one tensor, that of the values included. Gradients of the
    weights are summed in a fixed order: bitwise the same on every run.

    Args:
        qkv: `[..., L, H + 2G, K]`: H query heads, then G key heads, then G value heads; float32,
            float16, bfloat16 or float64. Read where it is: copied only if its last axis is not
            contiguous or the axes before L do not flatten into one. So are the gradients of the
            results.
        cos: `[S, J]`, float32 or float64, 1 <= J <= K/2, S >= offset + L: cosines of the angles,
            row s for position s. The 2J first features of a head are rotated; those behind them
            are normalised alone. Takes no gradient.
        sin: as `cos`, the sines.
        q_weight: `[K]`, scales the normalised queries; any of the same dtypes. None: neither
            queries nor keys are normalised.
        k_weight: as `q_weight`, in its dtype, of the keys.
        eps: added to the mean square before the root, in units of `qkv`².
        kv_heads: G. None: as many as query heads, a third of all.
        offset: position of the first of the L elements: one number, or an integer tensor of the
            axes before L, on the device of `qkv`, for sequences that begin at different positions.
            The tensor is not read on the host: a position outside the tables gives NaN.
        interleaved: rotate the pairs (2k, 2k + 1) instead of (k, k + J).

    Returns:
        Queries `[..., L, H, K]`, keys and values `[..., L, G, K]`, in the dtype of `qkv`, also
        under autocast. Computed in float32 (float64 for float64) and rounded once. The values are
        a view of `qkv`.

    Raises:
        ValueError: `qkv` has fewer than 3 axes or is not floating point; `kv_heads` leaves no
            query heads; one weight is None alone, or is not `[K]`, not floating point, of another
            dtype than the other's or on another device; `cos` or `sin` is not `[S, J]`, too short,
            of another dtype, on another device, or requires a gradient; `offset` is negative, or
            not an integer tensor of the axes before L on the device of `qkv`.
    """
    _validate(qkv, q_weight, k_weight, kv_heads)
    validate_tables("qk_norm_rope", qkv, offset, cos=cos, sin=sin)
    G = _kv_heads(qkv, kv_heads)
    if not uses_triton(qkv, "qk_norm_rope"):
        weights = [w for w in (q_weight, k_weight) if w is not None]
        if uses_cpu_backward(qkv, *weights):
            return HandWritten.apply(
                qkv, q_weight, k_weight, cos, sin, eps, G, offset, interleaved,
                qk_norm_rope_reference,
            )  # fmt: skip
        if needs_no_graph(qkv, *weights):
            return side_by_side(qkv, q_weight, k_weight, cos, sin, eps, G, offset, interleaved)[0]
        return qk_norm_rope_reference(
            qkv, cos, sin, q_weight, k_weight, eps,
            kv_heads=G, offset=offset, interleaved=interleaved,
        )  # fmt: skip
    if isinstance(offset, int):
        if offset:
            cos, sin = (_rows(table, qkv.shape[-3], offset) for table in (cos, sin))
        offset_B = None
    else:
        offset_B = offset.reshape(-1).contiguous()
    q_weight_K, k_weight_K = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
    angles = cos.contiguous(), sin.contiguous(), offset_B
    return apply(_QkNormRope, qkv, q_weight_K, k_weight_K, *angles, eps, G, interleaved)


def _validate(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, kv_heads: int | None
) -> None:
    if qkv.ndim < 3 or not qkv.is_floating_point():
        raise ValueError(
            f"qk_norm_rope: qkv must be floating point [..., L, H + 2G, K], "
            f"got {qkv.dtype} {list(qkv.shape)}"
        )
    N, K = qkv.shape[-2:]
    if kv_heads is None and (N % 3 or not N):
        raise ValueError(
            f"qk_norm_rope: without kv_heads a third of the heads are queries, got {N} heads; "
            "pass kv_heads"
        )
    if kv_heads is not None and not 1 <= kv_heads <= (N - 1) // 2:
        raise ValueError(
            f"qk_norm_rope: kv_heads must be in [1, {(N - 1) // 2}], as qkv has {N} heads of "
            f"queries, keys and values; got {kv_heads}"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("qk_norm_rope: q_weight and k_weight must both be given, or both be None")
    if q_weight is None or k_weight is None or (
        q_weight.shape == k_weight.shape == (K,) and q_weight.dtype == k_weight.dtype
        and q_weight.device == k_weight.device == qkv.device and q_weight.is_floating_point()
    ):  # fmt: skip
        return
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w.shape != (K,):
            raise ValueError(f"qk_norm_rope: {name} must have shape [{K}], got {list(w.shape)}")
        if w.device != qkv.device:
            raise ValueError(
                f"qk_norm_rope: {name} must be on {qkv.device}, got {w.device}; move it"
            )
        if not w.is_floating_point():
            raise ValueError(
                f"qk_norm_rope: {name} must be floating point, got {w.dtype}; convert it"
            )
        if w.dtype != q_weight.dtype:
            raise ValueError(
                f"qk_norm_rope: q_weight and k_weight must have one dtype, got {q_weight.dtype} "
                f"and {w.dtype}; convert one"
            )
