"""Faults of early stopping and of the loss that a run reports."""

from tests.mutants import Mutant

MUTANTS = [
    Mutant(
        what="one validation later",
        file="train.py",
        original="since >= config.stop_after",
        replacement="since > config.stop_after",
    ),
    Mutant(
        what="the best validation counted too",
        file="training/evaluation.py",
        original='entry["step"] > best_step for',
        replacement='entry["step"] >= best_step for',
    ),
    Mutant(
        what="the last weights reported, not the best",
        file="training/evaluation.py",
        original="== best_step < step:",
        replacement="== step < best_step:",
    ),
    Mutant(
        what="the reported documents chosen by",
        file="train.py",
        original='for half in ("choose", "report")',
        replacement='for half in ("report", "report")',
    ),
    Mutant(
        what="the documents chosen by reported",
        file="data/tokens.py",
        original="self._shards = [halves[half]]",
        replacement='self._shards = [halves["choose"]]',
    ),
]
