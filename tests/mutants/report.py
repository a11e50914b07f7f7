"""Faults of the page of runs: damage of a run ends it with a traceback."""

from functools import partial

from tests.mutants import Mutant

_report = partial(Mutant, file="bench/runs/report.py")

MUTANTS = [
    _report(
        what="a damaged checkpoint ends it",
        original="except CheckpointError as error:",
        replacement="except OSError as error:",
    ),
    _report(
        what="settings of another form end it",
        original="except (OSError, ValueError, TypeError, KeyError, AttributeError):",
        replacement="except (OSError, ValueError):",
    ),
    _report(
        what="the page's place not tried",
        original="    writable(out)\n",
        replacement="",
    ),
]
