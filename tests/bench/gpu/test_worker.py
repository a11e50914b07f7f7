"""Prove that a worker measures each kind of task, and that an order to warm up measures nothing."""

import re
from collections import Counter
from dataclasses import asdict
from functools import partial

import pytest
import torch
from doubling import RATES as A_MACHINE

from tritium.bench import harness
from tritium.bench.gpu import ahead, checks, worker
from tritium.bench.gpu.checks import graph_against_none, sampling
from tritium.bench.gpu.steps import SHAPES, tritium_step
from tritium.bench.gpu.tasks import (
    CHECK,
    OPERATION,
    OPTIMIZER,
    ORDER,
    PROFILE,
    RATES,
    STEP,
    TURNS,
    Task,
    tasks,
)
from tritium.bench.operations import OPERATIONS
from tritium.bench.optimizer_tasks import TASKS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.usefixtures("references")


def order(task: Task, **options) -> dict:
    settings = {"rates": asdict(A_MACHINE), "seconds": 1e-6, "compiled": False}
    return {"task": asdict(task)} | settings | options


def test_measures_each_kind():
    bench = worker.Bench()
    measured = {
        Task(OPERATION, "relu_squared", "smallest", "Tritium", "both"): {"T": 64, "F": 256},
        Task(OPTIMIZER, "norm float32", "smallest", "torch", "step", 2): {"N": 136_832},
        Task(STEP, "training step", "", "PyTorch modules, 4", "step"): {"B": 8, "L": 64},
    }
    for task, dims in measured.items():
        row = bench.answer(order(task))["row"]
        assert row["problem"] is None, row
        assert row["milliseconds"] > 0
        assert row["percent_of_bound"] > 0
        assert row["dims"].items() >= (dims.items() if task.kind != OPTIMIZER else set())
        assert row["error"] is not None or task.kind == STEP


def test_checks_of_graphs_say_what_they_found(monkeypatch):
    steps = partial(graph_against_none, n_steps=5)
    assert re.fullmatch(
        r"5 steps as a CUDA graph and kernel by kernel, both deterministic: losses and gradient "
        r"norms are the same bits\. From .* first step: [\d.]+ s\.",
        steps(SHAPES["cpu"], CPU),
    )
    made = iter([tritium_step(SHAPES["cpu"], CPU, 2, graph=False) for _ in range(2)])
    monkeypatch.setattr(checks, "tritium_step", lambda *_, **__: next(made))  # of other seeds
    assert "gradient norms differ from step 1 on." in steps(SHAPES["cpu"], CPU)
    monkeypatch.setitem(worker.CHECKS, "sampling", partial(sampling, n_tokens=9))
    answer = worker.Bench().answer(order(Task(CHECK, "sampling")))
    assert "9 greedy tokens of one row" in answer["text"]
    assert "The tokens are the same." in answer["text"]


def test_the_inputs_of_a_case_are_kept_until_the_next(monkeypatch):
    bench, made = worker.Bench(), []
    operation = OPERATIONS["softmax"]
    monkeypatch.setitem(
        worker.OPERATIONS, "softmax",
        type(operation)(**{**vars(operation), "inputs": lambda make, **dims: made.append(dims) or
                           operation.inputs(make, **dims)}),
    )  # fmt: skip
    for who in ("Tritium", "eager"):
        for part in ("forward", "both"):
            bench.answer(order(Task(OPERATION, "softmax", "smallest", who, part)))
    assert len(made) == 1
    bench.answer(order(Task(OPERATION, "rope", "smallest", "eager", "forward")))
    bench.answer(order(Task(OPERATION, "softmax", "smallest", "eager", "forward")))
    assert len(made) == 2


def test_rates_are_those_of_the_device(monkeypatch):
    monkeypatch.setattr(harness, "measured_device", lambda device, seconds: A_MACHINE)
    assert worker.Bench().answer(order(Task(RATES), rates=None))["rates"] == asdict(A_MACHINE)


@pytest.mark.parametrize(
    "task",
    [
        Task(OPERATION, "rms_norm", "smallest", "eager", "forward"),
        Task(OPTIMIZER, "AdamW float32", "smallest", "torch foreach", "step"),
    ],
)
def test_warming_up_calls_once_and_times_nothing(task, monkeypatch):
    monkeypatch.setattr(harness, "time_calls", None)
    assert worker.Bench().answer(order(task, warm=True)) == {}


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    task = Task(OPERATION, "softmax", "smallest", "quack", "forward")
    row = worker.Bench().answer(order(task))["row"]
    assert row["problem"].startswith("ModuleNotFoundError")
    warm = worker.Bench().answer(order(task, warm=True))
    assert warm["problem"].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("compiled", [False, True])
def test_everything_has_its_tasks(device, compiled):
    found = list(tasks(device, compiled))
    assert len({task.key for task in found}) == len(found)
    assert {task.name for task in found if task.kind == OPERATION} == {*OPERATIONS} == {*ORDER}
    assert {task.name for task in found if task.kind == OPTIMIZER} == {*TASKS}
    assert any("torch.compile" in task.implementation for task in found) == compiled
    assert any(task.kind == PROFILE for task in found) == (device.type == "cuda")
    turns = Counter(x.each for x in found if x.kind not in (RATES, PROFILE, CHECK))
    assert {*turns.values()} == {TURNS}
    kinds = [task.kind for task in found]
    assert kinds[0] == RATES
    assert kinds.index(STEP) < kinds.index(OPTIMIZER) < kinds.index(OPERATION)


def test_implementations_take_turns():
    case = (OPERATION, "rms_norm", "Llama-3 8B")
    found = [task for task in tasks(CUDA, True) if task.group == case]
    first = [x.implementation for x in found if x.part == "forward" and x.turn == 1]
    second = [x.implementation for x in found if x.part == "forward" and x.turn == 2]
    assert first[0] == "Tritium"
    assert second == first[::-1]
    assert [task.turn for task in found] == sorted(task.turn for task in found)


def test_an_implementation_of_a_case_is_compiled_once():
    found = list(ahead.compilations(tasks(CUDA, True)))
    cases = {(*task.group, task.implementation) for task in found}
    assert len(cases) == len(found)
    wanted = {
        (*x.group, x.implementation)
        for x in tasks(CUDA, True)
        if x.kind not in (RATES, PROFILE, CHECK)
    }
    assert cases == wanted
