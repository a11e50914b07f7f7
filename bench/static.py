"""What the kernels compile to, without a GPU: `python -m bench static [OP ...] [--write]`.

The public functions are called as they are, on tensors of the host, under a driver that compiles
every launch for sm_80, sm_90 and sm_100 and runs none. The machine code is held against limits that
do not depend on a compiler's version: no spilled register, no float64 arithmetic, no atomic, and
128-bit accesses wherever a tile is large enough for them. Registers are reported, not limited.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from triton import knobs

from kernels import _runtime

from ._stub_driver import MAX_SHARED, Compiled, StubDriver
from .cases import CASES, Case

RESULTS = Path(__file__).parent / "results" / "static.md"
WIDTH = 200  # of tables that do not go to a terminal
SHOWN = 90  # the target whose accesses are shown
COLUMNS = (
    "case", "kernel", "registers", "spills", "shared, bytes", "loads × bits", "stores × bits",
    "problems",
)  # fmt: skip

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]*)((?:\.\w+)*)")
TILE = re.compile(r"tt\.(load|store) .*: tensor<([0-9x]+)x!tt\.ptr<[a-z]+(\d+)")
LOADS, STORES = {"LDG", "LD", "LDGSTS"}, {"STG", "ST"}
ATOMICS = {"ATOM", "ATOMG", "RED", "REDG"}
DOUBLES = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel in numbers: of instructions, where nothing else is said."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int
    doubles: int
    atomics: int
    loads: Counter[int]  # from global memory, by their width in bits
    stores: Counter[int]


@dataclass(frozen=True)
class Row:
    """One kernel, as launched by one case and compiled for one target."""

    op: str
    case: str
    kernel: str
    target: int
    shared: int
    code: Code
    problems: tuple[str, ...]


def read_code(listing: str) -> Code:
    """Count what matters in the output of `cuobjdump -sass -res-usage`."""
    instructions = INSTRUCTION.findall(listing)
    names = Counter(name for name, _ in instructions)
    registers, stack = re.findall(r"(?:REG|STACK):(\d+)", listing)
    return Code(
        registers=int(registers),
        stack=int(stack),
        spills=names["LDL"] + names["STL"],
        doubles=sum(names[name] for name in DOUBLES),
        atomics=sum(names[name] for name in ATOMICS),
        loads=Counter(_bits(suffix) for name, suffix in instructions if name in LOADS),
        stores=Counter(_bits(suffix) for name, suffix in instructions if name in STORES),
    )


def _bits(suffix: str) -> int:
    widths = re.findall(r"\.[US]?(8|16|32|64|128|256)(?=\.|$)", suffix)
    return int(widths[-1]) if widths else 32


def find_problems(code: Code, compiled: Compiled, case: Case) -> tuple[str, ...]:
    """Name the limits that `code` breaks."""
    problems = []
    if code.spills or code.stack:
        problems.append("spilled registers")
    if code.atomics:
        problems.append("atomics")
    if compiled.name in case.exempt:
        return tuple(problems)
    if code.doubles:
        problems.append("float64 arithmetic")
    for kind, widths in (("load", code.loads), ("store", code.stores)):
        if case.wide and _has_large_tile(kind, compiled) and max(widths) < 128:
            problems.append(f"narrow {kind}s")
    return tuple(problems)


def _has_large_tile(kind: str, compiled: Compiled) -> bool:
    """Whether some tile that is loaded or stored holds 16 bytes for each thread."""
    return any(
        math.prod(map(int, shape.split("x"))) * int(bits) >= 128 * compiled.threads
        for found, shape, bits in TILE.findall(compiled.ttir)
        if found == kind
    )


def disassemble(cubin: bytes) -> str:
    """Machine code and resource usage, by the `cuobjdump` that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(op: str, target: int) -> list[Row]:
    """Compile the cases of `op` for `target`; a kernel that several of them launch counts once."""
    torch.set_num_threads(1)
    _runtime.CPU_KERNELS = True
    driver = StubDriver(target)
    triton.runtime.driver.set_active(driver)
    rows, seen = [], set()
    for case in CASES[op]():
        driver.launches.clear()
        case.launch()
        if not driver.launches:
            raise RuntimeError(f"{op}, {case.label}: no kernel was launched")
        for compiled in driver.launches:
            if (id(compiled), case.wide) not in seen:
                seen.add((id(compiled), case.wide))
                rows.append(_row(op, target, case, compiled))
    return rows


def _row(op: str, target: int, case: Case, compiled: Compiled) -> Row:
    code = read_code(disassemble(compiled.cubin))
    problems = find_problems(code, compiled, case)
    return Row(op, case.label, compiled.name, target, compiled.shared, code, problems)


def measure_all(ops: Iterable[str]) -> list[Row]:
    """`measure` every operation for every target, on all cores."""
    tasks = [(op, target) for op in ops for target in MAX_SHARED]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return [row for rows in pool.map(measure, *zip(*tasks, strict=True)) for row in rows]


def tables(rows: list[Row], style: box.Box) -> Iterator[Table]:
    """One table per operation; a number that differs by target is given for each of them."""
    for op, of_op in groupby(rows, lambda row: row.op):
        table = Table(*COLUMNS, title=op, title_justify="left", box=style)
        by_target = [list(group) for _, group in groupby(of_op, lambda row: row.target)]
        for versions in zip(*by_target, strict=True):
            table.add_row(*_cells(versions))
        yield table


def _cells(versions: tuple[Row, ...]) -> Iterator[str]:
    """A kernel's line: `versions` are its rows, one per target."""
    shown = next(row for row in versions if row.target == SHOWN)
    yield shown.case
    yield shown.kernel
    yield _each(row.code.registers for row in versions)
    yield _each(row.code.spills for row in versions)
    yield _each(row.shared for row in versions)
    yield _histogram(shown.code.loads)
    yield _histogram(shown.code.stores)
    yield ", ".join(sorted({problem for row in versions for problem in row.problems}))


def _each(numbers: Iterable[int]) -> str:
    cells = [str(number) for number in numbers]
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _histogram(widths: Counter[int]) -> str:
    return " ".join(f"{widths[bits]}×{bits}" for bits in sorted(widths, reverse=True))


def main(ops: tyro.conf.Positional[tuple[str, ...]] = (), write: bool = False) -> None:
    """Show what the kernels compile to; exit with 1 if one of them breaks a limit.

    Args:
        ops: operations to compile; all of them if none is named.
        write: keep the tables of all operations in bench/results/static.md.
    """
    if unknown := set(ops) - set(CASES):
        raise SystemExit(f"static: no operation {sorted(unknown)}; there are {', '.join(CASES)}")
    if write and ops:
        raise SystemExit("static: --write keeps the tables of all operations; name none of them")
    if knobs.runtime.interpret:
        raise SystemExit("static: TRITON_INTERPRET is set, so nothing compiles; unset it")
    rows = measure_all(ops or CASES)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(*tables(rows, box.SIMPLE), sep="\n")
    if write:
        with RESULTS.open("w") as file:
            print(f"`python -m bench static --write`, Triton {triton.__version__}", file=file)
            Console(file=file, width=WIDTH).print(*tables(rows, box.MARKDOWN), sep="\n")
    broken = [row for row in rows if row.problems]
    for row in broken:
        where = f"{row.op}, {row.case}, {row.kernel}, sm_{row.target}"
        print(f"{where}: {', '.join(row.problems)}", file=sys.stderr)
    raise SystemExit(1 if broken else 0)
