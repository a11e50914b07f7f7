"""Comparison with PyTorch and peers: `python -m tritium.bench OP [OP ...]`, or `all`."""

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from tritium.bench import harness, tables
from tritium.bench.case import Case, Settings, implementations_of, installed
from tritium.bench.ends import WrongInputError
from tritium.bench.operations import OPERATIONS, Operation
from tritium.bench.tables import Report, Row
from tritium.kernels.runtime import uses_triton

WIDTH = 170  # of tables that do not go to a terminal
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKAGES = (
    "torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "apex", "torchao",
    "bitsandbytes",
)  # fmt: skip


def measure(name: str, operation: Operation, settings: Settings) -> Iterator[Row]:
    """Measure every implementation at every shape in every pass; a failure is a row too."""
    implementations = implementations_of(operation, settings.compiled)
    for shape, dims in operation.cases(settings.device, settings.sizes, settings.quick).items():
        case = Case(name, operation, shape, dims, settings)
        for implementation in implementations:
            for pass_name in case.passes(implementation):
                yield case.row(implementation, pass_name)
        del case  # with its inputs, before those of the next shape are made


def measure_all(names: list[str], settings: Settings, command: str) -> Iterator[Report]:
    """One report per operation, with a progress bar while it is made."""
    for name in names:
        operation = OPERATIONS[name]
        cases = operation.cases(settings.device, settings.sizes, settings.quick)
        per_case = len(implementations_of(operation, settings.compiled)) * len(harness.PASSES)
        rows = watched(name, len(cases) * per_case, measure(name, operation, settings))
        notes = _notes(operation, settings)
        dtype = str(settings.dtype).removeprefix("torch.")
        yield make_report(name, operation.axis, dtype, settings, command, notes, rows)


def watched(name: str, total: int, rows: Iterator[Row]) -> tuple[Row, ...]:
    """All of `rows`, with a progress bar while they are made."""
    done = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=total)
        for row in rows:
            done.append(row)
            progress.update(task, advance=1, description=f"{name}: {row.implementation}")
    return tuple(done)


def make_report(
    op: str,
    axis: str,
    dtype: str,
    settings: Settings,
    command: str,
    notes: Iterable[str],
    rows: tuple[Row, ...],
) -> Report:
    """The report of `rows`, which says where and with what they were measured."""
    rates = {key: rate for key, rate in asdict(settings.rates).items() if isinstance(rate, float)}
    return Report(
        op=op,
        axis=axis,
        dtype=dtype,
        device=settings.rates.name,
        measured_on="CPU" if settings.device.type == "cpu" else "GPU",
        rates=rates,
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        notes=tuple(notes),
        rows=rows,
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are compared."""
    found = {"python": python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _notes(operation: Operation, settings: Settings) -> Iterator[str]:
    yield "Rates: the bytes or operations of the bound. Error: against float64, on these inputs."
    if not uses_triton(torch.empty(0, device=settings.device)):
        yield "Tritium is the PyTorch reference here, not the kernel."
    elif settings.device.type == "cpu":
        yield "Tritium runs in Triton's interpreter here: its times mean nothing."
    if settings.device.type == "cpu":
        yield "Peak memory is not measured on a CPU."
    if not settings.compiled:
        yield "torch.compile was left out (--compile measures it)."
    if missing := installed(operation.peers)[1]:
        yield f"Not installed: {', '.join(missing)}."
    for implementation in implementations_of(operation, settings.compiled):
        if implementation in operation.gradient_in_forward:
            yield f"No backward alone for {implementation}: its forward pass makes the gradient."


def main(
    ops: tyro.conf.Positional[tuple[str, ...]],
    dtype: Literal["bf16", "fp32"] = "bf16",
    sizes: tuple[int, ...] = (),
    quick: bool = False,
    compile: bool = torch.cuda.is_available(),
    save: bool = False,
    plot: bool = False,
) -> None:
    """Measure operations against PyTorch and the libraries installed: time, memory, error.

    Args:
        ops: operations, or "all".
        dtype: of the inputs.
        sizes: sizes of the operation's main dimension, in place of the models' own.
        quick: the smallest shape alone, in a moment: to see that it works.
        compile: measure torch.compile too; on a CPU it takes minutes.
        save: keep OP-DEVICE.json, in the folder of results.
        plot: draw OP-DEVICE.png, there: percent of the bound against size.
    """
    names = list(OPERATIONS) if "all" in ops else list(ops)
    if unknown := sorted(set(names) - set(OPERATIONS)):
        raise WrongInputError(f"no operation {unknown}; there are {', '.join(OPERATIONS)}")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    settings = replace(
        settings_here(console, quick), dtype=DTYPES[dtype], sizes=sizes, compiled=compile
    )
    for done in measure_all(names, settings, command_line()):
        show(done, console, save, plot)


def settings_here(console: Console, quick: bool) -> Settings:
    """Measure the rates of the GPU, or of the CPU where there is none, and say so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = 0.02 if quick else 0.3
    rates = harness.measured_device(device, seconds)
    where = "CPU, not a GPU" if device.type == "cpu" else "GPU"
    console.print(f"Measured on a {where}: {rates.name}; {tables.describe_rates(rates)}")
    return Settings(device, rates, harness.cache_bytes(device), quick=quick, seconds=seconds)


def command_line() -> str:
    """The command that this process was started with."""
    return f"python -m tritium.bench {shlex.join(sys.argv[1:])}"


def show(done: Report, console: Console, save: bool, plot: bool) -> None:
    """Print a report; keep it and draw it where asked."""
    console.print(tables.table(done), *done.notes, sep="\n")
    if save:
        tables.save(done, done.path("json"))
        console.print(f"Saved {done.path('json')}")
    if plot:
        tables.plot(done, done.path("png"))
        console.print(f"Drew {done.path('png')}")
