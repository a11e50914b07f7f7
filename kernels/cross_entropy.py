"""Cross-entropy of logits against class indices.

With z_TV = logits, or softcap · tanh(logits / softcap), target class t, class weights w_V (ones if
absent) and ε the label smoothing:

    lse_T  = log(sum_V(exp(z_TV)))
    loss_T = (1 - ε) · w_t · (lse - z_t) + ε/V · sum_V(w_V · (lse - z_V)) + z_loss · w_t · lse²

and 0 where the target is `ignore_index`. "mean" divides the sum of loss_T by the sum of w_t over
the targets that count. Backward, with p_TV = exp(z_TV - lse_T):

    dz_TV = p_TV · ((1 - ε) · w_t + ε/V · sum_V(w_V) + 2 · z_loss · w_t · lse_T)
            - ε/V · w_V - [V = t] · (1 - ε) · w_t
    dlogits_TV = dloss_T · dz_TV · (1 - (z_TV / softcap)²)

T tokens, V classes. One program serves one row: a first pass keeps a running maximum and sum for
every few lanes of a thread, so that its loop holds no barrier; a second pass writes the gradient.
Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.
https://arxiv.org/abs/1805.02867; the z-loss: de Brébisson & Vincent, "The Z-loss", 2016,
https://arxiv.org/abs/1604.08859.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import accumulator, once_differentiable, operator, unit_stride, uses_triton
from ._token_loss import (
    SCHEMA,
    Options,
    check_class_weight,
    check_options,
    check_target,
    reduce,
    token_weights,
)


def cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition of `cross_entropy` on `[T, V]`, in float32 or the wider dtype of `logits`."""
    z_TV = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        z_TV = softcap * torch.tanh(z_TV / softcap)
    w_V = None if weight is None else weight.to(z_TV)
    loss_T = F.cross_entropy(
        z_TV, target, w_V, ignore_index=ignore_index, reduction="none",
        label_smoothing=label_smoothing,
    )  # fmt: skip
    if z_loss:
        w_T = token_weights(target, w_V, ignore_index, z_TV.dtype)
        loss_T = loss_T + z_loss * w_T * z_TV.logsumexp(-1).square()
    return reduce(loss_T, target, w_V, ignore_index, reduction)


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum that is never -inf, so m - m is never nan


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    if SOFTCAP:
        # tanh(u) by exp2 of a non-positive number, which cannot overflow; near 0, where 1 - e
        # cancels, by its series.
        u = tl.abs(x) / softcap
        e = tl.exp2(u * -LOG2_E * 2)
        u2 = u * u
        series = 1 - u2 * (1 / 3 - u2 * (2 / 15 - u2 * (17 / 315 - u2 * (62 / 2835))))
        near = u < (0.25 if ACC is tl.float32 else 0.001)
        z = softcap * tl.where(near, u * series, (1 - e) / (1 + e))
        x = tl.where(x < 0, -z, z)
    return x


@triton.jit
def _tile(
    x_ptr, offs_V, V, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    if MASKED:
        x_V = tl.load(x_ptr + offs_V, mask=offs_V < V, other=0.0).to(ACC)
        # Mask after the cap: a padded lane would otherwise come out as -softcap and be summed.
        z_V = tl.where(offs_V < V, _capped(x_V, softcap, SOFTCAP, ACC), float("-inf"))
    else:
        z_V = _capped(tl.load(x_ptr + offs_V).to(ACC), softcap, SOFTCAP, ACC)
    return z_V


@triton.jit
def _class_weights(w_ptr, offs_V, V, MASKED: tl.constexpr, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    if WEIGHT:
        if MASKED:
            return tl.load(w_ptr + offs_V, mask=offs_V < V, other=0.0).to(ACC)
        else:
            return tl.load(w_ptr + offs_V).to(ACC)
    else:
        return tl.full(offs_V.shape, 1.0, ACC)


@triton.jit
def _accumulate(
    m, s, q, x_ptr, w_ptr, offs_V, V, softcap,
    MASKED: tl.constexpr, WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    z_V = _tile(x_ptr, offs_V, V, softcap, MASKED, SOFTCAP, ACC)
    new_m = tl.maximum(m, tl.max(z_V, axis=1))
    e_V = tl.exp2((z_V - new_m[:, None]) * LOG2_E)
    s = s * tl.exp2((m - new_m) * LOG2_E) + tl.sum(e_V, axis=1)
    if SMOOTHING:
        w_V = _class_weights(w_ptr, offs_V, V, MASKED, WEIGHT, ACC)
        if MASKED:
            z_V = tl.where(offs_V < V, z_V, 0.0)
        q += tl.sum(w_V * z_V, axis=1)
    return new_m, s, q


@triton.jit
def _store_gradient(
    dx_ptr, x_ptr, w_ptr, offs_V, V, m, scale, uniform, softcap,
    MASKED: tl.constexpr, WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    z_V = _tile(x_ptr, offs_V, V, softcap, MASKED, SOFTCAP, ACC)
    dz_V = scale * tl.exp2((z_V - m) * LOG2_E)
    if SMOOTHING:
        dz_V -= uniform * _class_weights(w_ptr, offs_V, V, MASKED, WEIGHT, ACC)
    if SOFTCAP:
        dz_V *= 1 - (z_V / softcap) * (z_V / softcap)
    if MASKED:
        tl.store(dx_ptr + offs_V, dz_V.to(dx_ptr.dtype.element_ty), mask=offs_V < V)
    else:
        tl.store(dx_ptr + offs_V, dz_V.to(dx_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy_kernel(
    x_ptr, target_ptr, w_ptr, w_sum_ptr, dloss_ptr, loss_ptr, m_ptr, s_ptr, dx_ptr,
    V, stride_xT, stride_dxT, stride_dlossT, ignore_index, label_smoothing, z_loss, softcap,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr, WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # LOSS computes the row's statistics (else they are read), GRADIENT uses them; both together
    # may overwrite the logits.
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * stride_xT
    dx_ptr += t * stride_dxT
    target = tl.load(target_ptr + t)
    offs_V = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = V // BLOCK_V * BLOCK_V

    if target == ignore_index:
        if LOSS:
            tl.store(loss_ptr + t, 0.0)
            tl.store(m_ptr + t, 0.0)
            tl.store(s_ptr + t, 1.0)
        if GRADIENT:  # zeros, whatever the logits hold
            zero_V = tl.zeros(offs_V.shape, dx_ptr.dtype.element_ty)
            for v in range(0, full, BLOCK_V):
                tl.store(dx_ptr + v + offs_V, zero_V)
            tl.store(dx_ptr + full + offs_V, zero_V, mask=full + offs_V < V)
    else:
        # A target outside [0, V) makes the row's loss and gradient nan.
        known = (target >= 0) & (target < V)
        x_t = tl.load(x_ptr + target, mask=known, other=float("nan")).to(ACC)
        z_t = _capped(x_t, softcap, SOFTCAP, ACC)
        w_t = tl.full((), 1.0, ACC)
        if WEIGHT:
            w_t = tl.load(w_ptr + target, mask=known, other=0.0).to(ACC)
        w_t = tl.where(known, w_t, float("nan"))
        w_sum = tl.cast(V, ACC)
        if SMOOTHING and WEIGHT:
            w_sum = tl.load(w_sum_ptr).to(ACC)
        smoothing = tl.cast(label_smoothing, ACC)
        uniform = smoothing / V

        if LOSS:
            m = tl.full((BLOCK_V // LANES,), LOWEST, ACC)
            s = tl.zeros((BLOCK_V // LANES,), ACC)
            q = tl.zeros((BLOCK_V // LANES,), ACC)
            # The tail first: sums that enter the loop as constants crash the compiler (3.6, 3.7).
            if full < V:
                m, s, q = _accumulate(
                    m, s, q, x_ptr + full, w_ptr + full, offs_V, V - full, softcap,
                    True, WEIGHT, SMOOTHING, SOFTCAP, ACC,
                )  # fmt: skip
            for v in range(0, full, BLOCK_V):
                m, s, q = _accumulate(
                    m, s, q, x_ptr + v, w_ptr + v, offs_V, V - v, softcap,
                    False, WEIGHT, SMOOTHING, SOFTCAP, ACC,
                )  # fmt: skip
            row_m = tl.max(m, axis=0)
            row_s = tl.sum(s * tl.exp2((m - row_m) * LOG2_E), axis=0)
            log_s = tl.log2(row_s) * LN_2
            lse = row_m + log_s
            loss = (1 - smoothing) * w_t * ((row_m - z_t) + log_s) + z_loss * w_t * lse * lse
            if SMOOTHING:
                loss += uniform * (w_sum * lse - tl.sum(q, axis=0))
            tl.store(loss_ptr + t, loss)
            tl.store(m_ptr + t, row_m)
            tl.store(s_ptr + t, row_s)
        else:
            row_m = tl.load(m_ptr + t)
            row_s = tl.load(s_ptr + t)

        if GRADIENT:
            dloss = tl.full((), 1.0, ACC)
            if SCALED:
                dloss = tl.load(dloss_ptr + t * stride_dlossT).to(ACC)
            lse = row_m + tl.log2(row_s) * LN_2
            hit = dloss * (1 - smoothing) * w_t
            uniform *= dloss
            rest = dloss * (2 * z_loss * w_t * lse)
            if SMOOTHING:
                rest += uniform * w_sum
            scale = (hit + rest) / row_s
            tl.debug_barrier()  # z_t is read before anything overwrites it
            for v in range(0, full, BLOCK_V):
                _store_gradient(
                    dx_ptr + v, x_ptr + v, w_ptr + v, offs_V, V - v, row_m, scale, uniform,
                    softcap, False, WEIGHT, SMOOTHING, SOFTCAP, ACC,
                )  # fmt: skip
            if full < V:
                _store_gradient(
                    dx_ptr + full, x_ptr + full, w_ptr + full, offs_V, V - full, row_m, scale,
                    uniform, softcap, True, WEIGHT, SMOOTHING, SOFTCAP, ACC,
                )  # fmt: skip
            # The target's element once more, from float32: p - 1 in bfloat16 would lose all of it
            # where p is near 1. One store, not a comparison per element.
            tl.debug_barrier()
            p_t = tl.exp2((z_t - row_m) * LOG2_E) / row_s
            dz_t = hit * (p_t - 1) + rest * p_t
            if SMOOTHING:
                dz_t -= uniform * w_t
            if SOFTCAP:
                dz_t *= 1 - (z_t / softcap) * (z_t / softcap)
            tl.store(dx_ptr + target, dz_t.to(dx_ptr.dtype.element_ty), mask=known)


@triton.jit
def _cross_entropy_scale_kernel(dx_ptr, scale_ptr, V, stride_dxT, BLOCK_V: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1.0:  # decided on the device: the host never waits, and the usual 1 costs nothing
        dx_ptr += tl.program_id(0).to(tl.int64) * stride_dxT
        for v in range(0, V, BLOCK_V):
            offs_V = v + tl.arange(0, BLOCK_V)
            dx_V = tl.load(dx_ptr + offs_V, mask=offs_V < V, other=0.0)
            dx_V = (dx_V * scale).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + offs_V, dx_V, mask=offs_V < V)


def _launch(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: Options, *,
    stats: tuple[Tensor, Tensor, Tensor] | None = None, dx_TV: Tensor | None = None,
    dloss_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute loss_T and the maximum and sum of each row, unless `stats` brings them, and dx_TV."""
    T, V = x_TV.shape
    acc = torch.promote_types(x_TV.dtype, torch.float32)
    loss_T, m_T, s_T = stats or tuple(x_TV.new_empty(T, dtype=acc) for _ in range(3))
    if T == 0:
        return loss_T, m_T, s_T
    unused = loss_T  # stands in for a pointer that the kernel does not follow
    smoothing = options.label_smoothing > 0
    # Where both passes run, few wide programs: the rows in flight then stay in the L2 cache, and
    # the second pass reads them there (132 · 2 rows of 100 KB on an H100, whose cache has 50 MB).
    warps = 32 if stats is None and dx_TV is not None else 8
    block = max(64, min(512 * warps, triton.next_power_of_2(V)))
    _cross_entropy_kernel[(T,)](
        x_TV, target_T, unused if w_V is None else w_V,
        unused if w_V is None or not smoothing else w_V.sum(dtype=acc),
        unused if dloss_T is None else dloss_T, loss_T, m_T, s_T,
        unused if dx_TV is None else dx_TV,
        V, x_TV.stride(0), 0 if dx_TV is None else dx_TV.stride(0),
        0 if dloss_T is None else dloss_T.stride(0), *options,
        LOSS=stats is None, GRADIENT=dx_TV is not None, SCALED=dloss_T is not None,
        WEIGHT=w_V is not None, SMOOTHING=smoothing, SOFTCAP=options.softcap > 0,
        ACC=accumulator(x_TV.dtype), BLOCK_V=block, LANES=16 // x_TV.element_size(),
        num_warps=max(1, block // 512),
    )  # fmt: skip
    return loss_T, m_T, s_T


def _launch_forward(x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, *options):
    return _launch(x_TV, target_T, w_V, Options(*options))


def _launch_backward(
    dloss_T: Tensor, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, m_T: Tensor, s_T: Tensor,
    *options,
) -> Tensor:  # fmt: skip
    dx_TV = torch.empty(x_TV.shape, dtype=x_TV.dtype, device=x_TV.device)
    stats = (m_T, m_T, s_T)  # the loss is not written again
    _launch(x_TV, target_T, w_V, Options(*options), stats=stats, dx_TV=dx_TV, dloss_T=dloss_T)
    return dx_TV


def _launch_inplace(
    x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, dloss_T: Tensor | None, *options
) -> Tensor:
    return _launch(x_TV, target_T, w_V, Options(*options), dx_TV=x_TV, dloss_T=dloss_T)[0]


def _launch_scale(dx_TV: Tensor, scale: Tensor) -> None:
    T, V = dx_TV.shape
    if T:
        _cross_entropy_scale_kernel[(T,)](dx_TV, scale, V, dx_TV.stride(0), BLOCK_V=4096)


def _fake_forward(x, target, weight, *options):
    acc = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[0], dtype=acc) for _ in range(3))


_forward = operator(
    f"cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = operator(
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor m,"
    f" Tensor s, {SCHEMA}) -> Tensor",
    _launch_backward,
    lambda dloss, x, *_: x.new_empty(x.shape),
)
_inplace = operator(
    "cross_entropy_inplace(Tensor(a!) x, Tensor target, Tensor? weight, Tensor? dloss,"
    f" {SCHEMA}) -> Tensor",
    _launch_inplace,
    lambda x, *_: _fake_forward(x, *_)[0],
)
_scale = operator(
    "cross_entropy_scale(Tensor(a!) dx, Tensor scale) -> ()", _launch_scale, lambda dx, scale: None
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, options: Options):
        loss_T, m_T, s_T = _forward(x_TV, target_T, w_V, *options)
        ctx.save_for_backward(x_TV, target_T, w_V, m_T, s_T)
        ctx.options = options
        return loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss_T: Tensor):
        return _backward(dloss_T, *ctx.saved_tensors, *ctx.options), None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """The loss of rows that share one scale; forward leaves their gradient in the logits."""

    @staticmethod
    def forward(
        ctx, x_TV: Tensor, target_T: Tensor, w_V: Tensor | None, scale: Tensor, options: Options
    ):
        loss_T = _inplace(x_TV, target_T, w_V, scale.expand(x_TV.shape[0]), *options)
        torch.autograd.graph.increment_version(x_TV)
        ctx.dx_TV = x_TV.detach()
        return loss_T.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        if ctx.dx_TV is None:
            raise RuntimeError(
                "cross_entropy: with inplace=True the gradient can be taken once; "
                "pass inplace=False to call backward again"
            )
        _scale(ctx.dx_TV, dloss)
        dx_TV, ctx.dx_TV = ctx.dx_TV, None
        return dx_TV, None, None, None, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> Tensor:
    """Compute the cross-entropy loss between logits and class indices.

    Nothing is read back to the host. A target outside [0, V) other than `ignore_index` raises an
    IndexError where the reference runs (CPU) and makes its loss and gradient nan on a GPU. A mean
    over no target at all is nan, its gradient 0, as in PyTorch.

    Args:
        logits: `[T, V]`, `[V]`, or `[N, V, ...]` as in `torch.nn.functional.cross_entropy`;
            float32, float16, bfloat16 or float64. Copied unless its last axis is contiguous.
        target: `[T]`, `[]` or `[N, ...]`; any integer dtype.
        weight: `[V]`, the weight of each class, or None for ones. It gets no gradient.
        ignore_index: targets of this value count neither in the loss nor in the mean.
        reduction: "mean" (by class weight), "sum" or "none".
        label_smoothing: ε in [0, 1].
        z_loss: factor of lse², at least 0.
        softcap: bound of the logits, softcap · tanh(logits / softcap), above 0; None for no bound.
        inplace: allow the logits to be overwritten, by their gradient: a third less memory traffic
            and no second buffer. They must be contiguous rows and not a leaf. With reduction
            "none" and on the CPU nothing is overwritten.

    Returns:
        The loss in nats: a scalar, or with reduction "none" the shape of `target`; float32
        (float64 for float64 logits).

    Raises:
        ValueError: a shape, dtype or option is outside what stands above.
    """
    x_TV, target_T = _rows(logits, target)
    check_options("cross_entropy", reduction, label_smoothing, z_loss, softcap)
    w_V = check_class_weight("cross_entropy", "weight", weight, x_TV.shape[1], logits)
    options = Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)
    needs_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and needs_gradient:
        if logits.is_leaf:
            raise ValueError("cross_entropy: inplace would overwrite a leaf; pass inplace=False")
        if not x_TV.is_contiguous() or x_TV.data_ptr() != logits.data_ptr():
            raise ValueError("cross_entropy: inplace needs contiguous rows; pass inplace=False")
    if not uses_triton(logits):
        loss = cross_entropy_reference(
            x_TV, target_T, weight=w_V, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
    elif inplace and needs_gradient and reduction != "none":
        w_T = token_weights(target_T, w_V, ignore_index, torch.float32)
        scale = 1 / w_T.sum() if reduction == "mean" else w_T.new_ones(())
        loss = _CrossEntropyInPlace.apply(x_TV, target_T, w_V, scale, options)
    else:
        loss_T = _CrossEntropy.apply(x_TV, target_T, w_V, options)
        loss = reduce(loss_T, target_T, w_V, ignore_index, reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def _rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """View or copy the logits as `[T, V]` with contiguous rows, and the target as int64 `[T]`."""
    if logits.dim() == 0 or not logits.is_floating_point() or 0 in logits.shape[1:2]:
        raise ValueError(
            "cross_entropy: logits must be floating point [T, V], [V] or [N, V, ...] with V >= 1, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    x = logits.movedim(1, -1) if logits.dim() > 2 else logits
    target_T = check_target("cross_entropy", target, x.shape[:-1], logits)
    return unit_stride(x.reshape(-1, x.shape[-1])), target_T
