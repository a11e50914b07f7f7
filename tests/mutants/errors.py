"""Faults of errors.py: chunks of the truth are put together wrongly, or a bad tensor is missed."""

from functools import partial

from tests.mutants import Mutant

_errors = partial(Mutant, file="bench/errors.py")

MUTANTS = [
    _errors(
        what="a mean loss is the sum of the chunks' means",
        original='sums["forward"].add(i, outputs[i], exact * share, None)',
        replacement='sums["forward"].add(i, outputs[i], exact, None)',
    ),
    _errors(
        what="every chunk has the whole gradient of a mean",
        original="torch.full_like(y, share)",
        replacement="torch.ones_like(y)",
    ),
    _errors(
        what="the last chunk's gradient of a weight counts alone",
        original="self.totals[i] = self.totals[i] + exact if i in self.totals else exact",
        replacement="self.totals[i] = exact",
    ),
    _errors(
        what="every chunk gets the first rows' gradients",
        original="dy[part].to(y) if y.dim()",
        replacement="dy[: len(y)].to(y) if y.dim()",
    ),
    _errors(
        what="a gradient that is not finite hides behind a good one",
        original="return math.nan if any(map(math.isnan, values)) else max(values)",
        replacement="return max(values)",
    ),
    _errors(
        what="the chunk is not halved",
        original="rows = max(rows // 2, 1)  #",
        replacement="rows = max(rows - 1, 1)  #",
    ),
    Mutant(
        what="the error of the smallest shape",
        file="bench/case.py",
        original="self._errors(implementation, function, self.copies[0])",
        replacement=(
            "self._errors(implementation, function, "
            "list(self.operation.inputs(self.make, **self.operation.smallest)))"
        ),
    ),
    Mutant(
        what="a vocabulary's logits are not counted among what a row takes",
        file="bench/case.py",
        original='widest = max(self.dims.get("V", 1), *(',
        replacement="widest = max(1, *(",
    ),
]
