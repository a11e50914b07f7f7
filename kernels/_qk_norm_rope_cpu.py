"""Backward of `qk_norm_rope` on a CPU, by PyTorch's operators; its docstring has the formulas."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels._cpu_backward import differentiate
from tritium.kernels.rope import _rows
from tritium.kernels.runtime import refuse_batched, widen

Packed = tuple[Tensor, Tensor, Tensor]


def side_by_side(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float, G: int, offset: int | Tensor, interleaved: bool,
) -> tuple[Packed, Tensor | None, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return the results, the roots of the norm and the angles; no graph can be made of it."""
    H, z, r = qkv.shape[-2] - 2 * G, widen(qkv[..., :-G, :]), None
    w_NK = _scales(q_weight, k_weight, H, G, z.dtype)
    if w_NK is not None:
        r = z.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        z = (z * r).mul_(w_NK)
    angles = _wide_angles(cos, sin, z, offset, interleaved)
    y = _turn(z, *angles, interleaved, z.new_empty(z.shape)).to(qkv.dtype)
    return (y[..., :H, :], y[..., H:, :], qkv[..., -G:, :]), r, angles


class HandWritten(torch.autograd.Function):
    """`reference` with a hand-written backward.

    Queries and keys go through every operator side by side, their gradients in one tensor.
    """

    @staticmethod
    def forward(
        ctx, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
        sin: Tensor, eps: float, G: int, offset: int | Tensor, interleaved: bool,
        reference: Callable,
    ) -> Packed:  # fmt: skip
        found, r, angles = side_by_side(
            qkv, q_weight, k_weight, cos, sin, eps, G, offset, interleaved
        )
        ctx.save_for_backward(qkv, q_weight, k_weight, r, *angles)
        ctx.heads, ctx.interleaved = (qkv.shape[-2] - 2 * G, G), interleaved
        ctx.define = partial(
            _of_three, reference, cos=cos, sin=sin, eps=eps, kv_heads=G, offset=offset,
            interleaved=interleaved,
        )  # fmt: skip
        return found

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        refuse_batched(dq, dk, dv)
        qkv, *weights, r, cos, sin = ctx.saved_tensors
        wanted, nothing = ctx.needs_input_grad[:3], (None,) * 7
        if torch.is_grad_enabled():
            inputs = (qkv, *weights)
            return *differentiate(ctx.define, inputs, wanted, (dq, dk, dv)), *nothing
        H, G = ctx.heads
        dqkv = qkv.new_empty(qkv.shape)
        dqkv[..., -G:, :] = dv
        x = widen(qkv[..., :-G, :])
        g = dqkv[..., :-G, :] if qkv.dtype == x.dtype else x.new_empty(x.shape)
        _turn(widen(dq), cos, -sin, ctx.interleaved, g[..., :H, :])
        _turn(widen(dk), cos, -sin, ctx.interleaved, g[..., H:, :])
        sums = [None, None]
        w_NK = _scales(*weights, H, G, x.dtype)
        if w_NK is not None:
            normed = x * r
            gz = g * normed
            dw_NK = gz.flatten(0, -3).sum(0)
            sums = [dw_NK[:H].sum(0).to(w_NK.dtype), dw_NK[H:].sum(0).to(w_NK.dtype)]
            mean = gz.mul_(w_NK).mean(-1, keepdim=True)
            g.mul_(w_NK).addcmul_(normed, mean, value=-1).mul_(r)
        if qkv.dtype != x.dtype:
            dqkv[..., :-G, :] = g
        return dqkv, *sums, *nothing


def _of_three(
    reference: Callable, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor, sin: Tensor, **how,
) -> Packed:  # fmt: skip
    return reference(qkv, cos, sin, q_weight, k_weight, **how)


def _scales(
    q_weight: Tensor | None, k_weight: Tensor | None, H: int, G: int, dtype: torch.dtype
) -> Tensor | None:
    """Return the weights of each head of the queries and keys, `[H + G, K]`."""
    if q_weight is None or k_weight is None:
        return None
    return torch.cat([w.to(dtype).expand(n, -1) for w, n in ((q_weight, H), (k_weight, G))])


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, y: Tensor) -> Tensor:
    """Write `x`, its pairs turned, into `y`, and return that; `cos` is 1 behind the pairs."""
    J = sin.shape[-1]
    (x1, x2), (y1, y2) = (
        (z[..., : 2 * J : 2], z[..., 1 : 2 * J : 2])
        if interleaved
        else z[..., : 2 * J].chunk(2, -1)
        for z in (x, y)
    )
    torch.mul(x, cos, out=y)
    y1.addcmul_(x2, sin, value=-1)
    y2.addcmul_(x1, sin)
    return y


def _wide_angles(
    cos: Tensor, sin: Tensor, x: Tensor, offset: int | Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of `_turn`: `[..., L, 1, K]` and `[..., L, 1, J]`, in the dtype of `x`."""
    cos, sin = (_rows(table.to(x.dtype), x.shape[-3], offset).unsqueeze(-2) for table in (cos, sin))
    cos = cos.repeat_interleave(2, -1) if interleaved else torch.cat([cos, cos], -1)
    return F.pad(cos, (0, x.shape[-1] - cos.shape[-1]), value=1.0), sin
