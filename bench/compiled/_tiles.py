"""Bytes that a kernel moves, read from the program that Triton lowers (TTIR), before any target.

A `Pass` is one trip over a tile: an innermost loop that loads or stores, or the straight-line body
of a kernel without one. Control flow distinguishes two kinds of code:

- what follows in sequence adds up (cross-entropy reads a row, then reads it again to write it);
  the branches of an `if` are alternatives, of which the kernel takes one (a dtype, a full chunk);
- a masked loop beside an unmasked one is its tail, and does not count.

Elements are those of the tensor that a trip moves most of; bytes are those of accesses whose
address depends on the program (others, such as a norm's weight, are read from cache by all).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, product

NAME = re.compile(r"%[\w$.-]+")
RESULT = re.compile(r"(%[\w$.-]+)(?::\d+)? = (?:\"?)([\w.]+)")
ACCESS = re.compile(
    r"tt\.(load|store) (%[^:]*?)(?: \w+ = .*?| \{.*?)? : (?:tensor<([0-9x]+)x)?!tt\.ptr<[a-z]+(\d+)"
)
LOOP = re.compile(r"scf\.for (%[\w$.-]+) = ([^:]*?) (?:iter_args\((.*?)\) )?(?:->|:|\{)")
SAME_BASE = {
    "tt.addptr",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.bitcast",
    "tt.int_to_ptr",
}
FOLLOWED = SAME_BASE | {"tt.reshape", "tt.trans"}


@dataclass(frozen=True)
class Access:
    """A load or store of `elements` values, of `bits` each; a scalar has one element."""

    kind: str
    elements: int
    bits: int
    masked: bool
    varies: bool
    """Whether the address depends on the program."""
    base: str
    """The value that the address was computed from, by adding offsets."""

    @property
    def bytes(self) -> int:
        """Bytes that all threads of the program move together."""
        return self.elements * self.bits // 8


@dataclass
class Region:
    """Code in sequence, or with `kind` "if" the alternatives, or a "loop"."""

    kind: str
    items: list["Region | Access"] = field(default_factory=list)
    result: str = ""

    @property
    def branches(self) -> list["Region"]:
        """The regions among its items: of an "if", all of them."""
        return [item for item in self.items if isinstance(item, Region)]

    def open(self, kind: str, result: str) -> "Region":
        """Append a region, and return it."""
        region = Region(kind, result=result)
        self.items.append(region)
        return region


class Pass:
    """One trip: its tile accesses, and what they amount to."""

    def __init__(self, accesses: list[Access], index: int | None) -> None:
        self.tiles = [x for x in accesses if x.elements > 1]
        self.index = index  # among the loops of the program; None for a straight-line body

    @cached_property
    def elements(self) -> int:
        """Elements of one trip: those of the tensor that it moves most of."""
        counts = defaultdict(int)
        for x in self.tiles:
            counts[x.kind, x.base] += x.elements
        return max(counts.values(), default=0)

    def bytes(self, kind: str) -> int:
        """Bytes that the threads move together, cached or not."""
        return sum(x.bytes for x in self.tiles if x.kind == kind)

    def expected(self, kind: str, threads: int) -> dict[int, float]:
        """Bytes per thread that accesses of at least 128, and of at least 64 bits must move.

        Only tiles with 8 bytes or more for each thread, not far smaller than the largest, count.
        """
        largest = max((x.bytes for x in self.tiles), default=0)
        each = [x.bytes / threads for x in self.tiles if x.kind == kind and 4 * x.bytes >= largest]
        tiers = {128: sum(n for n in each if n >= 16), 64: sum(n for n in each if n >= 8)}
        return {bits: n for bits, n in tiers.items() if n}

    @property
    def unmasked(self) -> int:
        """Bytes that move without a mask."""
        return sum(x.bytes for x in self.tiles if not x.masked)


@dataclass
class Program:
    """The passes of a kernel: every way through it, and all its loops in their order."""

    variants: list[list[Pass]]
    loops: list[Pass]


def traffic(variant: list[Pass]) -> tuple[float, float]:
    """Bytes per element: through device memory, and read again (from L2, where it holds them)."""
    first, again = 0.0, 0.0
    seen: set[tuple[str, str]] = set()
    for trip in variant:
        moved = [x for x in trip.tiles if x.varies]
        for x in moved:
            known = (x.kind, x.base) in seen or ("store", x.base) in seen
            if known:
                again += x.bytes / trip.elements
            else:
                first += x.bytes / trip.elements
        seen |= {(x.kind, x.base) for x in moved}
    return first, again


def read_ttir(text: str) -> Program:
    """Find the passes of a kernel in its TTIR."""
    body = _parse(text)
    leaves = list(_innermost(body))
    loops = [Pass(list(_accesses(leaf)), i) for i, leaf in enumerate(leaves)]
    of_leaf = {id(leaf): trip for leaf, trip in zip(leaves, loops, strict=True)}
    variants = [_without_tails(variant) for variant in _variants(body, of_leaf)]
    variants = [variant for variant in variants if variant]
    if any(trip.unmasked for variant in variants for trip in variant):
        variants = [variant for variant in variants if any(trip.unmasked for trip in variant)]
    if not variants:
        straight = Pass(_straight(body), None)
        variants = [[straight]] if straight.tiles else []
    unique = {tuple(trip.index for trip in variant): variant for variant in variants}
    return Program(list(unique.values()), loops)


def _innermost(region: Region) -> Iterator[Region]:
    """The loops that hold an access, and no loop that does."""
    for item in region.items:
        if isinstance(item, Region):
            inner = list(_innermost(item))
            yield from inner
            if item.kind == "loop" and not inner and any(_accesses(item)):
                yield item


def _accesses(region: Region) -> Iterator[Access]:
    for item in region.items:
        if isinstance(item, Region):
            yield from _accesses(item)
        else:
            yield item


def _variants(region: Region, of_leaf: dict[int, Pass]) -> list[list[Pass]]:
    """Every way through `region`, as the loops over tiles that it passes."""
    choices = []
    for item in region.items:
        if not isinstance(item, Region):
            continue
        if id(item) in of_leaf:
            ways = [[of_leaf[id(item)]]] if of_leaf[id(item)].tiles else [[]]
        elif item.kind == "if":
            ways = [way for branch in item.branches for way in _variants(branch, of_leaf)]
        else:
            ways = _variants(item, of_leaf)
        choices.append([way for way in ways if way] or [[]])
    return [list(chain(*ways)) for ways in product(*choices)]


def _without_tails(variant: list[Pass]) -> list[Pass]:
    return [trip for trip in variant if trip.unmasked] or variant


def _straight(region: Region) -> list[Access]:
    """The accesses of a way without loops: of each `if`, the branch that moves the most bytes."""
    found = []
    for item in region.items:
        if isinstance(item, Access):
            found.append(item)
        elif item.kind == "if":
            ways = [_straight(branch) for branch in item.branches]
            found += max(ways, key=lambda way: sum(x.bytes for x in way), default=[])
        else:
            found += _straight(item)
    return found


def _parse(text: str) -> Region:
    """Regions and accesses, with what each address depends on."""
    stack = [Region("body")]
    varying: set[str] = set()
    base: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        names = [name.partition("#")[0] for name in NAME.findall(line)]
        if line.startswith("}"):
            closed = stack.pop() if len(stack) > 1 else stack[0]
            if line == "} else {":
                stack.append(stack[-1].open("branch", closed.result))
            elif line == "} do {":  # a while's second half
                stack.append(closed)
            elif closed.kind == "branch":
                stack.pop()
            continue
        if access := _access(line, varying, base):
            stack[-1].items.append(access)
        result = RESULT.match(line)
        if result:  # the names of one region are used again in the next
            varying.discard(names[0])
            base.pop(names[0], None)
        if line.startswith("scf.yield") and varying & set(names):
            varying.add(stack[-1].result)
        elif loop := LOOP.search(line):
            _enter_loop(loop, varying, base)
        elif result and (result[2] == "tt.get_program_id" or varying & set(names[1:])):
            varying.add(names[0])
        if result and result[2] in FOLLOWED and len(names) > 1:
            base[names[0]] = _origin(base, names[1])
        if line.endswith("{"):
            stack = _open(line, stack, names[0] if result else "")
    return stack[0]


def _access(line: str, varying: set[str], base: dict[str, str]) -> Access | None:
    if not (found := ACCESS.search(line)):
        return None
    kind, operands, shape, bits = found.groups()
    names = NAME.findall(operands)
    return Access(
        kind=kind,
        elements=math.prod(map(int, shape.split("x"))) if shape else 1,
        bits=int(bits),
        masked=len(names) > (1 if kind == "load" else 2),
        varies=names[0].partition("#")[0] in varying,
        base=_origin(base, names[0]),
    )


def _enter_loop(loop: re.Match, varying: set[str], base: dict[str, str]) -> None:
    """Set the dependences of a loop's counter and carried values as it begins."""
    counter, bounds, carried = loop.groups()
    _set(varying, counter, bool(varying & set(NAME.findall(bounds))))
    for inside, start in re.findall(r"(%[\w$.-]+) = (%[\w$.-]+)", carried or ""):
        base[inside] = _origin(base, start)
        _set(varying, inside, start in varying)


def _set(names: set[str], name: str, present: bool) -> None:
    names.add(name) if present else names.discard(name)


def _open(line: str, stack: list[Region], result: str) -> list[Region]:
    """The stack after a line that opens a region."""
    if "scf.if" in line:
        choice = stack[-1].open("if", result)
        return [*stack, choice, choice.open("branch", result)]
    kind = "loop" if re.search(r"scf\.(for|while)\b", line) else "body"
    return [*stack, stack[-1].open(kind, result)]


def _origin(base: dict[str, str], name: str) -> str:
    """The value that a pointer was computed from."""
    return base[name] if name in base else name  # noqa: SIM401 (a type that pyright keeps)
