"""Faults of what the norms share, and of rms_norm: masks, strides, scales, rows and dtypes."""

from functools import partial

from tests.mutants import Mutant

_kernels = partial(Mutant, file="kernels/_norm_kernels.py")
_launch = partial(Mutant, file="kernels/_norm_launch.py")
_arguments = partial(Mutant, file="kernels/_norm_arguments.py")

MUTANTS = [
    _kernels(
        what="no eps, rows in registers",
        original="tl.sum(z_TD * z_TD, axis=1) / D + eps)",
        replacement="tl.sum(z_TD * z_TD, axis=1) / D)",
    ),
    _kernels(
        what="no eps, rows looped over",
        original="r = 1 / tl.sqrt(mean + eps)",
        replacement="r = 1 / tl.sqrt(mean)",
    ),
    _kernels(
        what="mean over the padded width",
        original="tl.sum(z_TD * z_TD, axis=1) / D + eps)",
        replacement="tl.sum(z_TD * z_TD, axis=1) / BLOCK_D + eps)",
    ),
    _kernels(
        what="no weight in forward",
        original="y_TD = z_TD * r_T[:, None] * w_1D",
        replacement="y_TD = z_TD * r_T[:, None]",
    ),
    _kernels(
        what="store of y without its mask",
        original="tl.store(y_ptr + rows_T1 * D + cols_1D, y_TD, mask=mask_TD)",
        replacement="tl.store(y_ptr + rows_T1 * D + cols_1D, y_TD)",
    ),
    _kernels(
        what="store of r without its mask",
        original="tl.store(r_ptr + offs_T, r_T, mask=offs_T < T)",
        replacement="tl.store(r_ptr + offs_T, r_T)",
    ),
    _kernels(
        what="32-bit row offsets in forward",
        original="offs_T = tl.program_id(0).to(tl.int64) * BLOCK_T",
        replacement="offs_T = tl.program_id(0) * BLOCK_T",
    ),
    _kernels(
        what="norm of the sum before it is rounded",
        original="        s = s.to(s_ptr.dtype.element_ty)\n",
        replacement="",
    ),
    _kernels(
        what="row stride of the residual taken for that of x",
        original="residual_ptr + t * stride_residualT + d",
        replacement="residual_ptr + t * stride_xT + d",
    ),
    _kernels(
        what="offset left out",
        original="z *= w + offset if offset != 0.0 else w",
        replacement="z *= w",
    ),
    _kernels(
        what="offset taken for one",
        original="z *= w + offset if offset != 0.0 else w",
        replacement="z *= w + 1.0",
    ),
    _kernels(
        what="sum looped over with x where it should be s",
        original="        x_ptr, stride_xT = s_ptr, D\n",
        replacement="",
    ),
    _kernels(
        what="only complete blocks of a long row summed",
        original="gz_D += g_D * (s_D - m)",
        replacement="gz_D += tl.where(start + BLOCK_D <= D, g_D * (s_D - m), 0.0)",
    ),
    _kernels(
        what="mean square of the last block alone",
        original="sum_D += s_D if CENTRED else s_D * s_D",
        replacement="sum_D = s_D if CENTRED else s_D * s_D",
    ),
    _kernels(
        what="wrong sign of the mean's gradient",
        original="dx_TD = r_T1 * (g_TD - z_TD * scale_T1)",
        replacement="dx_TD = r_T1 * (g_TD + z_TD * scale_T1)",
    ),
    _kernels(
        what="gradient not scaled by r",
        original="dx_TD = r_T1 * (g_TD - z_TD * scale_T1)",
        replacement="dx_TD = g_TD - z_TD * scale_T1",
    ),
    _kernels(
        what="mean's gradient scaled by r once",
        original="scale_T1 = r_T1 * r_T1 * (tl",
        replacement="scale_T1 = r_T1 * (tl",
    ),
    _kernels(
        what="the same over long rows",
        original="scale = r * r * (tl.sum(gz_D) / D)",
        replacement="scale = r * (tl.sum(gz_D) / D)",
    ),
    _kernels(
        what="weight left out of dx",
        original="g_TD = dy_TD * w_1D",
        replacement="g_TD = dy_TD",
    ),
    _kernels(
        what="first row skipped in backward",
        original="tl.range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES)",
        replacement="tl.range(p * BLOCK_T + 1, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES)",
    ),
    _kernels(
        what="every program takes all rows from its own on",
        original="tl.range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T, num_stages=STAGES)",
        replacement="tl.range(p * BLOCK_T, T, BLOCK_T, num_stages=STAGES)",
    ),
    _kernels(
        what="rows of a long dw shared out by columns",
        original="for t in range(p * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):",
        replacement="for t in range(p * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):",
    ),
    _kernels(
        what="gradient of the stream not added",
        original="dx += tl.load(ds_ptr + t * stride_dsT + d, mask=mask, other=0.0).to(dx.dtype)",
        replacement="dx += 0",
    ),
    _kernels(
        what="gradient of the stream read in the strides of dx",
        original="ds_ptr + t * stride_dsT + d",
        replacement="ds_ptr + t * D + d",
    ),
    _kernels(
        what="partials beyond P summed",
        original="mask_PD = (offs_P < P)[:, None] & (offs_D < D)[None, :]",
        replacement="mask_PD = (offs_P < BLOCK_P)[:, None] & (offs_D < D)[None, :]",
    ),
    _kernels(
        what="only the first partials summed",
        original="for p in range(0, P, BLOCK_P):",
        replacement="for p in range(0, BLOCK_P, BLOCK_P):",
    ),
    _kernels(
        what="32-bit row offsets over long rows in forward",
        original=".to(tl.int64)\n    offs_D = tl.arange(0, BLOCK_D)\n    sum_D",
        replacement="\n    offs_D = tl.arange(0, BLOCK_D)\n    sum_D",
    ),
    _launch(
        what="column stride ignored",
        original="return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))",
        replacement="return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])",
    ),
    _launch(
        what="every input copied",
        original="return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))",
        replacement="return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).clone()",
    ),
    _launch(
        what="statistics in the dtype of x",
        original="y, r_T = _empty_like(x), x.new_empty(T, dtype=wide)",
        replacement="y, r_T = _empty_like(x), x.new_empty(T)",
    ),
    _launch(
        what="second derivative allowed",
        original="    @once_differentiable\n    def backward(ctx, dy: Tensor):\n",
        replacement="    def backward(ctx, dy: Tensor):\n",
    ),
    _launch(
        what="second derivative of the added one allowed",
        original="    @once_differentiable\n    def backward(ctx, dy: Tensor | None, ds",
        replacement="    def backward(ctx, dy: Tensor | None, ds",
    ),
    _arguments(
        what="a weight that fits nothing taken at once",
        original="and (weight is None or _fits(weight, shape, x.device))",
        replacement="",
    ),
    _launch(
        what="planned without the dtype of the weight",
        original="dtype_of(residual), dtype_of(w_D), dtype_of(b_D)), eps",
        replacement="dtype_of(residual), None, dtype_of(b_D)), eps",
    ),
    *(
        Mutant(
            what=f"second derivatives are refused by way of {way} alone",
            file="kernels/runtime.py",
            original="x for x in (*unpacked.saved_tensors, *grads) if",
            replacement=f"x for x in {used} if",
        )
        for way, used in {
            "the incoming gradient": "grads",
            "what is saved": "unpacked.saved_tensors",
            "nothing": "()",
        }.items()
    ),
]
