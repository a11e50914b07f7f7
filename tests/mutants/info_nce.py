"""Faults of kernels/info_nce.py: directions, masks, temperature."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/info_nce.py")

MUTANTS = [
    _mutant(
        what="the mask of the other direction not transposed",
        original="None if excluded_BB is None else excluded_BB.mT",
        replacement="None if excluded_BB is None else excluded_BB",
    ),
    _mutant(
        what="the own key masked",
        original="        excluded_BB.fill_diagonal_(False)\n",
        replacement="",
    ),
    _mutant(
        what="the caller's mask overwritten",
        original="        excluded_BB = ~negatives\n",
        replacement="        excluded_BB = negatives.logical_not_()\n",
    ),
    _mutant(
        what="similarities times the temperature",
        original="    q_BD = q_BD / temperature  #",
        replacement="    q_BD = q_BD * temperature  #",
    ),
    _mutant(
        what="gradient of the temperature cut",
        original="    q_BD = q_BD / temperature  #",
        replacement="    q_BD = q_BD / float(temperature)  #",
    ),
    _mutant(
        what="keys not normalised",
        original="    if normalize:\n        q_BD, k_BD = F.normalize(q_BD, dim=-1), "
        "F.normalize(k_BD, dim=-1)\n    q_BD =",
        replacement="    if normalize:\n        q_BD = F.normalize(q_BD, dim=-1)\n    q_BD =",
    ),
    _mutant(
        what="both directions summed",
        original="return torch.stack(results).mean(0)",
        replacement="return torch.stack(results).sum(0)",
    ),
    _mutant(
        what="accuracy of one direction",
        original="torch.stack(accuracies).mean(0)",
        replacement="accuracies[0]",
    ),
    Mutant(
        what="mask of the first chunk for all",
        file="kernels/_linear_cross_entropy.py",
        original="x_CV.masked_fill_(excluded_TV[chunk], -torch.inf)",
        replacement="x_CV.masked_fill_(excluded_TV[: x_CV.shape[0]], -torch.inf)",
    ),
]
