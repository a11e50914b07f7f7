"""Faults of bench tokens_to_loss: an optimizer not at its best, tokens that no run needed."""

from functools import partial

from tests.mutants import Mutant

_tokens = partial(Mutant, file="bench/runs/tokens_to_loss.py")

MUTANTS = [
    _tokens(
        what="the worst rate",
        original="return min(finite, key",
        replacement="return max(finite, key",
    ),
    _tokens(
        what="a rate at which a run diverged",
        original="if isfinite(loss)}",
        replacement="}",
    ),
    _tokens(
        what="tokens on a line of the loss, not of its logarithm",
        original="way = log(high / end.val_loss) / log(high / low)",
        replacement="way = (high - end.val_loss) / (high - low)",
    ),
    _tokens(
        what="tokens on a straight scale",
        original="needed = exp(log(a) + way * log(b / a))",
        replacement="needed = a + way * (b - a)",
    ),
    _tokens(
        what="a loss that was not reached counts as the last run",
        original="    needed = nan\n",
        replacement="    needed = float(curve[-1][0])\n",
    ),
    _tokens(
        what="runs in the order in which they were made",
        original="sorted(parts.items())",
        replacement="parts.items()",
    ),
    _tokens(
        what="seconds of the whole run",
        original="whole.seconds * needed / whole.tokens",
        replacement="whole.seconds",
    ),
    _tokens(
        what="both optimizers are one",
        original='"--optimizer", "adamw", "--row-beta2"',
        replacement='"--optimizer", "muon", "--row-beta2"',
    ),
    _tokens(
        what="optimizers and rates change places",
        original="        for lr in rates:\n            for name in RULES:",
        replacement="        for name in RULES:\n            for lr in rates:",
    ),
    _tokens(
        what="shorter runs at another rate",
        original='[best["Muon"]], share)',
        replacement='[best["AdamW"]], share)',
    ),
    _tokens(
        what="shorter runs as long as the others",
        original="round(share * steps)",
        replacement="steps",
    ),
    _tokens(
        what="an end of the sweep is not said",
        original="if lr in (rates[0], rates[-1])",
        replacement="if False",
    ),
]
