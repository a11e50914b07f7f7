"""Faults of linear_cross_entropy.py and of the rows' reference, which serves it on a CPU."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_linear_cross_entropy.py")
_scaling = partial(Mutant, file="kernels/_scale_gradient.py")
_rows = partial(Mutant, file="kernels/_cross_entropy_options.py")

MUTANTS = [
    _mutant(
        what="the last chunk skipped",
        original="for start in range(0, T, chunk_rows):",
        replacement="for start in range(0, max(T - chunk_rows, 1), chunk_rows):",
    ),
    _mutant(
        what="weight gradient of the last chunk only",
        original="_product(x_CV.T, h_CD, dweight_VD, add=start > 0)",
        replacement="_product(x_CV.T, h_CD, dweight_VD)",
    ),
    _mutant(
        what="weight gradient summed in the dtype of the weight",
        original="dtype=weight.dtype if single_bf16_chunk else loss.dtype",
        replacement="dtype=weight.dtype",
    ),
    _mutant(
        what="gradient sums not cleared",
        original="    dbias_V.zero_()\n",
        replacement="",
    ),
    _mutant(
        what="bias left out of the logits",
        original="torch.addmm(bias_V, h_CD, weight_VD.T, out=x_CV)",
        replacement="torch.addmm(bias_V * 0, h_CD, weight_VD.T, out=x_CV)",
    ),
    _mutant(
        what="bias gradient of the last chunk only",
        original="dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)",
        replacement="dbias_V.copy_(x_CV.sum(0, dtype=dbias_V.dtype))",
    ),
    _mutant(
        what="the first chunk's incoming gradient for all",
        original="dloss_C = None if dloss_T is None else dloss_T[chunk]",
        replacement="dloss_C = None if dloss_T is None else dloss_T[: h_CD.shape[0]]",
    ),
    _scaling(
        what="incoming gradient ignored",
        original="    return scale_gradient(g, factor, dtype)\n",
        replacement="    return g.to(dtype)\n",
    ),
    _mutant(
        what="a mean over all targets",
        original="scale_of_mean(target_T, class_weight_V, options.ignore_index, wide)",
        replacement="scale_of_mean(target_T, class_weight_V, -1 << 40, wide)",
    ),
    _mutant(
        what="gradient of nothing is nan",
        original="first = torch.where(scale.isnan(), torch.nan, _row_scale",
        replacement="first = torch.where(scale.isnan(), 1.0, _row_scale",
    ),
    _mutant(
        what="gradients made under no_grad",
        original="    grad = torch.is_grad_enabled()\n",
        replacement="    grad = True\n",
    ),
    _mutant(
        what="autocast ignored",
        original="if hidden.is_meta or not torch.is_autocast_enabled(device):",
        replacement="if True:",
    ),
    _mutant(
        what="the mean divides twice",
        original="        first, rest = scale, None\n",
        replacement="        first, rest = scale, scale\n",
    ),
    _mutant(
        what="one chunk where several were meant",
        original="chunk_bytes is None and single_chunk_saves_memory and max(rows, D) + D >= T",
        replacement="chunk_bytes is None and single_chunk_saves_memory",
    ),
    _mutant(
        what="the weight's buffer gets the gradient unscaled",
        original="ctx.weight_grad_VD.addcmul_(grads[1], factor)",
        replacement="ctx.weight_grad_VD.add_(grads[1])",
    ),
    _mutant(
        what="the weight's gradient twice",
        original="        wants[1] = False\n",
        replacement="",
    ),
    _mutant(
        what="statistics of the first chunk for all",
        original="values_RT[:, chunk], argmax_T[chunk] = values_RC, argmax_C",
        replacement="values_RT[:], argmax_T[:] = values_RC[:, :1], argmax_C[:1]",
    ),
    _rows(
        what="reference: no subtraction at the target",
        original="torch.where(owned_T, -hit_T, 0)[:, None])",
        replacement="torch.where(owned_T, 0 * hit_T, 0)[:, None])",
    ),
    _rows(
        what="reference: slope of the cap forgotten",
        original="            dx_TV.mul_(slope_TV)\n",
        replacement="            dx_TV.mul_(1)\n",
    ),
    _rows(
        what="reference: scale forgotten in the gradient",
        original="            dx_TV.mul_(options.logit_scale)\n",
        replacement="            dx_TV.mul_(1)\n",
    ),
    _rows(
        what="reference: ignored rows keep a gradient",
        original="            dx_TV[(target_T == options.ignore_index).nonzero()[:, 0]] = 0\n",
        replacement="            pass\n",
    ),
    _rows(
        what="reference: gradient of the z-loss forgotten",
        original="rate_T *= hit_T + values_RT[Row.MASS] + 2 * options.z_loss * w_T * lse_T",
        replacement="rate_T *= hit_T + values_RT[Row.MASS]",
    ),
    _rows(
        what="reference: a target outside the vocabulary counts",
        original="if (counts_T & ((target_T < 0) | (target_T >= n_classes))).any():",
        replacement="if False:",
    ),
    _rows(
        what="reference: bfloat16 gradient not copied back",
        original="            x_TV.copy_(dx_TV)\n",
        replacement="            pass\n",
    ),
    Mutant(
        what="a second derivative of gradients made in the forward pass is dropped",
        file="kernels/runtime.py",
        original="        if made_in_forward:\n",
        replacement="        if False:\n",
    ),
]
