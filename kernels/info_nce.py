"""InfoNCE, the contrastive loss of paired embeddings, without storing all similarities.

    s_BB   = (query_BD / τ) · key_BDᵀ, of rows normalised to length 1
    loss_B = -log(exp(s_bb) / sum_j(exp(s_bj)))

which is a linear cross-entropy whose weight is the keys and whose target is the diagonal: chunks of
the similarities exist, in _linear_cross_entropy.py, never all. Symmetric: the mean of this and the
same with query and key exchanged.

B pairs, D features.

van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.
https://arxiv.org/abs/1807.03748; symmetric: Radford et al., "Learning Transferable Visual Models
From Natural Language Supervision", 2021, https://arxiv.org/abs/2103.00020
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels._cross_entropy_options import LossOptions, check_options
from tritium.kernels._linear_cross_entropy import linear_loss


def info_nce_reference(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    normalize: bool = True,
    negatives: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `info_nce` in plain PyTorch from the full matrix of similarities."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q_BD, k_BD = query.to(wide), key.to(wide)
    if normalize:
        q_BD, k_BD = F.normalize(q_BD, dim=-1), F.normalize(k_BD, dim=-1)
    s_BB = ((q_BD / temperature).to(query.dtype) @ k_BD.to(query.dtype).mT).to(wide)
    diagonal = torch.arange(s_BB.shape[0], device=s_BB.device)
    if negatives is not None:
        excluded_BB = ~negatives & (diagonal[:, None] != diagonal)
        s_BB = s_BB.masked_fill(excluded_BB, -torch.inf)
    loss = F.cross_entropy(s_BB, diagonal, reduction=reduction)
    if symmetric:
        loss = (loss + F.cross_entropy(s_BB.mT, diagonal, reduction=reduction)) / 2
    return loss


@overload
def info_nce(
    query: Tensor, key: Tensor, *, temperature: float | Tensor = 0.07, symmetric: bool = False,
    normalize: bool = True, negatives: Tensor | None = None, reduction: str = "mean",
    chunk_bytes: int | None = None, return_accuracy: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def info_nce(
    query: Tensor, key: Tensor, *, temperature: float | Tensor = 0.07, symmetric: bool = False,
    normalize: bool = True, negatives: Tensor | None = None, reduction: str = "mean",
    chunk_bytes: int | None = None, return_accuracy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    symmetric: bool = False,
    normalize: bool = True,
    negatives: Tensor | None = None,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the InfoNCE loss of pairs `(query[b], key[b])` against all other keys of the batch.

    Memory grows with the batch, not with its square: at most `chunk_bytes` of similarities exist at
    a time. `symmetric` computes them twice, six products in all. Deterministic.

    Args:
        query: `[B, D]`; float32, float16, bfloat16 or float64.
        key: the shape, dtype and device of `query`.
        temperature: divides the similarities; a number above 0, or a scalar tensor, which may
            require a gradient.
        symmetric: add the same loss of each key against all queries, and halve the sum.
        normalize: divide every row by its length first, in float32.
        negatives: `[B, B]` bool, False where key j is no negative for query i (a duplicate, a pair
            of the same class); the diagonal counts in any case. None: every other key is one.
        reduction: "mean", "sum" or "none"; "none" costs a fourth product each way.
        chunk_bytes: budget of the similarities in bytes, as in `linear_cross_entropy`.
        return_accuracy: return `(loss, accuracy)`, where accuracy is a scalar: the share of queries
            (and keys, if `symmetric`) whose most similar counterpart is their own.

    Returns:
        The loss in nats: a scalar, or with reduction "none" `[B]`; float32 (float64 for float64).

    Raises:
        ValueError: an argument has another shape, dtype or range than documented above.
    """
    check_options("info_nce", reduction, 0.0, 0.0, None, 1.0)
    _validate(query, key, temperature, negatives)
    wide = torch.promote_types(query.dtype, torch.float32)
    q_BD, k_BD = query.to(wide), key.to(wide)
    if normalize:
        q_BD, k_BD = F.normalize(q_BD, dim=-1), F.normalize(k_BD, dim=-1)
    q_BD = q_BD / temperature  # its gradient by autograd costs B·D here
    excluded_BB = None
    if negatives is not None:
        excluded_BB = ~negatives
        excluded_BB.fill_diagonal_(False)
    options = LossOptions(-100, 0.0, 0.0, 0.0, 1.0, stats=return_accuracy)
    pairs = [(q_BD, k_BD, excluded_BB)]
    if symmetric:
        pairs.append((k_BD, q_BD, None if excluded_BB is None else excluded_BB.mT))
    target_B = torch.arange(query.shape[0], device=query.device)
    results = [
        linear_loss(
            "info_nce", a.to(query.dtype), b.to(query.dtype), target_B, None, None, excluded,
            options, reduction, chunk_bytes, None, None,
        )
        for a, b, excluded in pairs
    ]  # fmt: skip
    if not return_accuracy:
        return torch.stack(results).mean(0)
    losses, stats = zip(*results, strict=True)
    accuracies = [each.accuracy for each in stats]
    return torch.stack(losses).mean(0), torch.stack(accuracies).mean(0)


def _validate(
    query: Tensor, key: Tensor, temperature: float | Tensor, negatives: Tensor | None
) -> None:
    for what in ("shape", "dtype", "device"):
        a, b = getattr(query, what), getattr(key, what)
        if a != b:
            raise ValueError(f"info_nce: query and key must have one {what}, got {a} and {b}")
    if query.dim() != 2 or not query.is_floating_point():
        raise ValueError(
            f"info_nce: query must be floating point [B, D], got {query.dtype} {list(query.shape)}"
        )
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0:
            raise ValueError(
                f"info_nce: temperature must be a scalar, got shape {list(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"info_nce: temperature must be above 0, got {temperature}")
    if negatives is not None:
        B = query.shape[0]
        if negatives.shape != (B, B) or negatives.dtype != torch.bool:
            raise ValueError(
                f"info_nce: negatives must be bool [{B}, {B}], "
                f"got {negatives.dtype} {list(negatives.shape)}"
            )
        if negatives.device != query.device:
            raise ValueError(
                f"info_nce: negatives is on {negatives.device}; move it to {query.device}"
            )
