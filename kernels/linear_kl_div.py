"""Divergence of a linear layer's distribution from a teacher's, the logits of neither stored.

    x_TV = hidden_TD · weight_VDᵀ + bias_V, or softcap · tanh of it / softcap
    q_TV = softmax(x_TV / temperature), the student's          p_TV: the teacher's, likewise

    beta 0   KL(p ‖ q) = sum_V(p · (log p - log q)): forward, the one of PyTorch's kl_div
    beta 1   KL(q ‖ p) = sum_V(q · (log q - log p)): reverse
    between  beta · KL(p ‖ m) + (1 - beta) · KL(q ‖ m),  m = beta · p + (1 - beta) · q

the last the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649, GKD).
With z_TV = x_TV / temperature the gradients are

    beta 0  q - p      beta 1  q · (log q - log p - KL(q ‖ p))
    between (1 - beta) · q · (log q - log m - KL(q ‖ m))

and from there on as in linear_cross_entropy.py. T tokens, D features, V classes, C rows of a chunk:
2·C·V logits exist at a time, and the gradient overwrites the student's. Loss and gradient are
computed together: four products in all, two of the student's logits and the teacher's, two of the
gradients. With reduction "none" or in float16 the backward pass recomputes both logits: six.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels._kl_div_rows import OP, Divergence, divergence, log_softmax
from tritium.kernels._linear_cross_entropy import _products_dtype, check_layer, chunk_rows
from tritium.kernels._linear_kl_div import Tensors, check_mask, check_options, chunked, scale_of
from tritium.kernels.runtime import sees_through


def linear_kl_div_reference(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Compute `linear_kl_div` on `[T, D]` from all logits in plain PyTorch."""
    x_TV = F.linear(input, linear_weight, linear_bias)
    y_TV = F.linear(teacher_input, teacher_weight, teacher_bias).detach()
    log_q_TV = log_softmax(x_TV, temperature, softcap)
    loss_T = divergence(log_softmax(y_TV, temperature, teacher_softcap), log_q_TV, beta)
    loss_T = loss_T if mask is None else torch.where(mask, loss_T, 0)
    if reduction == "none":
        return loss_T
    return loss_T.sum() * scale_of(input, mask, reduction)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Compute the divergence of a linear layer's distribution over classes from a teacher's.

    With beta = 0 and log_q, log_p the logarithms of both softmaxes, equal to
    `torch.nn.functional.kl_div(log_q, log_p, log_target=True)` summed over the classes, but about
    `chunk_bytes` of logits exist at a time. Input, weight and bias have a gradient; nothing is
    computed for one that does not require it. The teacher has none. The sums over chunks are in
    float32, products and determinism as in `linear_cross_entropy`. To distil a model into another
    on the tokens that count:

        loss = linear_kl_div(hidden, head.weight, teacher_hidden, teacher_head.weight.detach(),
                             mask=labels != -100, temperature=2.0) * 2.0**2

    Probabilities below exp(-10,000), such as those of classes excluded by a bias of -inf, count as
    that. Inside torch.func, where torch.export traces and with TRITIUM_REFERENCE=1 all logits exist
    at once. The classes cannot be split over ranks.

    Args:
        input: the student's hidden states, `[..., D]`; float32, float16, bfloat16 or float64.
        linear_weight: the student's head, `[V, D]`, any of these dtypes.
        teacher_input: the teacher's hidden states of the same tokens, `[..., E]`; E may differ
            from D. Its products run in the dtype of the student's.
        teacher_weight: the teacher's head, `[V, E]`, over the same classes.
        linear_bias: `[V]` or None.
        teacher_bias: `[V]` or None.
        mask: bool, the leading axes of `input`; False where a token does not count. None: all do.
        reduction: "batchmean": the sum by the number of tokens that count; "sum"; or "none", one
            number per token, which costs two more products.
        beta: 0 for the forward KL divergence, 1 for the reverse, between for the generalised
            Jensen-Shannon divergence.
        temperature: divisor of all logits, behind the softcaps, above 0. The loss is not
            multiplied by its square.
        softcap: bound of the student's logits, softcap · tanh(logits / softcap), above 0; None for
            no bound. A class whose logit is -inf stays excluded, with either softcap.
        teacher_softcap: bound of the teacher's.
        chunk_bytes: budget of the two logits buffers in bytes; None for 1 GiB on a GPU, 4 MiB on
            a CPU.

    Returns:
        The divergence in nats: a scalar, or with reduction "none" the leading axes of `input`;
        float32 (float64 for float64 `input`). nan where "batchmean" has no token that counts.

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    check_options(OP, reduction, beta, temperature, softcap, teacher_softcap)
    check_layer(OP, input, linear_weight, linear_bias, None)
    V, D = linear_weight.shape
    shape = input.shape[:-1]
    _check_teacher(input, V, teacher_input, teacher_weight, teacher_bias)
    mask_T = check_mask(OP, mask, input)
    hidden_TD, dtype = input.reshape(-1, D), _products_dtype(input)
    teacher_hidden = teacher_input.reshape(-1, teacher_input.shape[-1])
    per_chunk = chunk_rows(OP, hidden_TD, 2 * V, dtype, False, chunk_bytes)
    layers = hidden_TD, linear_weight, linear_bias, teacher_hidden, teacher_weight, teacher_bias
    if runtime.REFERENCE or sees_through() or input.is_meta:
        biases = [None if x is None else x.to(dtype) for x in (linear_bias, teacher_bias)]
        with nullcontext() if input.is_meta else torch.autocast(input.device.type, enabled=False):
            loss = linear_kl_div_reference(
                hidden_TD.to(dtype), linear_weight.to(dtype), teacher_hidden.to(dtype),
                teacher_weight.to(dtype), linear_bias=biases[0], teacher_bias=biases[1],
                mask=mask_T, reduction=reduction, beta=beta, temperature=temperature,
                softcap=softcap, teacher_softcap=teacher_softcap,
            )  # fmt: skip
        return loss.view(shape) if reduction == "none" else loss
    options = Divergence(beta, temperature, softcap or 0.0, teacher_softcap or 0.0)
    tensors = Tensors(*layers, None, None, mask_T)
    return chunked(tensors, dtype, per_chunk, options, reduction, shape)


def _check_teacher(
    input: Tensor, V: int, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    E = hidden.shape[-1]
    if not hidden.is_floating_point() or hidden.shape[:-1] != input.shape[:-1]:
        wanted = f"floating point {[*input.shape[:-1], 'E']}".replace("'", "")
        raise ValueError(
            f"{OP}: teacher_input must be {wanted}, got {hidden.dtype} {list(hidden.shape)}"
        )
    if weight.shape != (V, E):
        raise ValueError(
            f"{OP}: teacher_weight must have shape {[V, E]}, one row per class of the student, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"{OP}: teacher_bias must have shape [{V}], got {list(bias.shape)}")
    named = zip(("input", "weight", "bias"), (hidden, weight, bias), strict=True)
    for name, x in ((f"teacher_{name}", x) for name, x in named):
        if x is not None and x.device != input.device:
            raise ValueError(f"{OP}: {name} is on {x.device}; move it to {input.device}")
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name} gets no gradient; pass {name}.detach()")
