"""Faults of kernels/rms_norm.py: lost masks, signs, scales, rows, masked lanes and dtypes."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/rms_norm.py")

MUTANTS = [
    _mutant(
        what="no eps",
        original="r_T = 1 / tl.sqrt(tl.sum(s_TD * s_TD, axis=1) / D + eps)",
        replacement="r_T = 1 / tl.sqrt(tl.sum(s_TD * s_TD, axis=1) / D)",
    ),
    _mutant(
        what="mean over the padded width",
        original="r_T = 1 / tl.sqrt(tl.sum(s_TD * s_TD, axis=1) / D + eps)",
        replacement="r_T = 1 / tl.sqrt(tl.sum(s_TD * s_TD, axis=1) / BLOCK_D + eps)",
    ),
    _mutant(
        what="no weight in forward",
        original="s_TD * r_T[:, None] * w_D[None, :], mask=mask_TD)",
        replacement="s_TD * r_T[:, None], mask=mask_TD)",
    ),
    _mutant(
        what="store of y without its mask",
        original="s_TD * r_T[:, None] * w_D[None, :], mask=mask_TD)",
        replacement="s_TD * r_T[:, None] * w_D[None, :])",
    ),
    _mutant(
        what="store of r without its mask",
        original="tl.store(r_ptr + offs_T, r_T, mask=offs_T < T)",
        replacement="tl.store(r_ptr + offs_T, r_T)",
    ),
    _mutant(
        what="32-bit row offsets in forward",
        original="offs_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)",
        replacement="offs_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)",
    ),
    _mutant(
        what="norm of the sum before it is rounded",
        original="        s_TD = s_TD.to(s_ptr.dtype.element_ty)\n",
        replacement="",
    ),
    _mutant(
        what="row stride of the residual taken for that of x",
        original="residual_ptr + rows_T1 * stride_residualT + cols_1D",
        replacement="residual_ptr + rows_T1 * stride_xT + cols_1D",
    ),
    _mutant(
        what="wrong sign of the mean's gradient",
        original="dx_TD = r_T1 * (g_TD - s_TD",
        replacement="dx_TD = r_T1 * (g_TD + s_TD",
    ),
    _mutant(
        what="gradient not scaled by r",
        original="dx_TD = r_T1 * (g_TD - s_TD",
        replacement="dx_TD = (g_TD - s_TD",
    ),
    _mutant(
        what="weight left out of dx",
        original="g_TD = dy_TD * w_1D",
        replacement="g_TD = dy_TD",
    ),
    _mutant(
        what="first row skipped in backward",
        original="for t in range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):",
        replacement="for t in range(p * BLOCK_T + 1, T, tl.num_programs(0) * BLOCK_T):",
    ),
    _mutant(
        what="every program takes all rows from its own on",
        original="for t in range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):",
        replacement="for t in range(p * BLOCK_T, T, BLOCK_T):",
    ),
    _mutant(
        what="gradient of the stream not added",
        original="dx_TD += tl.load(ds_ptrs, mask=mask_TD, other=0.0).to(ACC)",
        replacement="dx_TD += 0 * tl.load(ds_ptrs, mask=mask_TD, other=0.0).to(ACC)",
    ),
    _mutant(
        what="dw of the last tile only",
        original="dw_TD += dy_TD * s_TD * r_T1",
        replacement="dw_TD = dy_TD * s_TD * r_T1",
    ),
    _mutant(
        what="dw not scaled by r",
        original="dw_TD += dy_TD * s_TD * r_T1",
        replacement="dw_TD += dy_TD * s_TD",
    ),
    _mutant(
        what="partials beyond P summed",
        original="mask_PD = (offs_P < P)[:, None] & (offs_D < D)[None, :]",
        replacement="mask_PD = (offs_P < BLOCK_P)[:, None] & (offs_D < D)[None, :]",
    ),
    _mutant(
        what="only the first partials summed",
        original="for p in range(0, P, BLOCK_P):",
        replacement="for p in range(0, BLOCK_P, BLOCK_P):",
    ),
    _mutant(
        what="strided dy read as if contiguous",
        original="dy_ptr + rows_T1 * stride_dyT + cols_1D",
        replacement="dy_ptr + rows_T1 * D + cols_1D",
    ),
    _mutant(
        what="column stride ignored",
        original="return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))",
        replacement="return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])",
    ),
    _mutant(
        what="second derivative allowed",
        original="    @once_differentiable\n    def backward(ctx, dy_TD: Tensor):",
        replacement="    def backward(ctx, dy_TD: Tensor):",
    ),
]
