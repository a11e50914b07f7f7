"""Heads beyond language: a class, numbers or an embedding for each sequence, on a Transformer.

Each holds a `Transformer` and calls its `hidden`, whose output it pools:

    last: h of the sequence's last token, the one that has read all others
    mean: the mean of h over the sequence's tokens

Sequences of different lengths are padded at their end. Attention is causal, so no token reads
what is behind it, and pooling takes a sequence's own tokens alone: what is in the padding changes
neither a result nor a gradient.

Axes: B sequences, L tokens of the longest, D model width, V classes.

The last token's: Radford et al., "Improving Language Understanding by Generative Pre-Training",
2018. The mean: Reimers & Gurevych, "Sentence-BERT", 2019, https://arxiv.org/abs/1908.10084
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritium.kernels import cross_entropy, info_nce, mse_loss
from tritium.model.transformer import Transformer

Pooling = Literal["last", "mean"]


def pad_sequences(
    sequences: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return sequences of ids as one batch: `[B, L]`, padded at the end by 0, and lengths `[B]`.

    Args:
        sequences: of at least one id each; lists, or tensors `[L]`.
        device: where both go.

    Raises:
        ValueError: there is no sequence, or one is empty or no row of ids.
    """
    rows = [torch.as_tensor(row, device=device) for row in sequences]
    for i, row in enumerate(rows):
        if row.dim() != 1 or not len(row) or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "pad_sequences: a sequence must be one row of at least one id, got "
                f"{list(row.shape)} in {row.dtype} for number {i}; leave it out, or let each begin "
                "with a token such as the end of text"
            )
    if not rows:
        raise ValueError("pad_sequences: there must be at least one sequence, got none")
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True), lengths


class _Pooled(nn.Module):
    """A Transformer, the pooling of its output, and a linear layer.

    Attributes:
        transformer: the model. `requires_grad_(False)` freezes it; its output layer is not used.
        linear: the layer behind the pooling.
    """

    def __init__(self, transformer: Transformer, linear: nn.Module, pooling: Pooling):
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(
                f"{type(self).__name__}: pooling must be one of {', '.join(get_args(Pooling))}, "
                f"got {pooling!r}"
            )
        self.transformer = transformer
        self.pooling: Pooling = pooling
        self.linear = linear.to(transformer.device, transformer.dtype)

    def _pooled(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Return `linear` of the pooled hidden states."""
        _check_lengths(type(self).__name__, tokens, lengths)
        h_BLD = self.transformer.hidden(tokens)
        return self.linear(_pool(h_BLD, lengths, self.pooling))


class Classifier(_Pooled):
    """A Transformer that assigns each sequence to a class.

    Without a bias, and the last token's output pooled, it is transformers'
    `LlamaForSequenceClassification` and its like, whose `score.weight` is `linear.weight`.

    Args:
        transformer: the model that reads the sequences; trained with the head, unless frozen.
        num_classes: V.
        pooling: "last" or "mean".
        bias: whether the linear layer has a bias.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, transformer: Transformer, num_classes: int, *, pooling: Pooling = "last",
        bias: bool = True,
    ):  # fmt: skip
        _check_width("Classifier", "num_classes", num_classes)
        super().__init__(
            transformer, nn.Linear(transformer.config.d_model, num_classes, bias), pooling
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute logits, or the loss where `targets` are given.

        Args:
            tokens: `[B, L]` ids, int64 or int32.
            targets: `[B]` classes, -100 where a sequence does not count, or `[B, V]` probabilities.
            lengths: `[B]` numbers of ids in each row, from 1 to L, whole numbers; what is behind
                them is padding. On a GPU their range is not checked. None: all are L.

        Returns:
            Without targets: logits `[B, V]`. With targets: their mean cross-entropy in nats, a
            float32 scalar (float64 for float64).

        Raises:
            ValueError: an argument has another shape, dtype or range.
        """
        logits_BV = self._pooled(tokens, lengths)
        return logits_BV if targets is None else cross_entropy(logits_BV, targets)


class Regressor(_Pooled):
    """A Transformer that predicts numbers from each sequence.

    Args:
        transformer: the model that reads the sequences; trained with the head, unless frozen.
        out_features: how many numbers.
        pooling: "last" or "mean".
        bias: whether the linear layer has a bias.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, transformer: Transformer, out_features: int = 1, *, pooling: Pooling = "last",
        bias: bool = True,
    ):  # fmt: skip
        _check_width("Regressor", "out_features", out_features)
        super().__init__(
            transformer, nn.Linear(transformer.config.d_model, out_features, bias), pooling
        )

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute predictions, or the loss where `targets` are given.

        Args:
            tokens: as `Classifier` takes them.
            targets: `[B, out_features]`, floating point: of the predictions' shape, nothing is
                broadcast.
            lengths: as `Classifier` takes them.

        Returns:
            Without targets: predictions `[B, out_features]`. With targets: the mean of the squared
            differences, a float32 scalar (float64 for float64).

        Raises:
            ValueError: an argument has another shape, dtype or range.
        """
        prediction = self._pooled(tokens, lengths)
        if targets is None:
            return prediction
        if targets.shape != prediction.shape:
            raise ValueError(
                f"Regressor: targets must be [B, out_features], {list(prediction.shape)}, got "
                f"{list(targets.shape)}; reshape them"
            )
        return mse_loss(prediction, targets)


class Embedder(_Pooled):
    """A Transformer that maps each sequence to a vector of length 1, trained on pairs by InfoNCE.

    Args:
        transformer: the model that reads the sequences; trained with the head, unless frozen.
        out_features: width of the vectors. None: D, without a linear layer.
        pooling: "mean" or "last".
        temperature: of the loss; a number, or a scalar `nn.Parameter` to be learned too.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, transformer: Transformer, out_features: int | None = None, *,
        pooling: Pooling = "mean", temperature: float | Tensor = 0.07,
    ):  # fmt: skip
        linear = nn.Identity()
        if out_features is not None:
            _check_width("Embedder", "out_features", out_features)
            linear = nn.Linear(transformer.config.d_model, out_features, bias=False)
        super().__init__(transformer, linear, pooling)
        self.temperature = temperature

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute embeddings `[B, out_features]`, float32 (float64 for float64), of length 1.

        Their products are cosines, between -1 and 1.

        Args:
            tokens: as `Classifier` takes them.
            lengths: as `Classifier` takes them.

        Raises:
            ValueError: an argument has another shape, dtype or range.
        """
        x = self._pooled(tokens, lengths)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def loss(self, query: Tensor, key: Tensor, *, negatives: Tensor | None = None) -> Tensor:
        """Compute the symmetric InfoNCE of embeddings of pairs, a scalar in nats.

        Args:
            query: `[B, out_features]`, embeddings.
            key: those of what belongs to each; all others of the batch do not.
            negatives: `[B, B]` bool, False where key j belongs to query i too.

        Raises:
            ValueError: an argument has another shape, dtype or range.
        """
        return info_nce(
            query, key, temperature=self.temperature, symmetric=True, negatives=negatives
        )


def _pool(h_BLD: Tensor, lengths: Tensor | None, pooling: Pooling) -> Tensor:
    B, L, D = h_BLD.shape
    wide = torch.promote_types(h_BLD.dtype, torch.float32)
    if lengths is None:
        return h_BLD[:, -1] if pooling == "last" else h_BLD.mean(1, dtype=wide).to(h_BLD.dtype)
    length_B1 = lengths.long().unsqueeze(-1)
    if pooling == "last":
        return h_BLD.gather(1, (length_B1 - 1).unsqueeze(-1).expand(B, 1, D)).squeeze(1)
    padding_BL = torch.arange(L, device=h_BLD.device) >= length_B1
    sum_BD = h_BLD.masked_fill(padding_BL.unsqueeze(-1), 0).sum(1, dtype=wide)
    return (sum_BD / length_B1).to(h_BLD.dtype)


def _check_width(head: str, name: str, width: int) -> None:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"{head}: {name} must be a whole number of at least 1, got {width!r}")


def _check_lengths(head: str, tokens: Tensor, lengths: Tensor | None) -> None:
    if tokens.dim() == 2 and not tokens.shape[1]:
        raise ValueError(
            f"{head}: tokens must be [B, L] with L of at least 1, got {list(tokens.shape)}"
        )
    if lengths is None or tokens.dim() != 2:  # which `hidden` refuses
        return
    B, L = tokens.shape
    if lengths.shape != (B,) or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{head}: lengths must be [B] whole numbers, [{B}] in int64 or int32, got "
            f"{list(lengths.shape)} in {lengths.dtype}; pad_sequences returns them"
        )
    if lengths.device != tokens.device:
        raise ValueError(
            f"{head}: lengths must be on the device of tokens, {tokens.device}, got "
            f"{lengths.device}; move them"
        )
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not B:
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 1 or high > L:
        raise ValueError(
            f"{head}: lengths must be in [1, {L}], the ids of a row, got "
            f"{low if low < 1 else high}; leave empty sequences out"
        )
