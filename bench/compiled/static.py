"""Static gate: compiles the kernels without a GPU: `python -m tritium.bench static [OP ...]`.

The public functions are called as they are, on tensors of the host, under a driver that compiles
every launch for sm_80, sm_90, sm_100 and gfx942 and runs none. Columns, where they are not plain:

    warps          that one multiprocessor holds at a time, by registers, shared memory and threads
    loads, stores  of one thread in the hot loops, on sm_90; "+" joins the passes over the data
    bits           of the loads and of the stores in the hot loops, as far as tiles are large enough
    B/element      through device memory, "+" what is read again (in L2, for a row that fits)
    instr/element  instructions of the hot loops, all passes, divided by the elements of one trip;
                   of a kernel without a loop, those from its first to its last
    issue, %       share of the issue slots of an A100, H200 and B200 that these instructions take
                   while the memory moves data as fast as a copy does

A trip's elements are those of the tile in Triton's own program, padding included: rows of 768 in a
block of 1024 need 4/3 of the figure for each true element. `_machine_code` and `_tiles`
say how hot loops are found and counted.

The limits are in `cases`, beside the kernels; those that do not depend on a compiler's version are
also compared with the table that `--write` keeps in static.md, in the folder of results.
Another version may move fewer bytes than the table has, where it alone keeps rows in registers.
Under a version of Triton that was not tried, spilled registers are shown and break nothing.
"""

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from triton import knobs

from tritium.bench import tables
from tritium.bench.compiled._case import UNFIT
from tritium.bench.compiled._devices import DEVICES
from tritium.bench.compiled._figures import Row, make_row
from tritium.bench.compiled._machine_code import (
    Code,
    disassemble,
    read_amdgcn,
    read_sass,
    read_usage,
)
from tritium.bench.compiled._stub_driver import Compiled, StubDriver
from tritium.bench.compiled.cases import CASES
from tritium.bench.ends import FailedError, WrongInputError
from tritium.kernels import runtime

RESULTS = "static.md"  # in the folder of results
WIDTH = 330  # of tables that do not go to a terminal
SHOWN = "sm_90"  # the target whose accesses are shown
COLUMNS = (
    "case", "kernel", "registers", "warps", "spills", "shared, bytes", "loads × bits",
    "stores × bits", "bits", "B/element", "instr/element", "issue, %", "problems",
)  # fmt: skip
HEADER = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS))]
PORTABLE = ("bits", "B/element")  # the same under every version of Triton
SPILLS = "spilled registers"  # the one problem that depends on the version
TRIED = ("3.6", "3.7", "3.8", "3.9")  # versions of Triton whose private parts the stub driver fits
ACCEPT = "run `python -m tritium.bench static --write` to accept"

Line = tuple[str, ...]  # the cells of one kernel, as in COLUMNS
Key = tuple[str, str, str, int]  # operation, case, kernel, and which of several with these names


def measure(op: str, target: str) -> list[Row]:
    """Compile the cases of `op` for `target`; a kernel that several of them launch counts once."""
    torch.set_num_threads(1)
    runtime.CPU_KERNELS = True
    driver = StubDriver(target)
    triton.runtime.driver.set_active(driver)
    launched = []
    for case in CASES[op]():
        driver.launches.clear()
        case.launch()
        if not driver.launches:
            raise RuntimeError(f"{op}, {case.label}: no kernel was launched")
        launched += [(case, compiled) for compiled in driver.launches]
    codes = read_codes([compiled for _, compiled in launched], target)
    rows = [make_row(op, target, case, x, codes[x.cubin]) for case, x in launched]
    return list({(row.kernel, row.digest, row.case, row.problems): row for row in rows}.values())


def read_codes(launched: list[Compiled], target: str) -> dict[bytes, Code]:
    """The machine code of all that was launched, each kernel once."""
    kernels = {x.cubin: x for x in launched}
    if DEVICES[target].target.backend == "hip":
        return {cubin: read_amdgcn(x.assembly) for cubin, x in kernels.items()}
    listings = disassemble(list(kernels), target.replace("_", "").upper())
    texts = zip(kernels, listings, strict=True)
    return {cubin: read_sass(read_usage(cubin), listing) for cubin, listing in texts}


def measure_all(ops: Iterable[str]) -> list[Row]:
    """`measure` every operation for every target, on all cores."""
    tasks = [(op, target) for op in ops for target in DEVICES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return [row for rows in pool.map(measure, *zip(*tasks, strict=True)) for row in rows]


def lines(rows: list[Row]) -> dict[Key, Line]:
    """One line per kernel, with a figure for each target where they differ."""
    grouped = defaultdict(list)
    for target in DEVICES:
        count = Counter()
        for row in (row for row in rows if row.target == target):
            name = row.op, row.case, row.kernel
            grouped[*name, count[name]].append(row)
            count[name] += 1
    found, seen = {}, set()
    for key, versions in grouped.items():
        same = key[0], key[2], *(row.digest for row in versions)
        if same not in seen or any(row.problems for row in versions):
            found[key] = tuple(_cells(versions))
        seen.add(same)
    return found


def _cells(versions: list[Row]) -> Iterator[str]:
    """A kernel's line: `versions` are its rows, one per target."""
    shown = next((row for row in versions if row.target == SHOWN), versions[0])
    yield shown.case.strip()
    yield shown.kernel
    yield _each(row.registers for row in versions)
    yield _each(row.warps for row in versions)
    yield _each(row.spills for row in versions)
    yield _each(row.shared for row in versions)
    yield " + ".join(filter(None, map(_histogram, shown.loads)))
    yield " + ".join(filter(None, map(_histogram, shown.stores)))
    yield _each(" ".join(str(bits or "–") for bits in row.bits) for row in versions)
    yield _each(" + ".join(f"{n:.3g}" for n in row.bytes if n) for row in versions)
    yield _each(f"{row.instructions:.1f}" if row.instructions else "" for row in versions)
    yield _each(f"{100 * row.issue:.0f}" if row.issue else "" for row in versions if row.is_nvidia)
    yield _named_problems(versions)


def _each(figures: Iterable[object]) -> str:
    cells = [str(figure) for figure in figures]
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _histogram(widths: Counter[int]) -> str:
    return " ".join(f"{widths[bits]}×{bits}" for bits in sorted(widths, reverse=True))


def _named_problems(versions: list[Row]) -> str:
    """Each problem once, with the targets that have it unless all do."""
    of_problem = defaultdict(list)
    for row in versions:
        for problem in row.problems:
            of_problem[problem].append(row.target)
    everywhere = len(versions)
    return ", ".join(
        problem if len(targets) == everywhere else f"{problem} ({' '.join(targets)})"
        for problem, targets in sorted(of_problem.items())
    )


def make_tables(found: dict[Key, Line]) -> Iterator[Table]:
    """One table per operation, for people."""
    for op in dict.fromkeys(key[0] for key in found):
        table = Table(*COLUMNS, title=op, title_justify="left", box=box.SIMPLE)
        for key, line in found.items():
            if key[0] == op:
                table.add_row(*line)
        yield table


def write_tables(found: dict[Key, Line]) -> str:
    """The tables as they are kept: Markdown, that `read_tables` can read again."""
    text = [
        f"`python -m tritium.bench static --write`, Triton {triton.__version__}; "
        f"{', '.join(DEVICES)}"
    ]
    for op in dict.fromkeys(key[0] for key in found):
        text += ["", f"## {op}", "", *HEADER]
        text += [f"| {' | '.join(line)} |" for key, line in found.items() if key[0] == op]
    text += ["", *(f"{kernel} on {target}: {why}." for (kernel, target), why in UNFIT.items())]
    return "\n".join(text) + "\n"


def read_tables(text: str) -> tuple[str, dict[Key, Line]]:
    """Triton's version, and the lines, from what `write_tables` wrote."""
    version = re.search(r"Triton ([^;\s]+)", text)
    op, found, count = "", {}, Counter()
    for line in text.splitlines():
        if line.startswith("## "):
            op = line.removeprefix("## ")
        elif line.startswith("| ") and line not in HEADER:
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            name = op, cells[0], cells[1]
            found[*name, count[name]] = cells
            count[name] += 1
    return version[1] if version else "", found


def compare(fresh: dict[Key, Line], kept: str, ops: Iterable[str]) -> list[str]:
    """Differences from the kept table in columns that must be equal."""
    version, old = read_tables(kept)
    _, new = read_tables(write_tables(fresh))
    old = {key: line for key, line in old.items() if key[0] in ops}
    columns = COLUMNS if version == triton.__version__ else PORTABLE
    differences = []
    for key in dict.fromkeys([*old, *new]):
        where = ", ".join(key[:3])
        if key not in new or key not in old:
            if version in ("", triton.__version__):  # another may tell more kernels apart
                what = "is new" if key in new else "is kept, but no longer launched"
                differences.append(f"{where}: {what}")
        else:
            pairs = zip(COLUMNS, old[key], new[key], strict=False)
            changed = [(name, a, b) for name, a, b in pairs if a != b and name in columns]
            if columns is PORTABLE:
                changed = [x for x in changed if x[0] != "B/element" or not _moves_less(*x[1:])]
            differences += [f"{where}: {name} {a or '–'} → {b or '–'}" for name, a, b in changed]
    return differences


def _moves_less(kept: str, fresh: str) -> bool:
    """Whether no target moves more bytes: some versions keep rows in registers, others cannot."""
    totals = [
        [sum(map(float, filter(None, each.split(" + ")))) for each in cell.split(" / ")]
        for cell in (kept, fresh)
    ]
    most = max(map(len, totals))
    old, new = (total * most if len(total) == 1 else total for total in totals)
    return len(old) == len(new) and all(b <= a for a, b in zip(old, new, strict=True))


def main(ops: tyro.conf.Positional[tuple[str, ...]] = (), write: bool = False) -> None:
    """Show what the kernels compile to; exit with 1 if a limit is broken or the table is stale.

    Args:
        ops: operations to compile; all of them if none is named.
        write: keep the tables of all operations in static.md, in the folder of results.
    """
    if unknown := set(ops) - set(CASES):
        raise WrongInputError(f"no operation {sorted(unknown)}; there are {', '.join(CASES)}")
    if write and ops:
        raise WrongInputError("--write keeps the tables of all operations; name none of them")
    if knobs.runtime.interpret:
        raise WrongInputError("TRITON_INTERPRET is set, so nothing compiles; unset it")
    release = ".".join(triton.__version__.split(".")[:2])
    tried = ", ".join(TRIED)
    unknown_version = f"static: Triton {triton.__version__} is none of those tried, {tried}"
    if release not in TRIED:
        print(f"{unknown_version}: the figures may be wrong", file=sys.stderr)
    try:
        rows = measure_all(ops or CASES)
    except (AttributeError, ImportError, TypeError) as error:
        if release in TRIED:
            raise
        raise FailedError(f"{unknown_version}, and does not compile here: {error}") from error
    found = lines(rows)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(*make_tables(found), sep="\n")
    stale, kept_in = [], tables.results() / RESULTS
    kept = kept_in.read_text() if kept_in.exists() else ""
    if write:
        tables.write(kept_in, write_tables(found).encode())
    else:
        all_ops = {*CASES, *(key[0] for key in read_tables(kept)[1])}
        stale = compare(found, kept, set(ops) or all_ops)
    broken = [row for row in rows if row.problems]
    for row in broken:
        where = f"{row.op}, {row.case}, {row.kernel}, {row.target}"
        print(f"{where}: {', '.join(row.problems)}", file=sys.stderr)
    if stale:
        print(*stale, f"{RESULTS} is stale: {ACCEPT}", sep="\n", file=sys.stderr)
    if release not in TRIED:
        what = f"the limits were set for Triton {tried}; under {triton.__version__}"
        print(f"static: {what} spilled registers are only shown", file=sys.stderr)
        broken = [row for row in broken if {*row.problems} != {SPILLS}]
    raise SystemExit(1 if broken or stale else 0)
