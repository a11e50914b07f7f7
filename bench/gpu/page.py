"""Page of a session's results, in Markdown."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf
from pathlib import Path

from tritium.bench.gpu import suite
from tritium.bench.gpu.blocked import Blocked, problem_of
from tritium.bench.gpu.steps import tokens_per_second
from tritium.bench.gpu.tasks import CHECK, OPERATION, OPTIMIZER, PROFILE, STEP, Task
from tritium.bench.harness import PASSES
from tritium.bench.tables import Row, describe_rates
from tritium.data import atomic
from tritium.kernels.roofline import Device
from tritium.kernels.units import duration, quantity

SHOWN = 20  # names of a list
NOTHING = "Not reached."
DRIFT = 0.05  # of the time: beyond it the turns of a measurement disagree, and the page says so
CPU = (
    "**Measured on a CPU, not a GPU, at shapes cut to size. The figures show that the instrument "
    "works; of the kernels they show nothing: Tritium runs its PyTorch references here.**"
)


class Found:
    """Contents of a session's folder.

    Args:
        folder: of the session.
        entries: of its journal.
        tasks: all that there is to measure.
    """

    def __init__(self, folder: Path, entries: list[dict], tasks: list[Task]) -> None:
        self.entries, self.tasks = entries, tasks
        self.tests = suite.results(folder)
        self.ended = [entry["how"] for entry in self.of("tests")]
        self.tests_command = "".join(entry["command"] for entry in self.of("tests")[-1:])
        self.sessions = self.of("session")
        self.results = {entry["key"]: entry for entry in self.of("row")}
        self.blocked = Blocked()
        for entry in entries:
            self.blocked.learn(entry)

    def of(self, kind: str) -> list[dict]:
        """The entries of one kind."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return self.sessions[0]["cuda"]

    @cached_property
    def rates(self) -> Device | None:
        """The device's measured rates."""
        found = [entry["rates"] for entry in self.results.values() if entry.get("rates")]
        return Device(**found[-1]) if found else None

    @cached_property
    def rows(self) -> dict[Task, Row]:
        """A row for each measurement with numbers, its turns merged, in order of importance."""
        turns: dict[Task, list[Row]] = defaultdict(list)
        for task in self.tasks:
            entry = self.results.get(task.key)
            if entry is not None and entry.get("row") and not problem_of(entry):
                turns[replace(task, turn=1)].append(Row(**entry["row"]))
        return {task: merged(rows) for task, rows in turns.items()}

    @cached_property
    def drifting(self) -> list[str]:
        """Measurements whose turns disagree."""
        times: dict[str, list[float]] = defaultdict(list)
        for task in self.tasks:
            row = (self.results.get(task.key) or {}).get("row")
            if row and row["milliseconds"]:
                times[task.each].append(row["milliseconds"])
        return [each for each, xs in times.items() if max(xs) - min(xs) > DRIFT * max(xs)]

    @cached_property
    def problems(self) -> dict[tuple[str, str], list[Task]]:
        """Measurements without numbers, by implementation and reason."""
        found: dict[tuple[str, str], list[Task]] = defaultdict(list)
        for task in self.tasks:
            if problem := problem_of(self.results.get(task.key, {})):
                found[task.implementation or task.kind, problem].append(task)
        return found

    @cached_property
    def unreached(self) -> list[Task]:
        """Measurements that there was no time for."""
        return [x for x in self.tasks if x.key not in self.results and not self.blocked.by(x)]

    @property
    def measured(self) -> int:
        """Measurements that have a result."""
        return len(self.tasks) - len(self.unreached)

    @property
    def tests_ended(self) -> str:
        """End of the last run of the tests, and the number that it did not reach."""
        last = self.of("tests")[-1]
        if last["how"] != "cut":
            return last["how"]
        left = last["left"]
        return f"cut, {left} not reached" if left is not None else "cut before any was collected"

    @property
    def summary(self) -> str:
        """The measurements and tests reached, in a sentence or three."""
        outcomes = Counter(entry["outcome"] for entry in self.tests.values())
        how = f" ({self.tests_ended})" if self.ended else ""
        tests = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
        said = f"Tests: {tests or 'none'}{how}. {self.measured} of {len(self.tasks)} measurements"
        if not self.unreached:
            return f"{said}: all there are."
        missing = Counter(f"{x.name}, {x.shape}".strip(", ") or x.kind for x in self.unreached)
        names = [f"{name} ({n})" for name, n in missing.items()]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f"{said}. Not reached: {'; '.join(names[:SHOWN])}{more}."


def merged(rows: Sequence[Row]) -> Row:
    """The turns of one measurement: the median of their medians, and the outermost quartiles."""
    times = [row.milliseconds or inf for row in rows]
    median = statistics.median(times)
    scale = times[0] / median
    first = rows[0]
    return replace(
        first, milliseconds=median,
        lower_quartile=min(row.lower_quartile or inf for row in rows),
        upper_quartile=max(row.upper_quartile or 0.0 for row in rows),
        percent_of_bound=first.percent_of_bound and first.percent_of_bound * scale,
        percent_of_copy=first.percent_of_copy and first.percent_of_copy * scale,
    )  # fmt: skip


def write(found: Found, path: Path) -> None:
    """Write the page; it is complete whenever it exists."""
    atomic.write(path, "\n".join(lines_of(found)) + "\n")


def lines_of(found: Found) -> Iterator[str]:
    """The lines of the page."""
    session = found.sessions[0]
    yield from (f"# {session['device']}", "")
    if not found.on_gpu:
        yield from (CPU, "")
    yield from (found.summary, "")
    yield from _conditions(found, session)
    yield from ("![Tests, steps and operations in one picture](results.png)", "")
    for title, part in PARTS.items():
        lines = list(part(found)) or ([NOTHING] if part is not _without_numbers else [])
        if lines:
            yield from (f"## {title}", "", *lines, "")


def _conditions(found: Found, session: dict) -> Iterator[str]:
    versions = ", ".join(f"{name} {x}" for name, x in session["versions"].items())
    yield f"Versions: {versions}; Tritium's code {session['code']}."
    yield f"Rates: {describe_rates(found.rates) if found.rates else 'not measured'}."
    yield _clocks(found)
    for entry in found.sessions:
        yield f"{entry['date']}, {entry['minutes']:g} min: `{entry['command']}`."
    yield ""


def _clocks(found: Found) -> str:
    samples = found.of("clocks")
    if not samples:
        return "Clocks: not read here."
    names = [name for name in samples[0] if name != "kind"]
    parts = []
    for name in names:
        values = [x[name] for x in samples]
        parts.append(f"{name} {min(values):g} to {max(values):g} (median {_median(values):g})")
    return f"Clocks, in {len(samples)} samples (MHz, degrees C, W): {'; '.join(parts)}."


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _tests(found: Found) -> Iterator[str]:
    if not found.tests:
        yield f"None ended: {found.tests_ended}." if found.ended else "Not asked for."
        return
    files = {name.partition("::")[0] for name in found.tests}
    yield f"{len(found.tests)} tests of {len(files)} files ran; `{found.tests_command}`."
    failed = [x for x in found.tests.values() if x["outcome"] == "failed"]
    if failed:
        yield from ("", "Failed:", "")
        yield from (f"- `{x['test']}`: {x['reason']}" for x in failed)


def _steps(found: Found) -> Iterator[str]:
    rows = [row for task, row in found.rows.items() if task.kind == STEP]
    if rows:
        dims = " ".join(f"{letter}={size}" for letter, size in rows[0].dims.items())
        yield f"bfloat16, random tokens, {dims}. Time by the wall's clock."
        yield ""
        yield from head("step", "time (quartiles)", "tokens/s", "% of its bound", "peak")
    for row in rows:
        memory = quantity(row.peak_bytes, "B") if row.peak_bytes else ""
        yield cells(
            row.implementation, _time(row), f"{tokens_per_second(row):,.0f}",
            f"{row.percent_of_bound:.3g}", memory,
        )  # fmt: skip
    for entry in found.results.values():
        if entry["task"]["kind"] in (PROFILE, CHECK) and entry.get("text"):  # none if it crashed
            yield from ("", entry["text"])


def _optimizers(found: Found) -> Iterator[str]:
    by_step: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for task, row in found.rows.items():
        if task.kind == OPTIMIZER:
            by_step[task.shape, task.name].append(row)
    if by_step:
        yield from head("model", "step", "Tritium: time, % of bound, launches, error", "others")
    for (model, name), rows in by_step.items():
        own = [row for row in rows if row.implementation == "Tritium"]
        others = [row for row in rows if row.implementation != "Tritium"]
        mine = ""
        if own:
            launches = "" if own[0].launches is None else f", {own[0].launches}"
            mine = f"{_brief(own[0])}{launches}, {_error(own[0])}"
        said = "; ".join(f"{row.implementation} {_brief(row)}" for row in others)
        yield cells(model, name, mine, said)


def _operations(found: Found) -> Iterator[str]:
    cases: dict[tuple[str, str], dict[tuple[str, str], Row]] = defaultdict(dict)
    for task, row in found.rows.items():
        if task.kind == OPERATION:
            cases[task.name, task.shape][task.implementation, task.part] = row
    names = list(dict.fromkeys(who for rows in cases.values() for who, _ in rows))
    if not names:
        return
    yield "Percent of the bound: forward / backward / both. Time, error, peak: Tritium's, both."
    yield ""
    yield from head("operation", "shape", *names, "time", "error", "peak")
    for (name, shape), rows in cases.items():
        first = next(iter(rows.values()))
        dims = " ".join(f"{letter}={size}" for letter, size in first.dims.items())
        both = rows.get(("Tritium", "both"))
        last = ("", "", "")
        if both is not None:
            peak = quantity(both.peak_bytes, "B") if both.peak_bytes is not None else ""
            last = (_ms(both), _error(both), peak)
        yield cells(name, f"{shape} ({dims})", *(_passes(rows, who) for who in names), *last)


def _passes(rows: dict[tuple[str, str], Row], who: str) -> str:
    found = [rows.get((who, part)) for part in PASSES]
    if not any(found):
        return ""
    return " / ".join("–" if row is None else f"{row.percent_of_bound:.0f}" for row in found)


def _without_numbers(found: Found) -> Iterator[str]:
    for (who, problem), tasks in found.problems.items():
        cases = list(dict.fromkeys(f"{x.name}, {x.shape}, {x.part}".strip(", ") for x in tasks))
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        yield f"- {who}: {problem} ({'; '.join(cases[:3])}{more})"
    if found.drifting:
        names = "; ".join(found.drifting[:SHOWN])
        yield f"- turns that differ by more than {100 * DRIFT:.0f} %: {names}"


PARTS = {
    "Tests": _tests,
    "Training step": _steps,
    "Optimizers": _optimizers,
    "Operations": _operations,
    "Without numbers, or doubtful": _without_numbers,
}


def head(*names: str) -> tuple[str, str]:
    """The head of a table."""
    return cells(*names), cells(*("---" for _ in names))


def cells(*values: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(values)} |"


def _time(row: Row) -> str:
    low, high = (duration((x or 0) / 1e3) for x in (row.lower_quartile, row.upper_quartile))
    return f"{_ms(row)} ({low} to {high})"


def _ms(row: Row) -> str:
    return duration((row.milliseconds or 0) / 1e3)


def _brief(row: Row) -> str:
    return f"{_ms(row)}, {row.percent_of_bound:.0f} %"


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}"
