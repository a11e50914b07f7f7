"""The figures of one compiled kernel: its program and its machine code, put side by side."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain

from tritium.bench.compiled._case import UNFIT, Case, Limit
from tritium.bench.compiled._devices import DEVICES, Device
from tritium.bench.compiled._machine_code import Code, Route
from tritium.bench.compiled._stub_driver import Compiled
from tritium.bench.compiled._tiles import Pass, Program, read_ttir, traffic


@dataclass(frozen=True)
class Row:
    """One kernel, as launched by one case and compiled for one target."""

    op: str
    case: str
    kernel: str
    target: str
    digest: str
    shared: int
    registers: int
    spills: int
    warps: int
    loads: tuple[Counter[int], ...]
    stores: tuple[Counter[int], ...]
    bits: tuple[int | None, int | None]
    bytes: tuple[float, float]
    instructions: float
    issue: float
    problems: tuple[str, ...]

    @property
    def is_nvidia(self) -> bool:
        """Whether the instructions issued at copy speed are known."""
        return DEVICES[self.target].issue > 0


@dataclass(frozen=True)
class Trip:
    """A pass over the data, and the machine code of one trip."""

    tiles: Pass
    route: Route
    threads: int

    @property
    def unrolled(self) -> int:
        """Trips of the program that the compiler put into one of the machine code."""
        moved = self.tiles.bytes("load") + self.tiles.bytes("store")
        if self.tiles.index is None or moved < 4 * self.threads:
            return 1
        # Scalars, which are narrow, are no part of the tiles.
        wide = self.route.moved("load", 64) + self.route.moved("store", 64)
        found = wide if 2 * wide >= self.route.bytes else self.route.bytes
        return max(round(found * self.threads / moved), 1)

    @property
    def instructions(self) -> float:
        """Instructions of one thread, per element."""
        elements = self.tiles.elements * self.unrolled / self.threads
        return self.route.instructions / elements

    def expected(self, kind: str) -> dict[int, float]:
        """Bytes of one thread by the bits that each access should have."""
        tiers = self.tiles.expected(kind, self.threads)
        return {bits: n * self.unrolled for bits, n in tiers.items()}


def find_trips(program: Program, code: Code, threads: int) -> list[list[Trip]] | None:
    """Pair the passes of each way through `program` with machine code; None if that has fewer."""
    routes = _pair(program.loops, code.loops, threads)
    variants = []
    for variant in program.variants:
        # A kernel left without any loop has its passes unrolled into its body.
        straight = not code.loops or variant[0].index is None
        found = [code.body if straight else routes.get(x.index) for x in variant]
        pairs = zip(variant, found, strict=True)
        trips = [Trip(tiles, route, threads) for tiles, route in pairs if route]
        if len(trips) < len(variant):
            return None
        variants.append(trips)
    return variants


def _pair(loops: list[Pass], routes: list[Route], threads: int) -> dict[int | None, Route]:
    """Give each loop of the program the machine code that moves as much, or a multiple of it.

    In order, if they agree in order and no other order fits better: the AMD compiler reorders
    loops, Triton from 3.8 on the branches of an `if`. Else, of those that agree, an unmasked loop
    takes the one with the fewest accesses, and a tail the one with the most.
    """
    candidates = sorted(
        (*_gap(loop, route, threads), route.count * (1 if loop.unmasked else -1), i, j)
        for i, loop in enumerate(loops)
        for j, route in enumerate(routes)
    )
    found: dict[int, int] = {}
    for *_, i, j in candidates:
        if i not in found and j not in found.values():
            found[i] = j
    if len(loops) == len(routes):
        gaps = [_gap(*pair, threads)[0] for pair in zip(loops, routes, strict=True)]
        fitted = sum(_gap(loops[i], routes[j], threads)[0] for i, j in found.items())
        pairs = zip(loops, gaps, strict=True)
        if sum(gaps) <= fitted and all(gap < 0.25 for loop, gap in pairs if loop.unmasked):
            found = {i: i for i in range(len(loops))}
    return {i: routes[j] for i, j in found.items()}


def _gap(loop: Pass, route: Route, threads: int) -> tuple[float, int]:
    """Distance of `route` from a multiple of `loop`, and the multiple."""
    program = {kind: loop.bytes(kind) / threads for kind in ("load", "store")}
    total = max(sum(program.values()), 1)
    times = max(round(route.bytes / total), 1)
    gap = sum(abs(route.moved(kind) - times * n) for kind, n in program.items())
    return round(gap / (times * total), 1), times


def find_problems(
    row: Row, device: Device, compiled: Compiled, code: Code, case: Case
) -> list[str]:
    """Name the limits that a kernel breaks."""
    if (compiled.name, row.target) in UNFIT:
        return []
    limit = case.limits.get(compiled.name, Limit())
    problems = []
    if code.spills or code.stack:
        problems.append("spilled registers")
    if code.atomics and not limit.atomics:
        problems.append("atomics")
    if compiled.threads > device.threads:
        problems.append(f"{compiled.threads} threads")
    if compiled.shared > device.program_shared:
        problems.append(f"{compiled.shared} bytes of shared memory")
    if limit.single:
        return problems
    if code.doubles:
        problems.append("float64 arithmetic")
    if row.bytes[0] > 1.05 * limit.bytes:
        problems.append(f"more than {limit.bytes:g} bytes per element")
    if row.instructions > limit.instructions and device.issue:
        problems.append(f"more than {limit.instructions:g} instructions per element")
    return problems


def make_row(op: str, target: str, case: Case, compiled: Compiled, code: Code) -> Row:
    """Put the figures of one kernel together."""
    device = DEVICES[target]
    variants = find_trips(read_ttir(compiled.ttir), code, compiled.threads)
    ways = [(traffic([trip.tiles for trip in trips]), trips) for trips in variants or []]
    moved, main = max(ways, key=lambda way: way[0], default=((0.0, 0.0), []))
    each = sum(trip.instructions for trip in main)
    copying = device.issue and moved[0] and device.copy / moved[0] / 32 / device.issue
    trips = list(chain.from_iterable(trips for _, trips in ways))
    widths = {kind: _width(trips, kind) for kind in ("load", "store")}
    row = Row(
        op=op,
        case=case.label,
        kernel=compiled.name,
        target=target,
        digest=_digest(compiled),
        shared=compiled.shared,
        registers=code.registers,
        spills=code.spills,
        warps=device.resident_warps(code.registers, compiled.shared, compiled.threads),
        loads=tuple(trip.route.loads for trip in main),
        stores=tuple(trip.route.stores for trip in main),
        bits=(widths["load"][0], widths["store"][0]),
        bytes=moved,
        instructions=each,
        issue=each * copying,
        problems=(),
    )
    problems = find_problems(row, device, compiled, code, case)
    if variants is None:
        problems.append("a loop of the program is not in the machine code")
    wide = case.wide and target not in case.narrow_on
    if wide and not case.limits.get(compiled.name, Limit()).single:
        narrow = (kind for kind, (found, expected) in widths.items() if (found or 0) < expected)
        problems += [f"narrow {kind}s" for kind in narrow]
    return replace(row, problems=tuple(problems))


def _digest(compiled: Compiled) -> str:
    """The same for the same program: its TTIR, less where its lines stand in the source."""
    program = re.sub(r"\bloc\(.*|^#loc.*", "", compiled.ttir, flags=re.MULTILINE)
    return sha256(f"{compiled.threads} {program}".encode()).hexdigest()


def _width(trips: list[Trip], kind: str) -> tuple[int | None, int]:
    """The narrowest access to a large tile in a hot loop, and what it should be, in bits."""
    found = []
    for trip in trips:
        if expected := trip.expected(kind):
            found.append((trip.route.width(kind, expected), max(expected)))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(None, 0))
