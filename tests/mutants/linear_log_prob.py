"""Faults of linear_log_prob.py."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/linear_log_prob.py")
_padded = partial(Mutant, file="kernels/_padded_rows.py")

MUTANTS = [
    _mutant(
        what="the sign of the target's gradient",
        original="dz_t = dlog_prob * (1 - p_t)",
        replacement="dz_t = dlog_prob * (p_t - 1)",
    ),
    _mutant(
        what="the target's element as any other",
        original="dz_t = dlog_prob * (1 - p_t)",
        replacement="dz_t = -dlog_prob * p_t",
    ),
    _mutant(
        what="the target's element without its part of the entropy",
        original="dz_t -= dentropy * p_t * (",
        replacement="dz_t -= 0 * p_t * (",
    ),
    _mutant(
        what="the entropy's gradient without the entropy",
        original="dz_V -= dentropy * p_V * (tl.maximum(log_p_V, LEAST_GAP) + entropy)",
        replacement="dz_V -= dentropy * p_V * tl.maximum(log_p_V, LEAST_GAP)",
    ),
    _mutant(
        what="a probability of 0 times its logarithm",
        original="dz_V -= dentropy * p_V * (tl.maximum(log_p_V, LEAST_GAP) + entropy)",
        replacement="dz_V -= dentropy * p_V * (log_p_V + entropy)",
    ),
    _mutant(
        what="the sign of the entropy's gradient",
        original="dz_V -= dentropy * p_V",
        replacement="dz_V += dentropy * p_V",
    ),
    _mutant(
        what="slope of the cap forgotten",
        original="        dz_V *= 1 - u_V * u_V\n",
        replacement="        dz_V *= 1\n",
    ),
    _mutant(
        what="slope of the cap forgotten at the target",
        original="            dz_t *= 1 - (z_t / softcap) * (z_t / softcap)\n",
        replacement="            dz_t *= 1\n",
    ),
    _mutant(
        what="scale forgotten in the gradient",
        original="        dz_V *= logit_scale\n",
        replacement="        dz_V *= 1\n",
    ),
    _mutant(
        what="scale forgotten at the target",
        original="            dz_t *= logit_scale\n",
        replacement="            dz_t *= 1\n",
    ),
    _padded(
        what="padding columns get a gradient",
        original="        dz_V = tl.where(offs_V < V, dz_V, 0.0)\n",
        replacement="        dz_V += 0.0\n",
    ),
    _mutant(
        what="the last block skipped",
        original="        if full < V:\n",
        replacement="        if full > V:\n",
    ),
    _mutant(
        what="the first block skipped",
        original="        for v in range(0, full, BLOCK_V):\n            _store",
        replacement="        for v in range(BLOCK_V, full, BLOCK_V):\n            _store",
    ),
    _padded(
        what="an ignored row keeps its logits",
        original="    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < W - full)\n",
        replacement="    pass\n",
    ),
    _mutant(
        what="an unknown target has a gradient",
        original='        dlog_prob = tl.where(known, dlog_prob, float("nan"))\n',
        replacement="",
    ),
    _mutant(
        what="the incoming gradient of the first row for all",
        original="dlog_prob = tl.load(dlog_prob_ptr + t).to(ACC)",
        replacement="dlog_prob = tl.load(dlog_prob_ptr).to(ACC)",
    ),
    _mutant(
        what="the entropy of the first row for all",
        original="entropy = tl.load(entropy_ptr + t)",
        replacement="entropy = tl.load(entropy_ptr)",
    ),
    _mutant(
        what="the first chunk's incoming gradient for all",
        original="dlog_prob_T[chunk], None if",
        replacement="dlog_prob_T[: h_CD.shape[0]], None if",
    ),
    _mutant(
        what="the weight's gradient of the last chunk only",
        original="_product(x_CV.T, h_CD, dweight_VD, add=start > 0)",
        replacement="_product(x_CV.T, h_CD, dweight_VD)",
    ),
    _mutant(
        what="the bias's gradient of the last chunk only",
        original="dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)",
        replacement="dbias_V.copy_(x_CV.sum(0, dtype=dbias_V.dtype))",
    ),
    _mutant(
        what="dweight of a frozen head",
        original="        if want_weight:\n",
        replacement="        if want_weight or want_hidden:\n",
    ),
    _mutant(
        what="all logits at once",
        original="    for start in range(0, T, chunk_rows):\n",
        replacement="    chunk_rows = max(T, 1)\n"
        "    padded_CW = hidden_TD.new_zeros(T, -(-V // 64) * 64)\n"
        "    for start in range(0, T, chunk_rows):\n",
    ),
    _mutant(
        what="reference: the target's element as any other",
        original="    dz_CV.scatter_add_(",
        replacement="    (0 * dz_CV).scatter_add_(",
    ),
    _mutant(
        what="reference: ignored rows keep a gradient",
        original=".masked_fill_(ignored_C[:, None], 0))",
        replacement=")",
    ),
    _mutant(
        what="reference: slope of the cap forgotten",
        original="        dz_CV *= 1 - (z_CV / options.softcap).square_()\n",
        replacement="        dz_CV *= 1\n",
    ),
    _mutant(
        what="the bias left out of the recomputed logits",
        original="torch.addmm(bias_V, h_CD, weight_VD.T, out=x_CV)",
        replacement="torch.mm(h_CD, weight_VD.T, out=x_CV)",
    ),
]
