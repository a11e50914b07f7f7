"""Faults of what is kept of runs that ended: after a loss of power they are made again."""

from functools import partial

from tests.mutants import Mutant

_trials = partial(Mutant, file="bench/runs/_trials.py")

MUTANTS = [
    _trials(
        what="a run is kept behind broken bytes",
        original="json_lines.read(kept) if only_ended else json_lines.opened(kept)",
        replacement="json_lines.read(kept)",
    ),
    _trials(
        what="who only looks cuts the file",
        original="json_lines.read(kept) if only_ended else json_lines.opened(kept)",
        replacement="json_lines.opened(kept)",
    ),
    _trials(
        what="a result is kept behind broken bytes",
        original='x["run"] for x in json_lines.opened(kept)',
        replacement='x["run"] for x in json_lines.read(kept)',
    ),
    _trials(
        what="a loss that is not finite is None",
        original='Outcome(**with_nan(line) | {"arguments"',
        replacement='Outcome(**line | {"arguments"',
    ),
    _trials(
        what="a result that is not finite is None",
        original="kind(**with_nan(ended[key]))",
        replacement="kind(**ended[key])",
    ),
]
