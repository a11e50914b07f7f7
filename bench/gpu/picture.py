"""Picture of a session's results: steps, optimizers and operations side by side."""

from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from tritium.bench.gpu.page import Found
from tritium.bench.gpu.tasks import OPERATION, OPTIMIZER, STEP, Task
from tritium.bench.tables import Row, plt
from tritium.data import atomic

MARKERS = "os^Dv<>Pp*"
LINE = 0.21  # inches of a line of names
LEAST, MOST = 4.5, 40.0  # inches of the picture's height

Lines = dict[str, dict[str, float]]  # by line, then by implementation: percent of the bound


def draw(found: Found, path: Path) -> None:
    """Draw all that has numbers; the file is complete whenever it exists."""
    optimizers = lines_of(found, OPTIMIZER, lambda task: f"{task.name}, {task.shape}")
    passes = {
        name: lines_of(found, OPERATION, lambda task: f"{task.name}, {task.shape}", name)
        for name in ("forward", "backward", "both")
    }
    operations = list(dict.fromkeys(line for lines in passes.values() for line in lines))
    steps = {task.implementation: row for task, row in found.rows.items() if task.kind == STEP}
    styles = styles_of(task.implementation for task in found.rows if task.kind != STEP)
    left = len(steps) + len(optimizers) + 8
    height = min(max(LINE * max(left, len(operations)) + 2, LEAST), MOST)
    figure = plt.figure(figsize=(19, height), layout="constrained")
    grid = figure.add_gridspec(1, 4, width_ratios=(1.3, 1, 1, 1))
    side = grid[0, 0].subgridspec(2, 1, height_ratios=(len(steps) + 2, len(optimizers) + 4))
    _bars(figure.add_subplot(side[0]), steps)
    _dots(figure.add_subplot(side[1]), "optimizers", optimizers, list(optimizers), styles)
    for i, (name, lines) in enumerate(passes.items()):
        panel = figure.add_subplot(grid[0, i + 1])
        _dots(panel, f"operations, {name}", lines, operations, styles, labels=i == 0)
    drawn = [x for x in styles if any(x in line for y in (optimizers, *passes.values())
                                      for line in y.values())]  # fmt: skip
    handles = [Line2D([], [], color=styles[x][:2], marker=styles[x][2], linestyle="", label=x)
               for x in drawn]  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    where = "" if found.on_gpu else " (a CPU, not a GPU, at small shapes)"
    figure.suptitle(f"{found.sessions[0]['device']}{where}")
    with atomic.replacing(path) as draft:
        figure.savefig(draft, dpi=90)
    plt.close(figure)


def styles_of(names: Iterable[str]) -> dict[str, str]:
    """A colour and a marker for each implementation, Tritium's first, no two alike."""
    different = dict.fromkeys(names)
    ordered = sorted(different, key=lambda name: not name.startswith("Tritium"))
    markers = len(MARKERS)
    return {
        name: f"C{i % 10}{MARKERS[(i + i // 10) % markers]}" for i, name in enumerate(ordered)
    }  # fmt: skip


def lines_of(
    found: Found, kind: str, name: Callable[[Task], str], part: str | None = None
) -> Lines:
    """Percent of the bound of every implementation, by line."""
    lines: Lines = {}
    for task, row in found.rows.items():
        if task.kind == kind and part in (None, task.part) and row.percent_of_bound is not None:
            lines.setdefault(name(task), {})[task.implementation] = row.percent_of_bound
    return lines


def _bars(panel: Axes, steps: dict[str, Row]) -> None:
    """Milliseconds of each step, the quartiles as a line."""
    for place, row in enumerate(steps.values()):
        own = row.implementation.startswith("Tritium")
        middle = row.milliseconds or 0.0
        low, high = row.lower_quartile or middle, row.upper_quartile or middle
        panel.barh(place, middle, color="C0" if own else "0.65", height=0.7)
        panel.plot((low, high), (place, place), color="0.2", linewidth=1)
        panel.annotate(f" {middle:.4g}", (high, place), va="center", fontsize=8)
    panel.set_yticks(range(len(steps)), list(steps), fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.set_xlabel("ms a step", fontsize=8)
    panel.set_title("training step" if steps else "training step: not reached", fontsize=10)


def _dots(
    panel: Axes,
    title: str,
    lines: Lines,
    names: list[str],
    styles: dict[str, str],
    labels: bool = True,
) -> None:
    """A line of names each, a dot for each implementation at its percent of the bound."""
    places = {name: place for place, name in enumerate(names)}
    for line, values in lines.items():
        for who in sorted(values, key=lambda who: who.startswith("Tritium")):  # on top
            panel.plot(values[who], places[line], styles[who], markersize=5, alpha=0.85)
    highest = max((x for values in lines.values() for x in values.values()), default=0)
    panel.axvline(100, color="0.6", linewidth=1, linestyle="--")
    panel.set_xlim(0, 1.05 * max(highest, 100))
    panel.set_yticks(range(len(names)), names if labels else [], fontsize=8)
    panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    panel.grid(alpha=0.3)
    panel.set_xlabel("% of the bound", fontsize=8)
    panel.set_title(title if lines else f"{title}: not reached", fontsize=10)
