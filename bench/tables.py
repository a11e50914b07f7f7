"""Tables, result files and plots of a measurement."""

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import matplotlib
from rich import box
from rich.console import Console
from rich.table import Table

from tritium.data.json_text import to_json
from tritium.kernels.roofline import Device
from tritium.kernels.units import duration, quantity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEPT = Path(__file__).parent / "results"
PANELS = 4  # of a plot, side by side


@dataclass(frozen=True)
class Row:
    """One implementation's pass at one shape: a line of the table."""

    shape: str
    dims: dict[str, int]
    implementation: str
    pass_name: str
    milliseconds: float | None = None
    """Median of the calls."""
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    bytes: int | None = None
    """The bound's, as `flops`: not the implementation's own."""
    flops: int | None = None
    resource: str | None = None
    """The resource that bounds the operation."""
    percent_of_bound: float | None = None
    percent_of_copy: float | None = None
    """By the bytes that the implementation moves itself, where they are known."""
    state_bytes: int | None = None
    """Memory of an optimizer's state from one step to the next."""
    launches: int | None = None
    """Kernels, copies and fills that a step asks the device for."""
    host_microseconds: float | None = None
    """Until the call returns, not until its work is done."""
    peak_bytes: int | None = None
    """The most that one call holds at a time above what it was given. None on a CPU."""
    error: float | None = None
    """Relative root mean square against float64: on the inputs that were timed, or after an
    optimizer's steps on a small model."""
    problem: str | None = None
    """The reason, where there are no numbers."""


@dataclass(frozen=True)
class Report:
    """The measurement of one operation."""

    op: str
    axis: str
    dtype: str
    device: str
    measured_on: str
    """ "GPU" or "CPU"."""
    rates: dict[str, float]
    """Measured in the same process: bytes and operations per second."""
    versions: dict[str, str]
    date: str
    command: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The operation, the dtype and the device: for a CPU it says so."""
        cpu = " (measured on a CPU, not a GPU)" if self.measured_on == "CPU" else ""
        return f"{self.op}, {self.dtype}, {self.device}{cpu}"

    def path(self, suffix: str) -> Path:
        """The file in which the measurement is kept."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return results() / f"{self.op}-{device}.{suffix}"


def describe_rates(rates: Device) -> str:
    """The device's measured rates in one line."""
    return (
        f"copy {quantity(rates.copy, 'B/s')}, products in bf16 "
        f"{quantity(rates.matrix_16, 'FLOP/s')}, in fp32 {quantity(rates.matrix_32, 'FLOP/s')}"
    )


def _rate(row: Row) -> str:
    products = row.resource == "matrix products"
    amount, unit = (row.flops, "FLOP/s") if products else (row.bytes, "B/s")
    return quantity((amount or 0) / (row.milliseconds or inf) * 1e3, unit)


def _time(row: Row) -> str:
    low, middle, high = (
        duration((x or 0) / 1e3) for x in (row.lower_quartile, row.milliseconds, row.upper_quartile)
    )
    return f"{middle} ({low} to {high})"


def _per_parameter(amount: float | None, row: Row) -> str:
    """Bytes per parameter; blank except for optimizers."""
    return "" if amount is None or row.state_bytes is None else f"{amount / row.dims['N']:.4g}"


def _percent(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "time (quartiles)": _time,
    "rate": _rate,
    "bound, B/param": lambda row: _per_parameter(row.bytes, row),
    "% of bound": lambda row: _percent(row.percent_of_bound),
    "% of copy": lambda row: _percent(row.percent_of_copy),
    "state, B/param": lambda row: _per_parameter(row.state_bytes, row),
    "launches": lambda row: "" if row.launches is None else str(row.launches),
    "host": lambda row: (
        "" if row.host_microseconds is None else duration(row.host_microseconds / 1e6)
    ),
    "peak memory": lambda row: "" if row.peak_bytes is None else quantity(row.peak_bytes, "B"),
    "error": lambda row: "" if row.error is None else f"{row.error:.1e}",
}


def table(report: Report) -> Table:
    """The report as a table: a shape's name in its first line, no column that would be empty."""
    measured = [row for row in report.rows if row.milliseconds is not None]
    columns = {name: cell for name, cell in COLUMNS.items() if any(map(cell, measured))}
    headers = ("shape", "implementation", "pass", *(columns or ["time (quartiles)"]))
    result = Table(*headers, title=report.title, title_justify="left", box=box.SIMPLE)
    last = None
    for row in report.rows:
        if last is not None and row.shape != last:
            result.add_section()
        dims = " ".join(f"{letter}={size}" for letter, size in row.dims.items())
        shape = f"{row.shape} ({dims})" if row.shape != last else ""
        known = row.milliseconds is not None
        cells = (cell(row) for cell in columns.values()) if known else (row.problem or "",)
        result.add_row(shape, row.implementation, row.pass_name, *cells)
        last = row.shape
    return result


def results() -> Path:
    """Return where results go: bench/results at the root of a checkout, else ./bench-results."""
    here = Path.cwd()
    checkout = here in KEPT.parents and (here / "pyproject.toml").is_file() and KEPT.is_dir()
    return KEPT if checkout and "site-packages" not in KEPT.parts else here / "bench-results"


def present(lines: Sequence[str], *tables: Table, width: int, write_to: Path | None) -> None:
    """Print paragraphs and tables; write them as Markdown where there is a file to write to."""
    file = io.StringIO()
    for style, to in ((box.SIMPLE, None), (box.MARKDOWN, file)):
        console = Console(file=to, width=width)
        console.print(*lines, sep="\n\n", soft_wrap=True, markup=False)
        for table in tables:
            table.box = style
            console.print("", table, sep="\n")
    if write_to is not None:
        write(write_to, file.getvalue().encode())


def markdown(table: Table, width: int = 110) -> str:
    """A table in Markdown."""
    table.box = box.MARKDOWN
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue().strip()


def write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def save(report: Report, path: Path) -> None:
    """Keep `report` as JSON."""
    write(path, (to_json(asdict(report), indent=1) + "\n").encode())


def load(path: Path) -> Report:
    """Read what `save` wrote."""
    content = json.loads(path.read_text())
    rows = tuple(Row(**row) for row in content.pop("rows"))
    return Report(**content | {"rows": rows, "notes": tuple(content["notes"])})


def plot(report: Report, path: Path) -> None:
    """Draw percent of the bound against size: a panel per pass, a line per implementation."""
    rows = [row for row in report.rows if row.percent_of_bound is not None]
    passes = list(dict.fromkeys(row.pass_name for row in rows))
    implementations = list(dict.fromkeys(row.implementation for row in rows))
    sizes = sorted({row.dims[report.axis] for row in rows})
    lines = max(-(-len(passes) // PANELS), 1)
    across = max(min(len(passes), PANELS), 1)
    figure, axes = plt.subplots(
        lines, across, figsize=(max(7.5, 1 + 4 * across), 1 + 3.4 * lines), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    drawn = {}
    for panel, pass_name in zip(axes.flat, passes, strict=False):
        for i, implementation in enumerate(implementations):
            points = sorted(
                (row.dims[report.axis], row.percent_of_bound)
                for row in rows
                if (row.pass_name, row.implementation) == (pass_name, implementation)
            )
            if points:
                style = f"C{i % 10}{'os^'[i // 10 % 3]}-"
                drawn[implementation], *_ = panel.plot(
                    *zip(*points, strict=True), style, markersize=4
                )
        panel.axhline(100, color="0.6", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, list(map(_tick, sizes)), rotation=35, ha="right")
        panel.minorticks_off()
        panel.set(title=pass_name, xlabel=f"{report.axis} (elements)")
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(passes) :]:
        panel.set_axis_off()
    highest = max((row.percent_of_bound or 0 for row in rows), default=0)
    for panel in axes[:, 0]:
        panel.set(ylabel="% of the bound", ylim=(0, 1.05 * max(highest, 100)))
    labels = [implementation for implementation in implementations if implementation in drawn]
    figure.legend(
        [drawn[label] for label in labels], labels, loc="outside lower center",
        ncols=max(min(len(labels), 2 * across), 1),
    )  # fmt: skip
    figure.suptitle(report.title.replace(f", {report.device}", f"\n{report.device}"), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_lines(
    lines: dict[str, Sequence[float]], sizes: Sequence[int], path: Path, xlabel: str, ylabel: str
) -> None:
    """Draw a labelled line for each name over `sizes`."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(sizes, values, f"C{i}o-", markersize=4, label=name)
    axes.set_xticks(sizes)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tick(size: int) -> str:
    return str(size) if size < 1e6 else quantity(size, "").strip()
