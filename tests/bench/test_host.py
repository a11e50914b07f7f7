"""Prove that the table of host times measures every operation, Tritium's on the stub driver."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritium.bench import host
from tritium.bench.operations import OPERATIONS

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tritium.bench", "host", *arguments], cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""} | variables, capture_output=True, text=True,
    )  # fmt: skip


def test_measures_what_is_named():
    done = run("swiglu", "embedding", "--rounds", "1", "--calls", "2")
    assert done.returncode == 0, done.stderr
    for name in ("swiglu", "embedding"):
        figures = re.search(rf"^ *{name} +([\d.]+) +([\d.]+)", done.stdout, re.MULTILINE)
        assert figures is not None, done.stdout
        assert all(float(x) > 0 for x in figures.groups())
    assert "rms_norm" not in done.stdout


def test_refuses_the_interpreter_and_unknown_names():
    refused = run("swiglu", TRITON_INTERPRET="1")
    assert refused.returncode != 0
    assert "unset TRITON_INTERPRET" in refused.stderr
    unknown = run("nonsense")
    assert unknown.returncode != 0
    assert "nonsense" in unknown.stderr


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op not in host.LEFT_OUT])
def test_every_operation_has_a_tiny_shape(op):
    assert set(OPERATIONS[op].smallest) <= set(host.TINY)


@pytest.mark.parametrize(
    ("tritium", "pytorch", "liger", "verdict"),
    [
        (40.0, 40.0, 40.0, "at or below all"),
        (40.1, 41.0, None, "above 40 us"),
        (30.0, 20.0, 25.0, "above PyTorch, Liger"),
        (50.0, 20.0, 60.0, "above 40 us, PyTorch"),
    ],
)
def test_says_what_it_exceeds(tritium, pytorch, liger, verdict):
    assert host.Row("op", tritium, pytorch, liger).verdict == verdict
