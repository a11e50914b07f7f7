"""Read machine code: resources, and the instructions that a thread runs where it spends its time.

NVIDIA's comes from `nvdisasm`, which takes 0.3 s to start: all kernels go through it at once, as
one raw image of their text sections. AMD's is the listing that the compiler itself wrote.

The hot parts are the innermost loops that touch global memory: regions between a branch backward
and its target. Within a loop, or within the whole body of a kernel, what counts is one path: the
one that moves the most bytes by wide accesses, and of equals the shortest. So neither the masked
branch of an `if`, nor the slow path of a division, nor the padding after the end is counted.
"""

import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from triton import knobs

SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)([^;]*);")
SASS_ACCESS = dict.fromkeys(("LDG", "LD", "LDGSTS"), "load") | dict.fromkeys(("STG", "ST"), "store")
SASS_ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}
SASS_DOUBLES = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
AMD = re.compile(r"^(?:(\.LBB\w+):|\t([a-z]\w+)(?: +(.*?))?(?: +;.*)?$)", re.MULTILINE)
AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(dword(?:x\d)?|short|byte)")
AMD_ATOMIC = re.compile(r"(?:global|buffer|flat)_atomic")
AMD_DOUBLE = re.compile(r"v_(?:add|mul|fma|fmac|min|max|div\w*|rcp|rsq|sqrt)_f64")
AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
WIDE = 64  # bits from which an access draws the hot path to itself


@dataclass(frozen=True)
class Instruction:
    """One instruction; `place` is its address, and `target` where it may branch to."""

    place: int
    name: str
    kind: str = ""  # "load" or "store" where it touches global memory
    bits: int = 0
    target: int | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Route:
    """Instructions and accesses of one thread on its way through a loop or a kernel."""

    instructions: int
    loads: Counter[int]  # from global memory, by their width in bits
    stores: Counter[int]

    @property
    def bytes(self) -> int:
        """Bytes that the thread moves."""
        return self.moved("load") + self.moved("store")

    def moved(self, kind: str, bits: int = 0) -> int:
        """The bytes of its loads or stores, as far as they are of at least `bits`."""
        return sum(width * n for width, n in self.accesses(kind).items() if width >= bits) // 8

    @property
    def count(self) -> int:
        """Number of accesses."""
        return (self.loads + self.stores).total()

    def accesses(self, kind: str) -> Counter[int]:
        """Its loads or its stores."""
        return self.loads if kind == "load" else self.stores

    def width(self, kind: str, expected: dict[int, float]) -> int:
        """The bits with which all but a tenth of the bytes `expected` move.

        The compiler may have found that some accesses never happen: of the rest, then.
        """
        for bits, n in expected.items():
            n = min(n, self.moved(kind))
            if not n or self.moved(kind, bits) < 0.9 * n:
                return max(
                    (b for b in self.accesses(kind) if self.moved(kind, b) >= 0.9 * n), default=0
                )
        return max(expected)


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int
    doubles: int
    atomics: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def body(self) -> Route | None:
        """The path through the whole kernel, if it needs no loop."""
        return _route(self.instructions, 0, len(self.instructions) - 1, loop=False)

    @cached_property
    def loops(self) -> list[Route]:
        """The path through each innermost loop that touches global memory, in their order."""
        return list(_loops(self.instructions).values())


def disassemble(cubins: list[bytes], arch: str) -> list[str]:
    """The SASS of each of `cubins`, by the `nvdisasm` that comes with Triton; `arch` as SM90."""
    texts = [_text(cubin) for cubin in cubins]
    ends = list(accumulate(map(len, texts)))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", arch, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {end: [] for end in ends}
    current = iter(ends)
    end = next(current)
    for match in SASS.finditer(listing):
        while int(match[1], 16) >= end:
            end = next(current)
        found[end].append(match[0])
    return ["\n".join(lines) for lines in found.values()]


def _text(cubin: bytes) -> bytes:
    """The code in an ELF file: its sections named .text.*, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, n, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(n)]
    base = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", base + name)
    )


def read_usage(cubin: bytes) -> str:
    """Registers and stack of a kernel, as `cubin -res-usage` prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(usage: str, listing: str) -> Code:
    """Count what matters in the outputs of `read_usage` and `disassemble`."""
    instructions = tuple(_sass(listing))
    names = Counter(x.name for x in instructions)
    registers, stack = re.findall(r"(?:REG|STACK):(\d+)", usage)
    return Code(
        registers=int(registers),
        stack=int(stack),
        spills=names["LDL"] + names["STL"],
        doubles=sum(names[name] for name in SASS_DOUBLES),
        atomics=sum(names[name] for name in SASS_ATOMICS),
        instructions=instructions,
    )


def _sass(listing: str) -> Iterator[Instruction]:
    for place, predicate, name, suffix, operands in SASS.findall(listing):
        kind = SASS_ACCESS.get(name, "")
        targets = re.findall(r"0x([0-9a-f]+)", operands) if name == "BRA" else []
        yield Instruction(
            place=int(place, 16),
            name=name,
            kind=kind,
            bits=_sass_bits(suffix) if kind else 0,
            target=int(targets[-1], 16) if targets else None,
            falls_through=name not in ("BRA", "EXIT") or bool(predicate) or "P" in operands,
        )


def _sass_bits(suffix: str) -> int:
    widths = re.findall(r"\.[US]?(8|16|32|64|128|256)(?=\.|$)", suffix)
    return int(widths[-1]) if widths else 32


def read_amdgcn(listing: str) -> Code:
    """Count what matters in a listing of the AMD compiler."""
    text, _, metadata = listing.partition(".amdgpu_metadata")
    figures = {key: int(n) for key, n in re.findall(r"\.(\w+): +(\d+)$", metadata, re.MULTILINE)}
    instructions = tuple(_amdgcn(text))
    return Code(
        registers=figures["vgpr_count"],
        stack=figures["private_segment_fixed_size"],
        spills=figures["vgpr_spill_count"],
        doubles=sum(bool(AMD_DOUBLE.match(x.name)) for x in instructions),
        atomics=sum(bool(AMD_ATOMIC.match(x.name)) for x in instructions),
        instructions=instructions,
    )


def _amdgcn(text: str) -> Iterator[Instruction]:
    found = AMD.findall(text)
    # A label stands for the place of the instruction that follows it.
    places = list(accumulate(bool(name) for _, name, _ in found))
    labels = {label: n for (label, _, _), n in zip(found, places, strict=True) if label}
    for (label, name, operands), n in zip(found, places, strict=True):
        if label:
            continue
        access = AMD_ACCESS.match(name)
        yield Instruction(
            place=n - 1,
            name=name,
            kind=access[1] if access else "",
            bits=AMD_BITS[access[2]] if access else 0,
            target=labels.get(operands.strip()) if "branch" in name else None,
            falls_through=name not in ("s_branch", "s_endpgm"),
        )


def _loops(instructions: tuple[Instruction, ...]) -> dict[tuple[int, int], Route]:
    """The innermost loops that touch global memory, by their first and last instruction."""
    index = {x.place: i for i, x in enumerate(instructions)}
    back = [
        (index[x.target], i)
        for i, x in enumerate(instructions)
        if x.target in index and x.target < x.place
    ]
    # Two branches to one place are one loop. A branch to code laid out earlier is none.
    ends = [max(group) for _, group in groupby(sorted(back), lambda pair: pair[0])]
    loops = {pair: _route(instructions, *pair, loop=True) for pair in ends}
    loops = {pair: route for pair, route in loops.items() if route and route.bytes}
    return {
        (first, last): route
        for (first, last), route in loops.items()
        if not any(first < a <= b <= last for a, b in loops)
    }


def _route(
    instructions: tuple[Instruction, ...], first: int, last: int, *, loop: bool
) -> Route | None:
    """The path from `first` to `last` (or to an exit) that moves the most bytes, and is short."""
    index = {x.place: i for i, x in enumerate(instructions)}
    nowhere = (-math.inf, -math.inf, 0)
    best: dict[int, tuple] = {}
    following: dict[int, int] = {}
    for i in range(last, first - 1, -1):
        x = instructions[i]
        options = [] if i == last or not x.falls_through else [i + 1]
        if x.target is not None and i < index.get(x.target, -1) <= last:
            options.append(index[x.target])
        ended = i == last if loop else not x.falls_through and x.target is None
        score = (0, 0, 0) if ended else nowhere
        for option in options:
            if best[option] > score:
                score, following[i] = best[option], option
        wide = x.bits if x.bits >= WIDE else 0
        best[i] = (score[0] + wide, score[1] + x.bits, score[2] - 1)
    if best[first][0] < 0:
        return None
    at, taken = first, [instructions[first]]
    while at in following:
        at = following[at]
        taken.append(instructions[at])
    return Route(
        len(taken),
        Counter(x.bits for x in taken if x.kind == "load"),
        Counter(x.bits for x in taken if x.kind == "store"),
    )
