"""Divergence of a linear layer's distribution from the likeliest classes of a teacher's.

What a teacher leaves on a disk: of each token the K likeliest classes and the logarithms of their
probabilities. The other classes are one outcome, of probability 0 where those of the K are made to
sum to 1 (tail=False), or what they leave of 1 (tail=True):

    q_TK: the student's probabilities of the K classes, and of all others together
    p_TK: the teacher's, likewise         loss_T: as in `linear_kl_div`, of these K + 1 outcomes

With tail=False that is the divergence over all classes from the teacher's K, as each other class
adds what it adds to their sum. T tokens, D features, V classes, C rows of a chunk: C·V logits exist
at a time. Three products in all, or four where the backward pass recomputes them.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels._cross_entropy_options import INTEGERS
from tritium.kernels._kl_div_rows import Divergence, divergence, scores
from tritium.kernels._linear_cross_entropy import _products_dtype, check_layer, chunk_rows
from tritium.kernels._linear_kl_div import Tensors, check_mask, check_options, chunked, scale_of
from tritium.kernels._topk_kl_div_rows import LOWEST_GAP, outcomes_reference
from tritium.kernels.runtime import sees_through

OP = "linear_topk_kl_div"
MOST = 1023  # classes of a teacher: a program holds them at once


def linear_topk_kl_div_reference(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    log_prob: Tensor,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    tail: bool = False,
) -> Tensor:
    """Compute `linear_topk_kl_div` on `[T, D]` from all logits in plain PyTorch."""
    z_TV = scores(F.linear(input, linear_weight, linear_bias), temperature, softcap)
    log_p_TK = _with_rest(log_prob, tail, z_TV.dtype)
    loss_T = divergence(log_p_TK, outcomes_reference(z_TV, indices), beta)
    loss_T = loss_T if mask is None else torch.where(mask, loss_T, 0)
    if reduction == "none":
        return loss_T
    return loss_T.sum() * scale_of(input, mask, reduction)


def _with_rest(log_prob_TK: Tensor, tail: bool, dtype: torch.dtype) -> Tensor:
    """Return `[T, K + 1]`: the logarithms of the teacher's K probabilities, and of the rest.

    They are computed and returned in the accumulator of `dtype`, that of the student's logits.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    log_p_TK = log_prob_TK.detach().to(torch.promote_types(log_prob_TK.dtype, dtype))
    if tail:
        rest_T1 = (1 - log_p_TK.exp().sum(-1, keepdim=True)).clamp_min(0).log()
    else:
        log_p_TK = log_p_TK.log_softmax(-1)
        rest_T1 = log_p_TK.new_full((len(log_p_TK), 1), -torch.inf)
    return torch.cat([log_p_TK, rest_T1], 1).clamp_min(LOWEST_GAP).to(dtype)


def linear_topk_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    indices: Tensor,
    log_prob: Tensor,
    *,
    linear_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    tail: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute the divergence of a linear layer's distribution from a teacher's likeliest classes.

    As `linear_kl_div`, where the teacher is stored as `log_prob, indices = log_p.topk(K)`. Input,
    weight and bias have a gradient.

    Args:
        input: the student's hidden states, `[..., D]`; float32, float16, bfloat16 or float64.
        linear_weight: the student's head, `[V, D]`, any of these dtypes.
        indices: classes that the teacher names, `[..., K]`, any integer dtype, K at most 1,023,
            those of a token all different. One outside [0, V) raises in the reference; in the
            kernel that token's loss and gradient are nan.
        log_prob: the logarithms of their probabilities, `[..., K]`, at the temperature of the
            loss; -inf for none.
        linear_bias: `[V]` or None.
        mask: bool, the leading axes of `input`; False where a token does not count. None: all do.
        reduction: "batchmean", "sum" or "none", as in `linear_kl_div`.
        beta: 0 for the forward KL divergence, 1 for the reverse, between for the generalised
            Jensen-Shannon divergence. 1 needs the tail.
        temperature: divisor of the student's logits, behind the softcap, above 0.
        softcap: bound of the student's logits, softcap · tanh(logits / softcap), above 0; None for
            no bound. A class whose logit is -inf stays excluded.
        tail: False: the K probabilities are divided by their sum, other classes have none. True:
            what they leave of 1 is the probability of all other classes together, which the
            student's is compared with.
        chunk_bytes: budget of the logits buffer in bytes; None for 1 GiB on a GPU, 4 MiB on a CPU.

    Returns:
        The divergence in nats: a scalar, or with reduction "none" the leading axes of `input`;
        float32 (float64 for float64 `input`). nan where "batchmean" has no token that counts.

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    check_options(OP, reduction, beta, temperature, softcap)
    check_layer(OP, input, linear_weight, linear_bias, None)
    V, D = linear_weight.shape
    shape = input.shape[:-1]
    _check_classes(input, V, indices, log_prob)
    if beta == 1 and not tail:
        raise ValueError(
            f"{OP}: beta = 1 needs tail=True: the reverse divergence from classes without "
            "probability is infinite"
        )
    mask_T = check_mask(OP, mask, input)
    hidden_TD, dtype = input.reshape(-1, D), _products_dtype(input)
    per_chunk = chunk_rows(OP, hidden_TD, V, dtype, False, chunk_bytes)
    indices_TK = indices.reshape(-1, indices.shape[-1]).long().contiguous()
    log_prob_TK = log_prob.reshape(-1, indices.shape[-1])
    if runtime.REFERENCE or sees_through() or input.is_meta:
        bias = None if linear_bias is None else linear_bias.to(dtype)
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            loss = linear_topk_kl_div_reference(
                hidden_TD.to(dtype), linear_weight.to(dtype), indices_TK, log_prob_TK,
                linear_bias=bias, mask=mask_T, reduction=reduction, beta=beta,
                temperature=temperature, softcap=softcap, tail=tail,
            )  # fmt: skip
        return loss.view(shape) if reduction == "none" else loss
    options = Divergence(beta, temperature, softcap or 0.0, 0.0)
    log_p_TK = _with_rest(log_prob_TK, tail, dtype)
    tensors = Tensors(
        hidden_TD, linear_weight, linear_bias, None, None, None, indices_TK, log_p_TK, mask_T
    )
    return chunked(tensors, dtype, per_chunk, options, reduction, shape)


def _check_classes(input: Tensor, V: int, indices: Tensor, log_prob: Tensor) -> None:
    K = indices.shape[-1]
    if indices.dtype not in INTEGERS or indices.shape[:-1] != input.shape[:-1]:
        wanted = f"integers {[*input.shape[:-1], 'K']}".replace("'", "")
        raise ValueError(
            f"{OP}: indices must be {wanted}, got {indices.dtype} {list(indices.shape)}"
        )
    if not 1 <= K <= min(MOST, V):
        raise ValueError(
            f"{OP}: indices must name 1 to {min(MOST, V)} classes of a token, got {K}; "
            "probabilities of all classes are targets of linear_cross_entropy"
        )
    if not log_prob.is_floating_point() or log_prob.shape != indices.shape:
        raise ValueError(
            f"{OP}: log_prob must be floating point {list(indices.shape)}, one for each index, "
            f"got {log_prob.dtype} {list(log_prob.shape)}"
        )
    for name, x in (("indices", indices), ("log_prob", log_prob)):
        if x.device != input.device:
            raise ValueError(f"{OP}: {name} is on {x.device}; move it to {input.device}")
    if log_prob.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{OP}: log_prob gets no gradient; pass log_prob.detach()")
