"""Faults of bench scaling: wrong laws, wrong intervals, a prediction that knows its outcome."""

from functools import partial

from tests.mutants import Mutant

_laws = partial(Mutant, file="bench/runs/scaling_laws.py")
_scaling = partial(Mutant, file="bench/runs/scaling.py")

MUTANTS = [
    _laws(
        what="the spread is not that of the runs less the constants",
        original="freedom = n - unknown",
        replacement="freedom = n",
    ),
    _laws(
        what="the spread is taken to be known",
        original="np.sqrt(freedom / random.chisquare(freedom, draws))",
        replacement="np.ones(draws)",
    ),
    _laws(
        what="a prediction's interval is that of the law, not of a run",
        original="self._drawn)[:, 0] + self._own\n",
        replacement="self._drawn)[:, 0]\n",
    ),
    _laws(
        what="constants are not fitted to the losses drawn",
        original="self._drawn = np.where(nearest, ends[0][0], ends[1][0])",
        replacement="self._drawn = np.repeat(self._theta, draws, 0)",
    ),
    _laws(
        what="a term that has vanished in the fit has no interval",
        original="nearest = (ends[0][1] <= ends[1][1])[:, None]",
        replacement="nearest = True",
    ),
    _laws(
        what="an interval of the wrong level",
        original="[(1 - level) / 2, (1 + level) / 2]",
        replacement="[1 - level, level]",
    ),
    _laws(
        what="constants of centred logs",
        original="moved[:, :K] += theta[:, K : 2 * K] * self._center",
        replacement="pass",
    ),
    _laws(
        what="α_N is the inner power",
        original='"α_N": p * q',
        replacement='"α_N": p',
    ),
    _laws(
        what="A and B change places",
        original="E, A, B = np.exp",
        replacement="E, B, A = np.exp",
    ),
    _laws(
        what="the constant term has a slope",
        original="slopes = [name is not None for name in self.terms]",
        replacement="slopes = [True for name in self.terms]",
    ),
    _laws(
        what="the power of Kaplan's D is free",
        original="slopes[-1] &= self.slope is None",
        replacement="slopes[-1] &= True",
    ),
    _laws(
        what="no step is taken back",
        original="better = tried < before",
        replacement="better = tried < np.inf",
    ),
    _laws(
        what="the least loss of another compute",
        original="np.log(flops / 6)",
        replacement="np.log(flops)",
    ),
    _laws(
        what="the best ratio's exponents change places",
        original="a - b + β * product",
        replacement="a - b + α * product",
    ),
    _laws(
        what="as many runs as constants",
        original="if n <= unknown:",
        replacement="if n < unknown:",
    ),
    _laws(
        what="the slope's derivative has the wrong sign",
        original="-q * shares * x",
        replacement="q * shares * x",
    ),
    _scaling(
        what="the prediction knows its outcome",
        original="ratio * s, seed) for x in ladder for",
        replacement="ratio * s, seed) for x in [*ladder, last] for",
    ),
    _scaling(
        what="every outcome is within",
        original='whether = "within" if inside == len(losses) else "NOT within"',
        replacement='whether = "within"',
    ),
    _laws(
        what="the form's error is left out",
        original="        if errors:\n",
        replacement="        if False:\n",
    ),
    _laws(
        what="the form's error is that of many hindcasts",
        original="standard_t(len(errors), len(drawn))",
        replacement="standard_normal(len(drawn))",
    ),
    _laws(
        what="hindcasts that balance are no error",
        original="spread = np.sqrt(np.mean(np.square(errors)))",
        replacement="spread = np.std(errors)",
    ),
    _laws(
        what="a prediction drawn anew at every call",
        original="np.random.default_rng([self._seed, 1])",
        replacement="np.random.default_rng()",
    ),
    _laws(
        what="a size is predicted from the next one below it",
        original="if x.parameters <= reach * size * (1 + 1e-9)]",
        replacement="if x.parameters < size]",
    ),
    _laws(
        what="hindcasts know their outcome",
        original="if x.parameters <= reach * size * (1 + 1e-9)]",
        replacement="]",
    ),
    _laws(
        what="hindcasts of the short runs too",
        original="found.append(([x for x in runs if x.tokens == most], below))",
        replacement="found.append((runs, below))",
    ),
    _scaling(
        what="batches are powers of two",
        original=', {"max-tokens"}, power_of_two=False',
        replacement=', {"max-tokens"}',
    ),
    _scaling(
        what="decay is the preset's",
        original='        "weight-decay": f"{config.optimizer.weight_decay:.4g}",\n',
        replacement="",
    ),
    _scaling(
        what="the prediction is of a law which holds",
        original="x.predict(expected, errors=errors[name]) for",
        replacement="x.predict(expected) for",
    ),
    _scaling(
        what="one hindcast is enough",
        original="LEAST_HINDCASTS = 2",
        replacement="LEAST_HINDCASTS = 0",
    ),
    _scaling(
        what="steps of the preset's batch",
        original="round(tokens / (config.batch_size * CONTEXT))",
        replacement="round(tokens / (PRESET.batch_size * CONTEXT))",
    ),
    _scaling(
        what="the embedding counts as hidden",
        original="_parameters(model) - model.vocab_size * model.d_model",
        replacement="_parameters(model)",
    ),
    _scaling(
        what="FLOPs of a token for those of the run",
        original="flops_per_token(model) * tokens",
        replacement="flops_per_token(model)",
    ),
    _scaling(
        what="minutes of one seed",
        original="60 * minutes / (seeds * each)",
        replacement="60 * minutes / each",
    ),
    _scaling(
        what="minutes without the quarters",
        original="each = sum(SHARES) *",
        replacement="each =",
    ),
    _scaling(
        what="the law of compute sees the quarters",
        original='longest if name == "compute" else points',
        replacement="points",
    ),
    _scaling(
        what="what diverged is fitted",
        original="if not isfinite(outcome.val_loss):",
        replacement="if False:",
    ),
    _scaling(
        what="sizes that are one shape",
        original="if hidden(larger) <= hidden(smaller):",
        replacement="if False:",
    ),
]
