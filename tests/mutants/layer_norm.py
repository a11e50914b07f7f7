"""Faults of the mean, the variance, the bias and their gradients in layer_norm."""

from functools import partial

from tests.mutants import Mutant

_kernels = partial(Mutant, file="kernels/_norm_kernels.py")
_launch = partial(Mutant, file="kernels/_norm_launch.py")
_arguments = partial(Mutant, file="kernels/_norm_arguments.py")

MUTANTS = [
    _kernels(
        what="padded lanes deviate from the mean",
        original="z_TD = tl.where(cols_1D < D, z_TD - m_T[:, None], 0.0)",
        replacement="z_TD = z_TD - m_T[:, None]",
    ),
    _kernels(
        what="mean over the padded width",
        original="m_T = tl.sum(z_TD, axis=1) / D",
        replacement="m_T = tl.sum(z_TD, axis=1) / BLOCK_D",
    ),
    _kernels(
        what="unbiased variance",
        original="tl.sum(z_TD * z_TD, axis=1) / D + eps)",
        replacement="tl.sum(z_TD * z_TD, axis=1) / (D - 1) + eps)",
    ),
    _kernels(
        what="padded lanes of a long row deviate from the mean",
        original="z_D = tl.where(d < D, s_D - m, 0.0)",
        replacement="z_D = s_D - m",
    ),
    _kernels(
        what="sum carried on into the variance",
        original="m_ptr + t, m)\n        sum_D = tl.zeros((BLOCK_D,), dtype=ACC)\n",
        replacement="m_ptr + t, m)\n",
    ),
    _kernels(
        what="variance about zero",
        original="            sum_D += z_D * z_D\n",
        replacement="            sum_D += s_D * s_D\n",
    ),
    _kernels(
        what="variance as a difference of means",
        original="sum_D += z_D * z_D\n        mean = tl.sum(sum_D) / D\n",
        replacement="sum_D += s_D * s_D\n        mean = tl.sum(sum_D) / D - m * m\n",
    ),
    _kernels(
        what="mean not taken off a long row",
        original="_norm_scale((s_D - m) * r, w_ptr, d, D, offset)",
        replacement="_norm_scale(s_D * r, w_ptr, d, D, offset)",
    ),
    _kernels(
        what="bias added twice",
        original="y_TD += tl.load(b_ptr + cols_1D, mask=cols_1D < D, other=0.0).to(ACC)",
        replacement="y_TD += 2 * tl.load(b_ptr + cols_1D, mask=cols_1D < D, other=0.0).to(ACC)",
    ),
    _kernels(
        what="bias of the first block everywhere",
        original="y_D += tl.load(b_ptr + d, mask=d < D, other=0.0).to(ACC)",
        replacement="y_D += tl.load(b_ptr + offs_D, mask=offs_D < D, other=0.0).to(ACC)",
    ),
    _kernels(
        what="mean of g not taken off",
        original="            g_TD -= (tl.sum(g_TD, axis=1) / D)[:, None]\n",
        replacement="            g_TD -= 0.0\n",
    ),
    _kernels(
        what="mean of g over the padded width",
        original="g_TD -= (tl.sum(g_TD, axis=1) / D)[:, None]",
        replacement="g_TD -= (tl.sum(g_TD, axis=1) / BLOCK_D)[:, None]",
    ),
    _kernels(
        what="mean of g not taken off a long row",
        original="dx_D = r * (g_D - (s_D - m) * scale - shift)",
        replacement="dx_D = r * (g_D - (s_D - m) * scale)",
    ),
    _kernels(
        what="mean of the last block of g",
        original="            g_sum_D += g_D\n",
        replacement="            g_sum_D = g_D\n",
    ),
    _kernels(
        what="dx of a long row from s, not z",
        original="dx_D = r * (g_D - (s_D - m) * scale - shift)",
        replacement="dx_D = r * (g_D - s_D * scale - shift)",
    ),
    _kernels(
        what="dw without the mean's part",
        original="dw_TD += dyz_TD * r_T1",
        replacement="dw_TD += (dyz_TD - dy_TD) * r_T1",
    ),
    _kernels(
        what="dw of a long row from s, not z",
        original="                z_TD -= tl.load(m_ptr",
        replacement="                z_TD -= 0 * tl.load(m_ptr",
    ),
    _kernels(
        what="db scaled by r",
        original="db_TD += dy_TD\n        g_TD",
        replacement="db_TD += dy_TD * r_T1\n        g_TD",
    ),
    _kernels(
        what="db of a program's last tile",
        original="            db_TD += dy_TD\n        if dw_ptr",
        replacement="            db_TD = dy_TD\n        if dw_ptr",
    ),
    _launch(
        what="db summed from the partials of dw",
        original="_partials.launch(plan.partials, dw_PD, dw_D, db_PD, db_D)",
        replacement="_partials.launch(plan.partials, dw_PD, dw_D, dw_PD, db_D)",
    ),
    _launch(
        what="db in the dtype of s",
        original="None if db_dtype is None else s.new_empty(D, dtype=db_dtype)",
        replacement="None if db_dtype is None else s.new_empty(D)",
    ),
    _arguments(
        what="bias not checked",
        original='(("weight", weight), ("bias", bias)):\n        if vector',
        replacement='(("weight", weight),):\n        if vector',
    ),
    _arguments(
        what="bias that fits nothing taken at once",
        original="and (bias is None or _fits(bias, shape, x.device))",
        replacement="",
    ),
]
