"""Faults of kernels/cross_entropy.py: masks, signs, scales, rows, and the traps of the field."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/cross_entropy.py")

MUTANTS = [
    _mutant(
        what="mask before the cap",
        original='z_V = tl.where(offs_V < V, _capped(x_V, softcap, SOFTCAP, ACC), float("-inf"))',
        replacement="z_V = _capped(x_V, softcap, SOFTCAP, ACC)",
    ),
    _mutant(
        what="cap with the wrong sign for negative logits",
        original="x = tl.where(x < 0, -z, z)",
        replacement="x = z",
    ),
    _mutant(
        what="no rescaling when the maximum grows",
        original="s = s * tl.exp2((m - new_m) * LOG2_E) + tl.sum(e_V, axis=1)",
        replacement="s = s + tl.sum(e_V, axis=1)",
    ),
    _mutant(
        what="lanes summed at different maxima",
        original="row_s = tl.sum(s * tl.exp2((m - row_m) * LOG2_E), axis=0)",
        replacement="row_s = tl.sum(s, axis=0)",
    ),
    _mutant(
        what="padding in the smoothing sum",
        original="z_V = tl.where(offs_V < V, z_V, 0.0)",
        replacement="z_V = tl.where(offs_V < V, z_V, 1.0)",
    ),
    _mutant(
        what="the target's gradient with the wrong sign",
        original="dz_t = hit * (p_t - 1) + rest * p_t",
        replacement="dz_t = hit * (p_t + 1) + rest * p_t",
    ),
    _mutant(
        what="the target's gradient not written",
        original="dz_t.to(dx_ptr.dtype.element_ty), mask=known)",
        replacement="dz_t.to(dx_ptr.dtype.element_ty), mask=known & False)",
    ),
    _mutant(
        what="gradient of the cap forgotten",
        original="dz_V *= 1 - (z_V / softcap) * (z_V / softcap)",
        replacement="dz_V *= 1",
    ),
    _mutant(
        what="gradient of the cap forgotten at the target",
        original="dz_t *= 1 - (z_t / softcap) * (z_t / softcap)",
        replacement="dz_t *= 1",
    ),
    _mutant(
        what="gradient of the z-loss forgotten",
        original="rest = dloss * (2 * z_loss * w_t * lse)",
        replacement="rest = dloss * 0.0 * lse",
    ),
    _mutant(
        what="z-loss without the class weight",
        original="z_loss * w_t * lse * lse",
        replacement="z_loss * lse * lse",
    ),
    _mutant(
        what="incoming gradient ignored",
        original="dloss = tl.load(dloss_ptr + t * stride_dlossT).to(ACC)",
        replacement="dloss = tl.load(dloss_ptr).to(ACC)",
    ),
    _mutant(
        what="smoothing not scaled by the incoming gradient",
        original="            uniform *= dloss\n",
        replacement="",
    ),
    _mutant(
        what="a target outside the vocabulary counts",
        original='w_t = tl.where(known, w_t, float("nan"))',
        replacement="w_t = tl.where(known, w_t, 1.0)",
    ),
    _mutant(
        what="the last block skipped",
        original="            if full < V:\n                m, s, q",
        replacement="            if full > V:\n                m, s, q",
    ),
    _mutant(
        what="the first block skipped",
        original="            for v in range(0, full, BLOCK_V):\n                m, s, q",
        replacement="            for v in range(BLOCK_V, full, BLOCK_V):\n                m, s, q",
    ),
    _mutant(
        what="row offsets in 32 bits",
        original="t = tl.program_id(0).to(tl.int64)\n    x_ptr",
        replacement="t = tl.program_id(0)\n    x_ptr",
    ),
    _mutant(
        what="gradient of an ignored row left unwritten",
        original="tl.store(dx_ptr + full + offs_V, zero_V, mask=full + offs_V < V)",
        replacement="tl.store(dx_ptr + full + offs_V, zero_V, mask=full + offs_V < V - 1)",
    ),
    _mutant(
        what="store beyond the row",
        original="dz_V.to(dx_ptr.dtype.element_ty), mask=offs_V < V)",
        replacement="dz_V.to(dx_ptr.dtype.element_ty))",
    ),
    _mutant(
        what="a second backward scales again",
        original="dx_TV, ctx.dx_TV = ctx.dx_TV, None",
        replacement="dx_TV = ctx.dx_TV",
    ),
    _mutant(
        what="the mean counts ignored targets",
        original="        w_T = token_weights(target_T, w_V, ignore_index, torch.float32)\n",
        replacement="        w_T = token_weights(target_T, w_V, -1 << 40, torch.float32)\n",
    ),
]
