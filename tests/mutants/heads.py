"""Faults of model/heads.py: padding, pooling, losses, and what is accepted."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="model/heads.py")

MUTANTS = [
    _mutant(
        what="padding counts in the mean",
        original="h_BLD.masked_fill(padding_BL.unsqueeze(-1), 0).sum(1, dtype=wide)",
        replacement="h_BLD.sum(1, dtype=wide)",
    ),
    _mutant(
        what="the mean over the longest sequence",
        original="return (sum_BD / length_B1).to(h_BLD.dtype)",
        replacement="return (sum_BD / L).to(h_BLD.dtype)",
    ),
    _mutant(
        what="the last token left out of the mean",
        original=">= length_B1\n",
        replacement=">= length_B1 - 1\n",
    ),
    _mutant(
        what="the first token of padding in the mean",
        original=">= length_B1\n",
        replacement="> length_B1\n",
    ),
    _mutant(
        what="the last but one token pooled",
        original="h_BLD.gather(1, (length_B1 - 1)",
        replacement="h_BLD.gather(1, (length_B1 - 2).clamp(min=0)",
    ),
    _mutant(
        what="the last column pooled, padding or not",
        original="h_BLD.gather(1, (length_B1 - 1)",
        replacement="h_BLD.gather(1, (0 * length_B1 + L - 1)",
    ),
    _mutant(
        what="the poolings exchanged without lengths",
        original='return h_BLD[:, -1] if pooling == "last" else',
        replacement='return h_BLD[:, -1] if pooling == "mean" else',
    ),
    _mutant(
        what="lengths ignored",
        original="_pool(h_BLD, lengths, self.pooling)",
        replacement="_pool(h_BLD, None, self.pooling)",
    ),
    _mutant(
        what="the model's output detached",
        original="h_BLD = self.transformer.hidden(tokens)\n",
        replacement="h_BLD = self.transformer.hidden(tokens).detach()\n",
    ),
    _mutant(
        what="the head in another dtype than the model",
        original="linear.to(transformer.device, transformer.dtype)",
        replacement="linear.to(transformer.device)",
    ),
    _mutant(
        what="squared differences summed",
        original="return mse_loss(prediction, targets)",
        replacement='return mse_loss(prediction, targets, reduction="sum")',
    ),
    _mutant(
        what="targets of another shape accepted",
        original="if targets.shape != prediction.shape:",
        replacement="if targets.numel() != prediction.numel():",
    ),
    _mutant(
        what="embeddings of any length",
        original="return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)",
        replacement="return x.to(torch.promote_types(x.dtype, torch.float32))",
    ),
    _mutant(
        what="embeddings rounded to the model's dtype",
        original="F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)",
        replacement="F.normalize(x, dim=-1)",
    ),
    _mutant(
        what="one direction of the contrast",
        original="symmetric=True, negatives",
        replacement="symmetric=False, negatives",
    ),
    _mutant(
        what="the temperature of the constructor ignored",
        original="self.temperature = temperature\n",
        replacement="self.temperature = 0.07\n",
    ),
    _mutant(
        what="pairs of one class as negatives",
        original="negatives=negatives\n        )",
        replacement="negatives=None\n        )",
    ),
    _mutant(
        what="a length of zero accepted",
        original="if low < 1 or high > L:",
        replacement="if low < 0 or high > L:",
    ),
    _mutant(
        what="a length beyond the row accepted",
        original="if low < 1 or high > L:",
        replacement="if low < 1 or high > L + 1:",
    ),
    _mutant(
        what="an empty sequence accepted",
        original="if row.dim() != 1 or not len(row) or row.dtype",
        replacement="if row.dim() != 1 or row.dtype",
    ),
    _mutant(
        what="numbers rounded to ids",
        original=" or row.dtype not in (torch.int64, torch.int32):",
        replacement=":",
    ),
]
