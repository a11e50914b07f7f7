"""Prove that a launch without Triton's choice is of the kernel that Triton would have chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritium.kernels import runtime
from tritium.kernels.runtime import Launcher

ROOT = Path(__file__).parents[3]


def test_launches_what_triton_would_choose():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.optimizers.launches"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, kernels = map(int, done.stdout.split())
    assert kept > 20
    assert kernels > 10


class Chosen:
    """A kernel that records how it is launched, by Triton's choice or without."""

    def __init__(self, by: str, log: list):
        self.by, self.log = by, log

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.log.append((self.by, grid, args, options))
            return Chosen("kept", self.log)

        return launch


X = torch.empty(64)


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((X[1:], None, 16, 0.5), (8, True)),
        ((X[1:5], X, 16, 0.5), (8, True)),
        ((X, None, 17, 0.5), (8, True)),
        ((X, None, 16, 0.25), (8, True)),
        ((X, None, 16, 0.5), (16, True)),
        ((X, None, 16, 0.5), (8, False)),
    ],
)
def test_asks_triton_again_when_an_argument_differs(args, constants, monkeypatch):
    monkeypatch.setattr(runtime, "_device", lambda: 0)
    log = []
    launch = Launcher(Chosen("triton", log))
    first = (X, None, 16, 0.5), (8, True)
    launch(2, *first, num_warps=4)
    launch(3, *first, num_warps=4)
    launch(3, args, constants, num_warps=4)
    launch(3, *first, num_warps=4)
    assert [by for by, *_ in log] == ["triton", "kept", "triton", "triton"]
    assert log[0][1:] == ((2,), (*first[0], *first[1]), {"num_warps": 4})
    assert log[1][1:] == ((3, 1, 1), (*first[0], *first[1]), {})


def test_asks_triton_again_on_another_device(monkeypatch):
    log, device = [], [0]
    monkeypatch.setattr(runtime, "_device", lambda: device[0])
    launch = Launcher(Chosen("triton", log))
    for device[0] in (0, 0, 1, 1, 0):
        launch(1, (X,), ())
    assert [by for by, *_ in log] == ["triton", "kept", "triton", "kept", "triton"]
