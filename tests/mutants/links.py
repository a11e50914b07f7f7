"""Faults of links.py: bytes and times of collectives."""

from functools import partial

from tests.mutants import Mutant

_links = partial(Mutant, file="bench/scale/links.py")

MUTANTS = [
    _links(
        what="an all-reduce moves what a gather does",
        original='(2 if self.kind == "all-reduce" else 1)',
        replacement="1",
    ),
    _links(
        what="a ring moves the whole tensor",
        original=" * (n - 1) / n",
        replacement="",
    ),
    _links(
        what="the network as fast as the links within a node",
        original="rate = min(rate, per_node * links.network)",
        replacement="pass",
    ),
    _links(
        what="steps take no time",
        original="latency = LATENCY + turns * (",
        replacement="latency = LATENCY + 0 * (",
    ),
    _links(
        what="every step crosses the network",
        original="(n - nodes) * WITHIN",
        replacement="(n - nodes) * ACROSS",
    ),
    _links(
        what="a collective that is not called",
        original="if n == 1 or not collective.times:",
        replacement="if n == 1:",
    ),
]
