"""Prove what trackers are given, and that one that fails does not end a run."""

import sys
from math import inf, nan
from types import ModuleType, SimpleNamespace

import pytest

from tritium.training.monitor import trackers

ENTRY = {"step": 3, "loss": 2.5, "grad_norm": nan, "tokens_per_s": 100, "note": "text"}
READING = {"step": 4, "layers": {"embedding": [0.5, 0.02, 4.0], "norm": [inf, 0.0, 0.0]}}
SCALARS = [
    (3, {"loss": 2.5, "tokens_per_s": 100.0}),
    (4, {"gradient norm/embedding": 0.5, "update ratio/embedding": 0.005}),
]


@pytest.fixture
def tensorboard(monkeypatch):
    """A SummaryWriter that notes what it is asked."""
    asked = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            asked.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            asked.append((step, name, value))

        def close(self):
            asked.append("close")

    module = ModuleType("torch.utils.tensorboard")
    vars(module)["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return asked


class WandB(ModuleType):
    """A module `wandb` that notes what it is asked."""

    def __init__(self):
        super().__init__("wandb")
        self.asked = []

    def init(self, **options):
        self.asked.append(options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=self.asked.append,
            finish=lambda: self.asked.append("finish"),
        )


def follow(names, run, step=2):
    told = []
    followed = trackers.Trackers(names, run, {"preset": "tiny"}, step, told.append)
    for entry in (ENTRY, READING):
        followed.log(entry)
    followed.close()
    return told


def test_tensorboard_gets_every_finite_number(tensorboard, tmp_path):
    assert follow(("tensorboard",), tmp_path) == []
    flat = [(step, name, x) for step, scalars in SCALARS for name, x in scalars.items()]
    assert tensorboard == [("open", str(tmp_path / "tensorboard"), 3), *flat, "close"]


def test_wandb_goes_on_with_its_run(monkeypatch, tmp_path):
    stub = WandB()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = tmp_path / "run-7"
    run.mkdir()
    assert follow(("wandb",), run, step=0) == []
    options, *logged = stub.asked
    assert options == {
        "project": "tritium", "id": (run / "wandb-id").read_text(), "resume": "allow",
        "name": "run-7", "dir": str(run), "config": {"preset": "tiny"},
    }  # fmt: skip
    assert logged == [*({"step": step, **scalars} for step, scalars in SCALARS), "finish"]
    follow(("wandb",), run, step=2)
    follow(("wandb",), run, step=0)  # begun again from the start: another run
    first, again, anew = (x["id"] for x in stub.asked if "id" in x)
    assert first == again != anew


def test_a_tracker_that_fails_is_left_out(tensorboard, monkeypatch, tmp_path):
    stub = WandB()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(stub, "init", lambda **_: 1 / 0)
    told = follow(("wandb", "tensorboard"), tmp_path)
    assert told == ["wandb failed (division by zero); the run continues without it."]
    assert tensorboard[-1] == "close"
    writer = vars(sys.modules["torch.utils.tensorboard"])["SummaryWriter"]
    monkeypatch.setattr(writer, "add_scalar", lambda *_: 1 / 0)
    told = follow(("tensorboard",), tmp_path)
    assert told == ["tensorboard failed (division by zero); the run continues without it."]


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    trackers.require(())
    for name in trackers.TRACKERS:
        with pytest.raises(ValueError, match=f"--track {name} needs .* run: pip install {name}"):
            trackers.require((name,))
