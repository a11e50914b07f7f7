"""A target is met at its limit, missed beyond it, and never met by what was not measured."""

from dataclasses import replace

import pytest

from tritium.bench import tables
from tritium.bench.optimizer_shapes import MODELS
from tritium.bench.optimizer_targets import TARGETS, verdicts
from tritium.bench.optimizer_tasks import TASKS


def row(model: str, task: str, implementation: str = "Tritium", **figures) -> tables.Row:
    return tables.Row(model, {"N": 1, "tensors": 1}, implementation, task, **figures)


def perfect() -> list[tables.Row]:
    """Rows that meet every target, and others that none is about."""
    names = [name for name in TASKS if "AdamW" in name or "norm" in name]
    rows = [
        row("GPT-2 1.5B", name, percent_of_copy=94.0, launches=3, milliseconds=4.0)
        for name in names
    ]
    rows += [row("Llama-3 8B", name, percent_of_copy=1.0) for name in names]
    clip = "clip + AdamW float32"
    rows.append(row("GPT-2 1.5B", clip, "torch clip, fused", milliseconds=5.0, launches=99))
    return [*rows, *(row("GPT-2 124M", name, host_microseconds=150.0) for name in names)]


def test_targets_are_about_tasks_and_models_that_there_are():
    for target in TARGETS:
        assert target.model in MODELS
        assert target.task in TASKS
    assert sum(target.what == "% of copy" for target in TARGETS) == 8


@pytest.mark.parametrize("device", ["GPU", "CPU"])
def test_targets_are_met_at_their_limits(device):
    found = list(verdicts(perfect(), device))
    assert len(found) == sum(target.device == device for target in TARGETS)
    assert all(met for _, met in found), found


@pytest.mark.parametrize(
    ("implementation", "task", "figures", "words"),
    [
        (
            "Tritium",
            "AdamW bf16, split master",
            {"percent_of_copy": 93.9},
            "at least 94: 93.9, MISSED",
        ),
        ("Tritium", "norm bf16", {"percent_of_copy": 93.0}, "at least 94: 93, MISSED"),
        ("Tritium", "clip + AdamW float32", {"launches": 4}, "at most 3: 4, MISSED"),
        (
            "Tritium",
            "clip + AdamW float32",
            {"milliseconds": 4.01},
            "at least 1.25: 1.247, MISSED",
        ),
        ("Tritium", "norm bf16", {"percent_of_copy": None}, "at least 94: not measured"),
        ("torch clip, fused", "clip + AdamW float32", {"milliseconds": None}, "1.25: not measured"),
    ],
)
def test_a_target_missed_is_named(implementation, task, figures, words):
    case = ("GPT-2 1.5B", task, implementation)
    rows = [
        replace(row, **figures) if (row.shape, row.pass_name, row.implementation) == case else row
        for row in perfect()
    ]
    missed = [text for text, met in verdicts(rows, "GPU") if not met]
    assert len(missed) == 1
    assert words in missed[0]
