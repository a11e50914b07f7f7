"""Faults of harness.py: the host's time, or a cache's, is taken for the GPU's."""

from functools import partial

from tests.mutants import Mutant

_harness = partial(Mutant, file="bench/harness.py")

MUTANTS = [
    _harness(
        what="calls that the GPU waited for count",
        original="taken += [seconds for seconds, waited in found.calls if not waited]",
        replacement="taken += [seconds for seconds, waited in found.calls]",
    ),
    _harness(
        what="whether a call waited is asked before it is launched",
        original="        call()\n        end.record()\n        waited.append(start.query())",
        replacement="        waited.append(start.query())\n        call()\n        end.record()",
    ),
    _harness(
        what="a fixed sleep",
        original="lead = min(max(2 * host * batch, LEAST_LEAD), MOST_LEAD)",
        replacement="lead = 0.01",
    ),
    _harness(
        what="a host that is slower than measured is measured no better",
        original="host = max(host, found.host / batch)",
        replacement="pass",
    ),
    _harness(
        what="late calls count where the host was quick once",
        original=" and _reads_back(call, max(idle), clock):",
        replacement=":",
    ),
    _harness(
        what="a call that reads back counts, however slow the host",
        original="if max(idle) <= GAPS * statistics.median(late) and",
        replacement="if",
    ),
    _harness(
        what="the first call, which compiles, is an estimate",
        original="    call()  # compiles\n",
        replacement="",
    ),
]
