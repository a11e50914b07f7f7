"""What a measurement looks like: a table, a file that is whole or not there, a plot."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from rich import box
from rich.table import Table

from kernels.explain import Device, duration, quantity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "shape", "contender", "pass", "time (quartiles)", "rate", "% of bound", "peak memory", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One contender's pass at one shape: a line of the table."""

    shape: str
    dims: dict[str, int]
    contender: str
    pass_name: str
    milliseconds: float | None = None
    """Median of the calls."""
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    bytes: int | None = None
    """The bound's, as `flops`: not the contender's own."""
    flops: int | None = None
    resource: str | None = None
    """What bounds the operation."""
    percent_of_bound: float | None = None
    peak_bytes: int | None = None
    """The most that one call holds at a time above what it was given. None on a CPU."""
    error: float | None = None
    """Relative root mean square against float64, at the operation's smallest shape."""
    problem: str | None = None
    """Why there are no numbers."""


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
        """Where the measurement is kept."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return RESULTS / f"{self.op}-{device}.{suffix}"


def describe_rates(rates: Device) -> str:
    """The device's measured rates in one line."""
    return (
        f"copy {quantity(rates.copy, 'B/s')}, products in bf16 "
        f"{quantity(rates.matrix_16, 'FLOP/s')}, in fp32 {quantity(rates.matrix_32, 'FLOP/s')}"
    )


def table(report: Report) -> Table:
    """The report as a table; a shape's name stands in its first line."""
    result = Table(*COLUMNS, title=report.title, title_justify="left", box=box.SIMPLE)
    last = None
    for row in report.rows:
        if last is not None and row.shape != last:
            result.add_section()
        dims = " ".join(f"{letter}={size}" for letter, size in row.dims.items())
        shape = f"{row.shape} ({dims})" if row.shape != last else ""
        result.add_row(shape, row.contender, row.pass_name, *_numbers(row))
        last = row.shape
    return result


def _numbers(row: Row) -> Iterable[str]:
    if row.milliseconds is None or row.lower_quartile is None or row.upper_quartile is None:
        return (row.problem or "",)
    quartiles = f"{duration(row.lower_quartile / 1e3)} to {duration(row.upper_quartile / 1e3)}"
    amount, unit = (
        (row.flops, "FLOP/s") if row.resource == "matrix products" else (row.bytes, "B/s")
    )
    return (
        f"{duration(row.milliseconds / 1e3)} ({quartiles})",
        quantity((amount or 0) / row.milliseconds * 1e3, unit),
        "" if row.percent_of_bound is None else f"{row.percent_of_bound:.3g}",
        "" if row.peak_bytes is None else quantity(row.peak_bytes, "B"),
        "" if row.error is None else f"{row.error:.1e}",
    )


def write(path: Path, content: bytes) -> None:
    """Write a file that is whole whenever it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def save(report: Report, path: Path) -> None:
    """Keep `report` as JSON."""
    write(path, (json.dumps(asdict(report), indent=1) + "\n").encode())


def load(path: Path) -> Report:
    """Read what `save` wrote."""
    content = json.loads(path.read_text())
    rows = tuple(Row(**row) for row in content.pop("rows"))
    return Report(**content | {"rows": rows, "notes": tuple(content["notes"])})


def plot(report: Report, path: Path) -> None:
    """Draw percent of the bound against size: a panel for each pass, a line for each contender."""
    rows = [row for row in report.rows if row.percent_of_bound is not None]
    passes = list(dict.fromkeys(row.pass_name for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows))
    sizes = sorted({row.dims[report.axis] for row in rows})
    figure, axes = plt.subplots(
        1, max(len(passes), 1), figsize=(max(7.5, 1 + 4 * len(passes)), 4.4), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, pass_name in zip(axes[0], passes, strict=False):
        for i, contender in enumerate(contenders):
            points = sorted(
                (row.dims[report.axis], row.percent_of_bound)
                for row in rows
                if (row.pass_name, row.contender) == (pass_name, contender)
            )
            if points:
                panel.plot(*zip(*points, strict=True), f"C{i}o-", label=contender, markersize=4)
        panel.axhline(100, color="0.6", linewidth=1, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=35, ha="right")
        panel.minorticks_off()
        panel.set(title=pass_name, xlabel=f"{report.axis} (elements)")
        panel.grid(alpha=0.3)
    highest = max((row.percent_of_bound or 0 for row in rows), default=0)
    axes[0][0].set(ylabel="% of the bound", ylim=(0, 1.05 * max(highest, 100)))
    handles, labels = axes[0][-1].get_legend_handles_labels()
    for panel in axes[0]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=max(len(labels), 1))
    figure.suptitle(report.title.replace(f", {report.device}", f"\n{report.device}"), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
