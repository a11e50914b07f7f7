"""Prove that every implementation has its rows, with figures or with the reason for none."""

import math
from dataclasses import replace

import pytest
import torch
from doubling import CPU, SETTINGS, doubling, raising, report_of

from tritium.bench import case, compare, harness
from tritium.bench.operations import OPERATIONS
from tritium.kernels import runtime
from tritium.kernels.roofline import Bound

pytestmark = pytest.mark.usefixtures("references")


def test_percent_of_bound():
    bound = Bound(bytes=1000, flops=0, microseconds=500.0, resource="memory")
    assert case.percent_of_bound(bound, 1.0) == 50
    assert case.percent_of_bound(bound, 0.5) == 100


def test_rows_hold_what_was_measured():
    rows = list(compare.measure("softmax", doubling(), SETTINGS))
    names = [(row.implementation, row.pass_name) for row in rows]
    passes = ("forward", "backward", "both")
    assert names == [(who, name) for who in ("Tritium", "eager") for name in passes]
    errors = {name: row.error for name, row in zip(names, rows, strict=True)}
    assert errors["Tritium", "forward"] == pytest.approx(0.01, rel=1e-4)
    assert errors["Tritium", "backward"] == 0
    assert errors["Tritium", "both"] == pytest.approx(0.01, rel=1e-4)
    assert errors["eager", "both"] == 0
    assert [row.bytes for row in rows[:3]] == [2 * 128, 3 * 128, 5 * 128]
    for row in rows:
        assert row.lower_quartile <= row.milliseconds <= row.upper_quartile
        assert row.percent_of_bound == pytest.approx(row.bytes / 1e9 / row.milliseconds * 1e5)
        assert row.peak_bytes is None
        assert row.problem is None


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB"), "out of memory"),
        (ValueError("softmax: no\nsecond line"), "ValueError: softmax: no"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_an_implementation_that_fails_is_a_row(problem, text):
    peers = {"broken": lambda: raising(problem), "fine": lambda: lambda x: 2 * x}
    rows = list(compare.measure("softmax", doubling(peers=peers), SETTINGS))
    assert [row.problem for row in rows if row.implementation == "broken"] == [text] * 3
    assert all(row.milliseconds for row in rows if row.implementation != "broken")
    assert len(rows) == 12


def test_inputs_that_do_not_fit_are_rows():
    operation = replace(doubling(), inputs=raising(torch.OutOfMemoryError()))
    rows = list(compare.measure("softmax", operation, SETTINGS))
    assert [row.problem for row in rows] == ["out of memory"] * 6


def test_a_kernel_that_cannot_be_imported_is_a_row():
    def load():
        raise ModuleNotFoundError("No module named 'kernels.nonsense'")

    rows = list(
        compare.measure("softmax", replace(doubling(), tritium={"Tritium": load}), SETTINGS)
    )
    assert rows[0].problem == "ModuleNotFoundError: No module named 'kernels.nonsense'"
    assert rows[3].milliseconds


def test_a_peer_that_is_not_installed_is_a_note():
    peers = {"absent": lambda: __import__("no_such_library")}
    operation = doubling(peers=peers, gradient_in_forward=("eager", "absent"))
    done = report_of(operation, tuple(compare.measure("softmax", operation, SETTINGS)))
    assert {row.implementation for row in done.rows} == {"Tritium", "eager"}
    assert "Not installed: absent." in done.notes
    assert [row.pass_name for row in done.rows if row.implementation == "eager"] == [
        "forward",
        "both",
    ]
    assert "No backward alone for eager: its forward pass makes the gradient." in done.notes
    assert not any("for absent" in note for note in done.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_called_as_it_wants(name, dtype):
    operation = replace(OPERATIONS[name], peers={})
    rows = list(compare.measure(name, operation, replace(SETTINGS, dtype=dtype)))
    assert {row.implementation for row in rows} == {*operation.tritium, "eager"}
    assert {row.pass_name for row in rows} == set(harness.PASSES)
    for row in rows:
        assert row.problem is None, row.problem
        if row.implementation in operation.tritium:
            assert row.error is not None
            # One rounding in bfloat16; in float32 also those of the sums. A divergence is of two
            # rounded rows of logits, whose errors add up as squares do.
            roundings = math.sqrt(2) if name == "linear_kl_div" else 1.0
            assert row.error < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype] * roundings, row


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_are_complete_and_their_sizes_tell_them_apart(name):
    operation = OPERATIONS[name]
    for device in (CPU, torch.device("cuda")):
        cases = operation.cases(device, (), quick=False)
        assert all(dims.keys() == operation.smallest.keys() for dims in cases.values())
        sizes = [dims[operation.axis] for dims in cases.values()]
        assert sorted(set(sizes)) == sizes
    (case,) = operation.cases(CPU, (96,), quick=False).values()
    assert case[operation.axis] == 96
    assert case.keys() == operation.smallest.keys()


@pytest.mark.parametrize(
    ("reference", "interpreter", "words"),
    [(True, True, "reference"), (False, True, "interpreter"), (False, False, "reference")],
)
def test_says_what_tritium_is_on_a_cpu(reference, interpreter, words, monkeypatch):
    monkeypatch.setattr(runtime, "REFERENCE", reference)
    monkeypatch.setattr(runtime, "CPU_KERNELS", interpreter)
    (note,) = (note for note in report_of(doubling(), ()).notes if note.startswith("Tritium"))
    assert words in note
