"""Prove that page and picture show what a session's folder holds, and name what is missing."""

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import pytest
import torch
from doubling import RATES as A_MACHINE

from tritium.bench.gpu import page, picture, suite
from tritium.bench.gpu.tasks import CHECK, OPERATION, OPTIMIZER, PROFILE, RATES, STEP, Task, tasks
from tritium.bench.tables import Row

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def session(cuda: bool) -> dict:
    return {
        "kind": "session", "date": "2026-01-01T00:00:00+00:00", "minutes": 10.0, "cuda": cuda,
        "command": "python -m tritium.bench gpu", "device": "a device", "code": "abc",
        "versions": {"torch": "2.11.0"},
    }  # fmt: skip


def row(task: Task, milliseconds: float, **options) -> dict:
    dims = {"B": 64, "L": 1024} if task.kind == STEP else {"T": 8, "D": 16}
    values = Row(
        task.shape, dims, task.implementation, task.part, milliseconds, milliseconds / 2,
        milliseconds * 2, percent_of_bound=100 / milliseconds, error=1e-3, **options,
    )  # fmt: skip
    return {"kind": "row", "key": task.key, "task": asdict(task), "row": asdict(values)}


NORM = ("rms_norm", "GPT-2 124M")
STEP_TASK = Task(STEP, "training step", "", "Tritium, 4 micro-batches, CUDA graph", "step")
ENTRIES = [
    {"kind": "row", "key": "rates / 1", "task": asdict(Task(RATES)), "rates": asdict(A_MACHINE)},
    {"kind": "clocks", "clocks.sm": 1980.0, "power.draw": 300.0},
    {"kind": "clocks", "clocks.sm": 1700.0, "power.draw": 700.0},
    row(STEP_TASK, 130.0, peak_bytes=8 << 30),
    row(Task(OPTIMIZER, "AdamW float32", "GPT-2 1.5B", "Tritium", "step"), 15.0, launches=2),
    row(Task(OPTIMIZER, "AdamW float32", "GPT-2 1.5B", "torch fused", "step"), 16.0),
    row(Task(OPERATION, *NORM, "Tritium", "forward"), 1.25),
    row(Task(OPERATION, *NORM, "Tritium", "backward"), 2.0),
    row(Task(OPERATION, *NORM, "Tritium", "both"), 4.0, peak_bytes=1 << 20),
    row(Task(OPERATION, *NORM, "liger", "both"), 8.0),
    {"kind": "row", "key": (x := Task(OPERATION, *NORM, "quack", "both")).key, "task": asdict(x),
     "problem": "crashed: SIGSEGV", "fatal": True},
    {"kind": "row", "key": (x := Task(CHECK, "sampling")).key, "task": asdict(x), "text": "Fast."},
    {"kind": "row", "key": (x := Task(PROFILE)).key, "task": asdict(x),
     "problem": "no answer", "fatal": True},
]  # fmt: skip


def found_of(folder: Path, entries: list[dict], cuda: bool = True) -> page.Found:
    device = CUDA if cuda else CPU
    return page.Found(folder, [session(cuda), *entries], list(tasks(device, True)))


def lines(found: page.Found) -> list[str]:
    return list(page.lines_of(found))


def test_shows_each_part(tmp_path):
    (tmp_path / suite.RESULTS).write_text(
        "".join(
            json.dumps({"test": name, "outcome": outcome, "reason": reason}) + "\n"
            for name, outcome, reason in (
                ("a.py::one", "passed", ""), ("b.py::two", "failed", "1 is not 2"),
            )
        )
    )  # fmt: skip
    command = "python -m pytest tests/kernels"
    ended = {"kind": "tests", "how": "cut", "left": 7, "command": command}
    text = "\n".join(lines(found_of(tmp_path, [*ENTRIES, ended])))
    for said in (
        "# a device",
        "Tests: 1 failed, 1 passed (cut, 7 not reached). ",
        "- `b.py::two`: 1 is not 2",
        "`python -m pytest tests/kernels`",
        "clocks.sm 1700 to 1980 (median 1840)",
        "torch 2.11.0; Tritium's code abc",
        "| Tritium, 4 micro-batches, CUDA graph | 130 ms (65.0 ms to 260 ms) | 504,123 |",
        "| GPT-2 1.5B | AdamW float32 | 15.0 ms, 7 %, 2, 1.0e-03 | torch fused 16.0 ms, 6 % |",
        "| rms_norm | GPT-2 124M (T=8 D=16) | 80 / 50 / 25 | – / – / 12 | 4.00 ms | 1.0e-03 | 1.05",
        "\n\nFast.\n",
        "- profile: no answer",
        "- quack: crashed: SIGSEGV (rms_norm, GPT-2 124M, both)",
    ):
        assert said in text, said
    assert page.CPU not in text


def test_a_part_without_results_says_so(tmp_path):
    text = "\n".join(lines(found_of(tmp_path, [])))
    assert "## Tests\n\nNot asked for.\n" in text
    for part in ("Training step", "Optimizers", "Operations"):
        assert f"## {part}\n\nNot reached.\n" in text
    ended = {"kind": "tests", "how": "cut", "left": None, "command": "python -m pytest"}
    text = "\n".join(lines(found_of(tmp_path, [ended])))
    assert "## Tests\n\nNone ended: cut before any was collected.\n" in text


def test_says_that_it_was_a_cpu(tmp_path):
    assert page.CPU in lines(found_of(tmp_path, [], cuda=False))


def test_what_was_not_reached_is_counted_and_named(tmp_path):
    found = found_of(tmp_path, ENTRIES)
    # The rows, and those that the crash of quack leaves without: its two other passes, both turns.
    assert found.measured == sum(x["kind"] == "row" for x in ENTRIES) + 2 * 3 - 1
    assert "softmax, 1K keys (" in found.summary
    assert "more." in found.summary
    complete = [row(task, 1.0) for task in found.tasks]
    assert found_of(tmp_path, complete).summary.endswith("measurements: all there are.")


@pytest.mark.parametrize("entries", [[], ENTRIES[:1], ENTRIES])
def test_draws_what_there_is(tmp_path, entries):
    picture.draw(found_of(tmp_path, entries), tmp_path / "results.png")
    drawn = matplotlib.image.imread(tmp_path / "results.png")
    assert drawn.shape[0] > 300
    assert drawn.std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.png"]


def test_no_two_implementations_look_alike():
    names = [*map(str, range(40)), "Tritium", "0", "Tritium, in place"]
    styles = picture.styles_of(names)
    assert list(styles)[:2] == ["Tritium", "Tritium, in place"]
    assert len({*styles.values()}) == len(styles) == 42


def test_the_page_is_whole_whenever_it_exists(tmp_path):
    page.write(found_of(tmp_path, ENTRIES), tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text().endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
