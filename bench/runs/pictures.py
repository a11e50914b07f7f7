"""The pictures of a run that the README shows: `python -m tritium.bench pictures RUN [RUN ...]`.

They are made from what the runs left: the norms of the first one's layers, the progress display in
its middle, and the page that compares them all, in a browser.
"""

import io
import json
import re
import tempfile
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from tritium.bench.ends import FailedError, WrongInputError, writable
from tritium.bench.runs._browser import photograph
from tritium.bench.runs.report import RunError, render
from tritium.bench.tables import results
from tritium.training.monitor.display import Display
from tritium.training.monitor.plot import plot_layers
from tritium.training.run.run_folder import read_lines
from tritium.training.schedule import Budget

WIDTH, HEIGHT = 1280, 1275  # of the page, in pixels
COLUMNS = 122  # of the terminal


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path | None = None
) -> None:
    """Make layers.png, progress.png and report.png from finished runs of train.py.

    Args:
        runs: their folders; the first is the one whose layers and progress are shown.
        out: the folder of the pictures; that of results by default.
    """
    out = out or results()
    if not runs:
        raise WrongInputError("name the folder of a run of train.py, or several")
    writable(out / "report.png")
    try:
        with tempfile.TemporaryDirectory() as folder:
            page, terminal = Path(folder) / "report.html", Path(folder) / "progress.svg"
            page.write_text(render(runs))
            photograph(page, out / "report.png", WIDTH, HEIGHT)
            picture, size = progress(runs[0])
            terminal.write_text(picture)
            photograph(terminal, out / "progress.png", *size)
        plot_layers(read_lines(runs[0] / "layers.jsonl"), out / "layers.png", runs[0].name)
    except RunError as error:
        raise WrongInputError(str(error)) from None
    except OSError as error:
        raise FailedError(str(error)) from None


def progress(run: Path) -> tuple[str, tuple[int, int]]:
    """Return the progress display in the middle of a run as SVG, and its size in pixels."""
    record = json.loads((run / "config.json").read_text())
    log = read_lines(run / "log.jsonl")
    steps = record["config"]["length"]["max_steps"]
    tokens_per_step = log[0]["tokens"] / log[0]["step"]
    terminal = Console(
        file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, highlight=False
    )
    display, seconds = Display(Budget(steps=steps), 0, 0.0, run.name, to=terminal), 0.0
    for entry in log[: round(0.55 * len(log))]:
        seconds += tokens_per_step / entry["tokens_per_s"]
        display.show([entry], seconds)
    terminal.print(display)
    picture = terminal.export_svg(title=f"python train.py {record['preset']}")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)[0]
    return picture, (round(float(width)), round(float(height)))
