"""Comparison with PyTorch and peers: `python -m tritium.bench OP [OP ...]`, or `all`."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any, Literal, TypeVar, cast

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch._functorch import config as functorch

from tritium.bench import harness, tables
from tritium.bench.implementations import Loader
from tritium.bench.operations import OPERATIONS, Dims, Make, Operation
from tritium.bench.tables import Report, Row
from tritium.kernels.roofline import Bound, Device, explain
from tritium.kernels.runtime import uses_triton

T = TypeVar("T")

WIDTH = 170  # of tables that do not go to a terminal
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKAGES = (
    "torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "apex", "torchao",
    "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of a run, the same for all its operations."""

    device: torch.device
    rates: Device
    """Measured in this process: the bounds are bounds at these."""
    cache: int
    """Bytes of the last-level cache."""
    dtype: torch.dtype = torch.bfloat16
    sizes: tuple[int, ...] = ()
    quick: bool = False
    compiled: bool = False
    seconds: float = 0.3
    """Limit of the timing of one pass."""


def installed(peers: dict[str, Loader]) -> tuple[dict[str, Loader], list[str]]:
    """The peers that can be imported, and the names of those that are not installed."""
    missing = []
    for name, load in peers.items():
        try:
            load()
        except ModuleNotFoundError:
            missing.append(name)
        except Exception:  # a broken peer becomes a row that says so
            continue
    return {name: load for name, load in peers.items() if name not in missing}, missing


def implementations_of(operation: Operation, compiled: bool) -> dict[str, Loader]:
    """The implementations to measure, Tritium's first."""
    implementations = operation.tritium | {"eager": lambda: operation.eager}
    if compiled:
        implementations["torch.compile"] = partial(_compile, operation.eager)
    return implementations | installed(operation.peers)[0]


def _compile(function: Callable) -> Callable:
    torch.compiler.reset()  # of the shapes before this one
    functorch.donated_buffer = False  # the backward pass runs more than once on one graph
    return torch.compile(function, dynamic=False)


def measure(name: str, operation: Operation, settings: Settings) -> Iterator[Row]:
    """Measure every implementation at every shape in every pass; a failure is a row too."""
    make = Make(settings.dtype, settings.device)
    errors: dict[str, dict[str, float]] = {}
    implementations = implementations_of(operation, settings.compiled)
    for shape, dims in operation.cases(settings.device, settings.sizes, settings.quick).items():
        bounds = explain(
            name, **cast(dict[str, Any], dims), dtype=settings.dtype, device=settings.rates
        )
        copies = attempt(partial(_copies, operation, make, dims, settings.cache))
        for implementation, load in implementations.items():
            function = attempt(load)
            if implementation not in errors and callable(function):
                errors[implementation] = _errors(operation, make, implementation, function)
            for pass_name in harness.PASSES:
                if pass_name == "backward" and implementation in operation.gradient_in_forward:
                    continue
                row = Row(shape, dims, implementation, pass_name)
                bound = getattr(bounds, pass_name)
                yield _measured(
                    row, function, copies, bound, errors.get(implementation, {}), settings
                )
                if settings.device.type == "cuda":
                    torch.cuda.empty_cache()
        del copies  # before those of the next shape are made


def attempt(make: Callable[[], T]) -> T | str:
    """Return what `make` returns, or why it does not; an exception would keep its tensors."""
    try:
        return make()
    except Exception as problem:  # of any kind: it concerns one implementation alone
        return harness.reason(problem)


def _measured(
    row: Row,
    function: Callable | str,
    copies: list[list[Tensor]] | str,
    bound: Bound,
    errors: dict[str, float],
    settings: Settings,
) -> Row:
    """`row` with its numbers, or with the reason why it has none."""
    if isinstance(copies, str):
        return replace(row, problem=copies)
    if isinstance(function, str):
        return replace(row, problem=function)
    found = attempt(partial(_timing_and_peak, function, copies, row.pass_name, settings))
    if isinstance(found, str):
        return replace(row, problem=found)
    timing, peak = found
    return replace(
        row, milliseconds=timing.median, lower_quartile=timing.lower_quartile,
        upper_quartile=timing.upper_quartile, bytes=bound.bytes, flops=bound.flops,
        resource=bound.resource, percent_of_bound=percent_of_bound(bound, timing.median),
        peak_bytes=peak, error=errors.get(row.pass_name),
    )  # fmt: skip


def _copies(operation: Operation, make: Make, dims: Dims, cache: int) -> list[list[Tensor]]:
    return harness.rotated(operation.inputs(make, **dims), cache)


def _timing_and_peak(
    function: Callable, copies: list[list[Tensor]], pass_name: str, settings: Settings
) -> tuple[harness.Timing, int | None]:
    calls = [harness.calls_of(function, inputs, pass_name) for inputs in copies]
    seconds = harness.time_calls(calls, settings.device, settings.seconds)
    return harness.summary(seconds), harness.peak_bytes(calls[0], settings.device)


def _errors(
    operation: Operation, make: Make, implementation: str, function: Callable
) -> dict[str, float]:
    """Each pass's error at the smallest shape; none where random numbers are not Tritium's."""
    if operation.truth and implementation not in operation.tritium:
        return {}

    def errors() -> dict[str, float]:
        truth = operation.truth() if operation.truth else operation.eager
        inputs = operation.inputs(make, **operation.smallest)
        exact = harness.outputs_of(truth, harness.in_float64(inputs))
        return harness.errors(function, exact, inputs)

    found = attempt(errors)
    return {} if isinstance(found, str) else found


def percent_of_bound(bound: Bound, milliseconds: float) -> float:
    """The bound in percent of the time taken: 100 is the limit."""
    return bound.microseconds / milliseconds / 10


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
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        notes=tuple(notes),
        rows=rows,
    )


def _versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _notes(operation: Operation, settings: Settings) -> Iterator[str]:
    smallest = " ".join(f"{letter}={size}" for letter, size in operation.smallest.items())
    yield f"Rates: the bytes or operations of the bound. Error: against float64 at {smallest}."
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
        raise SystemExit(f"bench: no operation {unknown}; there are {', '.join(OPERATIONS)}")
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
