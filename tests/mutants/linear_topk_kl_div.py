"""Faults of linear_topk_kl_div.py and its rows."""

from functools import partial

from tests.mutants import Mutant

_row = partial(Mutant, file="kernels/_topk_kl_div_rows.py")
_padded = partial(Mutant, file="kernels/_padded_rows.py")
_mutant = partial(Mutant, file="kernels/linear_topk_kl_div.py")

MUTANTS = [
    _row(
        what="the known classes count among the others, too",
        original="                 mask=known_K)  # fmt: skip\n",
        replacement="                 mask=known_K & (class_K < 0))\n",
    ),
    _row(
        what="the others are not one outcome",
        original="        z_K = tl.where(offs_K == K, row_m + log_s, z_K)\n",
        replacement="",
    ),
    _row(
        what="a class outside the vocabulary is left out",
        original='tl.where(unknown > 0, float("nan"), loss)',
        replacement="loss",
    ),
    _row(
        what="a class outside the vocabulary has a gradient",
        original='tl.where(unknown > 0, float("nan"), give)',
        replacement="give",
    ),
    _row(
        what="the gradient of the others without their probabilities",
        original="rest / row_s, rest * 0.0)",
        replacement="rest, rest * 0.0)",
    ),
    _row(
        what="no others make a nan",
        original="tl.where(row_s > 0, rest / row_s, rest * 0.0)",
        replacement="rest / row_s",
    ),
    _row(
        what="the others have no gradient",
        original="tl.where(row_s > 0, rest / row_s, rest * 0.0)",
        replacement="rest * 0.0",
    ),
    _row(
        what="the gradient by the divergence of another row",
        original="_terms(log_q_K, log_p_K, of_q, beta, KIND)",
        replacement="_terms(log_q_K, log_p_K, zero, beta, KIND)",
    ),
    _row(
        what="the teacher of the first row for all",
        original="log_p_ptr + t * (K + 1) + offs_K",
        replacement="log_p_ptr + offs_K",
    ),
    _row(
        what="the classes of the first row for all",
        original="indices_ptr + t * K + offs_K",
        replacement="indices_ptr + offs_K",
    ),
    _row(
        what="slope of the cap forgotten at the known classes",
        original="                dz_K = _through_cap(dz_K, z_K, inverse, softcap)\n",
        replacement="                dz_K *= 1\n",
    ),
    _row(
        what="slope of the cap forgotten at the others",
        original="        dz_V = _through_cap(dz_V, z_V, inverse, softcap)\n",
        replacement="        dz_V *= 1\n",
    ),
    _row(
        what="the cap brings excluded classes back",
        original='            z_K = tl.where(x_K == float("-inf"), x_K, z_K)\n',
        replacement="            z_K *= 1\n",
    ),
    _padded(
        what="padding columns get a gradient",
        original="        dz_V = tl.where(offs_V < V, dz_V, 0.0)\n",
        replacement="        dz_V = tl.where(offs_V < V, dz_V, 1.0)\n",
    ),
    _row(
        what="the last block skipped",
        original="            if full < V:\n                _store_rest",
        replacement="            if full > V:\n                _store_rest",
    ),
    _padded(
        what="an ignored row keeps its logits",
        original="    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < W - full)\n",
        replacement="    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < 0)\n",
    ),
    _row(
        what="beta and its complement exchanged",
        original="loss = beta * of_p + (1 - beta) * of_q",
        replacement="loss = (1 - beta) * of_p + beta * of_q",
    ),
    _row(
        what="reference: the gradient of the others without their probabilities",
        original=".softmax(-1).nan_to_num_(0).mul_(",
        replacement=".sign().nan_to_num_(0).mul_(",
    ),
    _row(
        what="reference: no others make a nan",
        original=".nan_to_num_(0)",
        replacement="",
    ),
    _row(
        what="reference: ignored rows keep a gradient",
        original="dz_CV if ignored_C is None else ",
        replacement="dz_CV if True else ",
    ),
    _mutant(
        what="what the teacher leaves of 1 is dropped",
        original="    if tail:\n        rest_T1",
        replacement="    if False:\n        rest_T1",
    ),
    _mutant(
        what="the K probabilities do not sum to 1",
        original="        log_p_TK = log_p_TK.log_softmax(-1)\n",
        replacement="",
    ),
]
