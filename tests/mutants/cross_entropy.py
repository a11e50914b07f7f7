"""Faults of _cross_entropy_rows.py and cross_entropy.py: masks, signs, scales, rows, traps."""

from functools import partial

from tests.mutants import Mutant

_kernel = partial(Mutant, file="kernels/_cross_entropy_rows.py")
_function = partial(Mutant, file="kernels/cross_entropy.py")
_definition = partial(Mutant, file="kernels/_cross_entropy_options.py")

MUTANTS = [
    _kernel(
        what="mask before the cap",
        original='        z_V = tl.where(own_V, z_V, float("-inf"))\n',
        replacement="        z_V += 0.0\n",
    ),
    _kernel(
        what="cap with the wrong sign for negative logits",
        original="x = tl.where(x < 0, -z, z)",
        replacement="x = z",
    ),
    _kernel(
        what="cap before the scale",
        original="        x *= logit_scale\n",
        replacement="        softcap *= logit_scale\n        x *= logit_scale\n",
    ),
    _kernel(
        what="no rescaling when the maximum grows",
        original="s = s * shrink + tl.sum(e_V, axis=1)",
        replacement="s = s + tl.sum(e_V, axis=1)",
    ),
    _kernel(
        what="lanes summed at different maxima",
        original="row_s = tl.sum(s * tl.exp2((m - row_m) * LOG2_E), axis=0)",
        replacement="row_s = tl.sum(s, axis=0)",
    ),
    _kernel(
        what="padding takes part in the smoothing",
        original="a_V = tl.where(own_V, uniform, 0.0) if MASKED else",
        replacement="a_V = tl.zeros(offs_V.shape, ACC) + uniform if MASKED else",
    ),
    _kernel(
        what="soft targets not reduced by the smoothing",
        original="a_V += hit * tl.load(q_ptr + offs_V, mask=own_V, other=0.0).to(ACC)",
        replacement="a_V += tl.load(q_ptr + offs_V, mask=own_V, other=0.0).to(ACC)",
    ),
    _kernel(
        what="class weight of the next class",
        original="a_V *= tl.load(w_ptr + offs_V, mask=own_V, other=0.0).to(ACC)",
        replacement="a_V *= tl.load(w_ptr + (offs_V ^ 1), mask=own_V, other=0.0).to(ACC)",
    ),
    _kernel(
        what="soft targets of the first row for all",
        original="q_ptr = target_ptr + _origin(t, stride_qT, LEAD)",
        replacement="q_ptr = target_ptr + _origin(t * 0, stride_qT, LEAD)",
    ),
    _kernel(
        what="mass of soft targets taken for 1",
        original="mass = tl.sum(masses, axis=0)",
        replacement="mass = 1 + 0 * tl.sum(masses, axis=0)",
    ),
    _kernel(
        what="the target's gradient with the wrong sign",
        original="dz_t = hit * (p_t - 1) + (total - hit) * p_t",
        replacement="dz_t = hit * (p_t + 1) + (total - hit) * p_t",
    ),
    _kernel(
        what="the target's gradient not written",
        original="(give * dz_t).to(dx_ptr.dtype.element_ty), mask=owned)",
        replacement="(give * dz_t).to(dx_ptr.dtype.element_ty), mask=owned & False)",
    ),
    _kernel(
        what="gradient of the cap forgotten",
        original="dz_V *= 1 - u_V * u_V",
        replacement="dz_V *= 1",
    ),
    _kernel(
        what="gradient of the cap forgotten at the target",
        original="dz_t *= 1 - (z_t / softcap) * (z_t / softcap)",
        replacement="dz_t *= 1",
    ),
    _kernel(
        what="gradient of the scale forgotten",
        original="                give *= logit_scale\n",
        replacement="                give *= 1\n",
    ),
    _kernel(
        what="gradient of the z-loss forgotten",
        original="total = mass + 2 * z_loss * w_t * lse",
        replacement="total = mass + 0 * lse",
    ),
    _kernel(
        what="z-loss without the class weight",
        original="loss = z_loss * w_t * lse * lse",
        replacement="loss = z_loss * lse * lse",
    ),
    _kernel(
        what="the first row's incoming gradient for all",
        original="give = tl.load(dloss_ptr + t * stride_dlossT).to(ACC)",
        replacement="give = tl.load(dloss_ptr).to(ACC)",
    ),
    _kernel(
        what="smoothing not scaled by the incoming gradient",
        original="                        give * hit, give * uniform, logit_scale, softcap,\n",
        replacement="                        give * hit, uniform, logit_scale, softcap,\n",
    ),
    _kernel(
        what="a target outside the vocabulary counts",
        original='w_t = tl.where(known, w_t, float("nan"))',
        replacement="w_t = tl.where(known, w_t, 1.0)",
    ),
    _kernel(
        what="the last block skipped",
        original="            elif full < cut:\n"
        "                x_V = _read(x_ptr + full, offs_V, tail_V, True, KEEP)",
        replacement="            elif full > cut:\n"
        "                x_V = _read(x_ptr + full, offs_V, tail_V, True, KEEP)",
    ),
    _kernel(
        what="the first block skipped",
        original="for v in range(LEAD + KEPT * BLOCK_V, full, BLOCK_V):\n"
        "                    x_V = _read(x_ptr + v, offs_V, tail_V, False, KEEP)",
        replacement="for v in range(LEAD + (KEPT + 1) * BLOCK_V, full, BLOCK_V):\n"
        "                    x_V = _read(x_ptr + v, offs_V, tail_V, False, KEEP)",
    ),
    _kernel(
        what="row offsets in 32 bits",
        original="t = tl.program_id(0).to(tl.int64)\n    h",
        replacement="t = tl.program_id(0)\n    h",
    ),
    _kernel(
        what="gradient of an ignored row left unwritten",
        original="tl.store(dx_ptr + full + offs_V, zero_V, mask=tail_V)",
        replacement="tl.store(dx_ptr + full + offs_V, zero_V, mask=offs_V < left - 1)",
    ),
    _kernel(
        what="store beyond the row",
        original="dz_V.to(dx_ptr.dtype.element_ty), mask=own_V)",
        replacement="dz_V.to(dx_ptr.dtype.element_ty))",
    ),
    _function(
        what="a second backward scales again",
        original="dx_TV, ctx.dx_TV = ctx.dx_TV, None",
        replacement="dx_TV = ctx.dx_TV",
    ),
    _function(
        what="the gradient in place scaled by ignored targets, too",
        original="scale_of_mean(target_T, w_V, options.ignore_index, wide)",
        replacement="scale_of_mean(target_T, w_V, -1 << 40, wide)",
    ),
    _function(
        what="the mean counts ignored targets",
        original="loss, scale = reduced(loss_T, target_T, w_V, options.ignore_index, reduction)",
        replacement="loss, scale = reduced(loss_T, target_T, w_V, -1 << 40, reduction)",
    ),
    _function(
        what="the mean in place counts ignored targets",
        original="loss, _ = reduced(loss_T, target_T, w_V, options.ignore_index, reduction)",
        replacement="loss, _ = reduced(loss_T, target_T, w_V, -1 << 40, reduction)",
    ),
    _kernel(
        what="the gradient of a mean not scaled",
        original="                give *= tl.load(mean_ptr).to(ACC)\n",
        replacement="                give += 0 * tl.load(mean_ptr).to(ACC)\n",
    ),
    _function(
        what="the gradient of soft targets not scaled",
        original="(dloss if scale is None else dloss * scale).expand",
        replacement="dloss.expand",
    ),
    _function(
        what="logits of a strided view overwritten",
        original="    if not x_TV.is_contiguous() or x_TV.data_ptr() != input.data_ptr():\n",
        replacement="    if False:\n",
    ),
    _function(
        what="in place without a gradient",
        original="overwrite = inplace and input.requires_grad and torch.is_grad_enabled()",
        replacement="overwrite = inplace and input.requires_grad",
    ),
    _function(
        what="incoming gradient of the mean ignored",
        original="        scale_gradient_(ctx.dx_TV, dloss)\n",
        replacement="",
    ),
    _definition(
        what="reference: logits overwritten where only the loss is wanted",
        original="copy=not gradient)",
        replacement="copy=False)",
    ),
]
