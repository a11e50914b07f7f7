"""Faults of kernels/linear_cross_entropy.py: chunks, products, scales, the stand-in on a CPU."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/linear_cross_entropy.py")

MUTANTS = [
    _mutant(
        what="the last chunk skipped",
        original="for start in range(0, T, chunk_rows):",
        replacement="for start in range(0, max(T - chunk_rows, 1), chunk_rows):",
    ),
    _mutant(
        what="weight gradient of the last chunk only",
        original="            _add_product(dweight_VD, x_CV.T, h_CD)",
        replacement="            _add_product(dweight_VD.zero_(), x_CV.T, h_CD)",
    ),
    _mutant(
        what="weight gradient summed in the dtype of the weight",
        original="weight.new_empty(weight.shape if want_weight else 0, dtype=acc)",
        replacement="weight.new_empty(weight.shape if want_weight else 0)",
    ),
    _mutant(
        what="gradient sums not cleared",
        original="    dweight_VD.zero_()\n",
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
        original="dloss_C = None if dloss_T is None else dloss_T[rows]",
        replacement="dloss_C = None if dloss_T is None else dloss_T[: h_CD.shape[0]]",
    ),
    _mutant(
        what="incoming gradient ignored",
        original="(g.to(dloss.dtype) * dloss).to(dtype)",
        replacement="g.to(dtype)",
    ),
    _mutant(
        what="a mean over all targets",
        original="total = token_weights(target_T, class_weight_V, ignore_index, loss.dtype).sum()",
        replacement="total = token_weights(target_T, class_weight_V, -1 << 40, loss.dtype).sum()",
    ),
    _mutant(
        what="gradient of nothing is nan",
        original='divisor = torch.where(total == 0, float("inf"), total)',
        replacement="divisor = total",
    ),
    _mutant(
        what="gradients made under no_grad",
        original="    grad = torch.is_grad_enabled()\n",
        replacement="    grad = True\n",
    ),
    _mutant(
        what="autocast ignored",
        original="torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else",
        replacement="torch.get_autocast_dtype(device) if False else",
    ),
    _mutant(
        what="stand-in: no subtraction at the target",
        original="(-(1 - smoothing) * w_T)[:, None])",
        replacement="(0 * w_T)[:, None])",
    ),
    _mutant(
        what="stand-in: slope of the cap forgotten",
        original="        dx_TV.mul_(slope_TV)\n",
        replacement="        dx_TV.mul_(1)\n",
    ),
    _mutant(
        what="stand-in: ignored rows keep a gradient",
        original="    dx_TV[ignored_T] = 0\n",
        replacement="",
    ),
    _mutant(
        what="stand-in: gradient of the z-loss forgotten",
        original="total_T = (1 - smoothing) * w_T + 2 * z_loss * w_T * lse_T",
        replacement="total_T = (1 - smoothing) * w_T + 0 * lse_T",
    ),
    _mutant(
        what="stand-in: a target outside the vocabulary counts",
        original="if ((t_T1 < 0) | (t_T1 >= V)).any():",
        replacement="if False:",
    ),
    _mutant(
        what="stand-in: bfloat16 gradient not copied back",
        original="        x_TV.copy_(dx_TV)\n",
        replacement="        pass\n",
    ),
]
