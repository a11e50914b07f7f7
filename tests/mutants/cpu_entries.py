"""Faults of the entries of bench cpu_record: what counts, and false verdicts."""

from functools import partial

from tests.mutants import Mutant

_entries = partial(Mutant, file="bench/runs/cpu_entries.py")
_trials = partial(Mutant, file="bench/runs/_trials.py")

MUTANTS = [
    _entries(
        what="a busy entry counts",
        original="if share < LEAST_SHARE else []",
        replacement="if share < 0 else []",
    ),
    _entries(
        what="the best share of an entry's runs",
        original="share = min(x.share",
        replacement="share = max(x.share",
    ),
    _entries(
        what="a long entry counts",
        original="if longest > SECONDS * (1 + MOST_OVER):",
        replacement="if longest > SECONDS * (1 + 10 * MOST_OVER):",
    ),
    _entries(
        what="the shortest run is held to the clock",
        original="longest = max(",
        replacement="longest = min(",
    ),
    _entries(
        what="changes need no commit",
        original='(["changes not committed"] if self.uncommitted else [])',
        replacement="[]",
    ),
    _entries(
        what="mean and interval are not checked",
        original="    if not same:\n",
        replacement="    if False:\n",
    ),
    _entries(
        what="compared across processors",
        original="(x.protocol, x.cpu) == (entry.protocol, entry.cpu)",
        replacement="x.protocol == entry.protocol",
    ),
    _entries(
        what="compared across protocols",
        original="(x.protocol, x.cpu) == (entry.protocol, entry.cpu)",
        replacement="x.cpu == entry.cpu",
    ),
    _entries(
        what="compared with later entries",
        original=" and x.date < entry.date",
        replacement=" and x is not entry",
    ),
    _entries(
        what="compared with entries that do not count",
        original="        and not x.marks\n",
        replacement="",
    ),
    _entries(
        what="compared with the worst",
        original="return min(comparable, key",
        replacement="return max(comparable, key",
    ),
    _entries(
        what="every difference is shown",
        original='"not shown" if abs(difference) <= half else',
        replacement='"not shown" if abs(difference) < 0 else',
    ),
    _entries(
        what="higher is better",
        original='"better" if difference < 0 else',
        replacement='"better" if difference > 0 else',
    ),
    _entries(
        what="what does not count comes first",
        original="key=lambda x: (-x.protocol, bool(x.marks), x.loss[0])",
        replacement="key=lambda x: (-x.protocol, not x.marks, x.loss[0])",
    ),
    _trials(
        what="freedom of one of the two alone",
        original="_t_point(int(together**2 / sum(parts) + 1e-9))",
        replacement="_t_point(min(len(later), len(earlier)) - 1)",
    ),
    _trials(
        what="freedom rounded up",
        original="_t_point(int(together**2 / sum(parts) + 1e-9))",
        replacement="_t_point(1 + int(together**2 / sum(parts) - 1e-9))",
    ),
    _trials(
        what="a spread for a standard error",
        original="[variance(x) / len(x) for x in",
        replacement="[variance(x) for x in",
    ),
]
