"""Faults of linear_kl_div.py and its rows."""

from functools import partial

from tests.mutants import Mutant

_row = partial(Mutant, file="kernels/_kl_div_rows.py")
_padded = partial(Mutant, file="kernels/_padded_rows.py")
_chunks = partial(Mutant, file="kernels/_linear_kl_div.py")
_mutant = partial(Mutant, file="kernels/linear_kl_div.py")

MUTANTS = [
    _row(
        what="the sign of the forward gradient",
        original="        dz_V = q_V - p_V\n",
        replacement="        dz_V = p_V - q_V\n",
    ),
    _row(
        what="the forward loss weighed by the student",
        original="terms_p_V = p_V * -ratio_V",
        replacement="terms_p_V = q_V * -ratio_V",
    ),
    _row(
        what="the reverse gradient without the divergence",
        original="dz_V = q_V * (q_to_m_V - row_of_q)",
        replacement="dz_V = q_V * q_to_m_V",
    ),
    _row(
        what="the reverse loss weighed by the teacher",
        original="return dz_V, terms_p_V, q_V * q_to_m_V",
        replacement="return dz_V, terms_p_V, p_V * q_to_m_V",
    ),
    _row(
        what="the loss of p between, by the ratio of q",
        original="        terms_p_V = p_V * (q_to_m_V - ratio_V)",
        replacement="        terms_p_V = p_V * q_to_m_V",
    ),
    _row(
        what="the gradient between without its weight",
        original="            dz_V *= 1 - beta\n",
        replacement="            dz_V *= 1\n",
    ),
    _row(
        what="the mixture's weights exchanged where q is larger",
        original="tl.where(larger_q, beta * shrunk_V + (1 - beta), ",
        replacement="tl.where(larger_q, (1 - beta) * shrunk_V + beta, ",
    ),
    _row(
        what="the mixture's weights exchanged where p is larger",
        original=", beta + (1 - beta) * shrunk_V)",
        replacement=", (1 - beta) + beta * shrunk_V)",
    ),
    _row(
        what="beta and its complement exchanged in the loss",
        original="beta * row_of_p + (1 - beta) * row_of_q)",
        replacement="(1 - beta) * row_of_p + beta * row_of_q)",
    ),
    _row(
        what="an excluded class has no least logarithm",
        original="log_q_V = tl.maximum((x_V - m_x) - log_s_x, LEAST)",
        replacement="log_q_V = (x_V - m_x) - log_s_x",
    ),
    _row(
        what="a class that the teacher excludes has no least logarithm",
        original="log_p_V = tl.maximum((y_V - m_y) - log_s_y, LEAST)",
        replacement="log_p_V = (y_V - m_y) - log_s_y",
    ),
    _row(
        what="padding counts as classes",
        original='    return tl.where(offs_V < V, z_V, float("-inf")) if MASKED else z_V\n',
        replacement="    return z_V\n",
    ),
    _padded(
        what="padding columns get a gradient",
        original="        dz_V = tl.where(offs_V < V, dz_V, 0.0)\n",
        replacement="        dz_V = tl.where(offs_V < V, dz_V, 1.0)\n",
    ),
    _row(
        what="the sums are not rescaled to a new maximum",
        original="    s = s * tl.exp2((m - new_m) * LOG2_E)\n",
        replacement="    s = s * 1.0\n",
    ),
    _row(
        what="slope of the cap forgotten",
        original="dz_V * (1 - u_V * u_V))",
        replacement="dz_V)",
    ),
    _row(
        what="slope of the cap at the scaled logits",
        original="u_V = z_V / (inverse * softcap)",
        replacement="u_V = z_V / softcap",
    ),
    _row(
        what="the student's cap for the teacher",
        original="_scores(y_ptr, offs_V, V, W, inverse, teacher_softcap, ",
        replacement="_scores(y_ptr, offs_V, V, W, inverse, softcap, ",
    ),
    _row(
        what="temperature forgotten in the gradient",
        original="give = inverse * tl.load(",
        replacement="give = tl.load(",
    ),
    _row(
        what="temperature as a factor",
        original="    inverse = 1 / tl.full((), temperature, ACC)\n",
        replacement="    inverse = tl.full((), temperature, ACC)\n",
    ),
    _row(
        what="the incoming gradient of the first row for all",
        original="tl.load(dloss_ptr + t * stride_dlossC)",
        replacement="tl.load(dloss_ptr)",
    ),
    _padded(
        what="an ignored row keeps its logits",
        original="    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < W - full)\n",
        replacement="    tl.store(x_ptr + full + offs_V, zero_V, mask=offs_V < 0)\n",
    ),
    _padded(
        what="an ignored row keeps its first blocks",
        original="        tl.store(x_ptr + v + offs_V, zero_V)\n",
        replacement="        pass\n",
    ),
    _row(
        what="all rows count",
        original="        counts = tl.load(counts_ptr + t) != 0\n",
        replacement="        counts = tl.load(counts_ptr + t) >= 0\n",
    ),
    _row(
        what="reference: the gradient without the divergence",
        original="dz_CV = q_CV * (gap_CV - (q_CV * gap_CV).sum(1, keepdim=True))",
        replacement="dz_CV = q_CV * gap_CV",
    ),
    _row(
        what="reference: the gradient between without its weight",
        original="return dz_CV if beta == 1 else dz_CV.mul_(1 - beta)",
        replacement="return dz_CV",
    ),
    _row(
        what="reference: slope of the cap forgotten",
        original="        dz_CV *= 1 - (final_logits(",
        replacement="        dz_CV *= 1 - 0 * (final_logits(",
    ),
    _row(
        what="reference: ignored rows keep a gradient",
        original="dz_CV if ignored_C is None else ",
        replacement="dz_CV if True else ",
    ),
    _chunks(
        what="the first chunk's teacher for all",
        original="_logits(teacher_hidden[chunk], ",
        replacement="_logits(teacher_hidden[: h_CD.shape[0]], ",
    ),
    _chunks(
        what="the first chunk's mask for all",
        original="None if counts_T is None else counts_T[chunk]",
        replacement="None if counts_T is None else counts_T[: h_CD.shape[0]]",
    ),
    _chunks(
        what="the weight's gradient of the last chunk only",
        original="_product(x_CV.T, h_CD, dweight_VD, add=start > 0)",
        replacement="_product(x_CV.T, h_CD, dweight_VD)",
    ),
    _chunks(
        what="the bias's gradient of the last chunk only",
        original="dbias_V += x_CV.sum(0, dtype=dbias_V.dtype)",
        replacement="dbias_V.copy_(x_CV.sum(0, dtype=dbias_V.dtype))",
    ),
    _chunks(
        what="dweight of a frozen head",
        original="        if want_weight:\n",
        replacement="        if want_weight or want_hidden:\n",
    ),
    _chunks(
        what="dhidden of a frozen hidden state",
        original="        if want_hidden:\n",
        replacement="        if want_hidden or want_weight:\n",
    ),
    _chunks(
        what="all logits at once",
        original="    buffers = hidden_TD.new_empty(",
        replacement="    chunk_rows = max(T, 1)\n    buffers = hidden_TD.new_empty(",
    ),
    _mutant(
        what="one buffer's worth of rows for two buffers",
        original="chunk_rows(OP, hidden_TD, 2 * V, dtype",
        replacement="chunk_rows(OP, hidden_TD, V, dtype",
    ),
    _chunks(
        what="float16 gradients before their loss scale",
        original=" and dtype != torch.float16:",
        replacement=":",
    ),
    _chunks(
        what="the mean over masked tokens, too",
        original="if mask_T is None else mask_T.to(dtype)",
        replacement="if True else mask_T",
    ),
]
