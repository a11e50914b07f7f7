"""Launches and host time are those of one call, on a GPU and without one."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tritium.bench import host_cost
from tritium.kernels import runtime

ROOT = Path(__file__).parents[2]


def test_counts_what_the_device_is_asked_for():
    names = [
        "cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaMemcpyAsync",
        "cudaMemsetAsync", "cudaGraphLaunch", "cudaLaunchCooperativeKernel", "aten::add",
        "cudaStreamSynchronize", "cudaDeviceSynchronize", "Optimizer.step#AdamW.step",
        "_adamw_update_kernel",
    ]  # fmt: skip
    assert host_cost.count_launches(names) == 7


def test_the_cost_of_a_gpu_call_is_counted_after_its_first(monkeypatch):
    log = []

    class Profile:
        """A profiler whose events are what was logged since it began."""

        def __init__(self, activities):
            assert torch.profiler.ProfilerActivity.CUDA in activities

        def __enter__(self):
            log.clear()
            return self

        def __exit__(self, *_):
            self.seen = list(log)

        def events(self):
            return [SimpleNamespace(name=name) for name in self.seen]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("cudaDeviceSynchronize"))
    launches = itertools.chain([9], itertools.repeat(2))
    cost = host_cost.of_gpu_call(lambda: log.extend(["cuLaunchKernelEx"] * next(launches)))
    assert cost.launches == 2
    assert cost.microseconds > 0


def test_host_time_is_of_single_calls_while_nothing_disturbs(monkeypatch):
    now, log = [0.0], []

    def call() -> None:
        disturbed = len(log) < 2 * host_cost.CALLS
        now[0] += 5e-6 if disturbed else 2e-6
        log.append("call")

    def wait() -> None:
        now[0] += 1.0
        log.append("wait")

    monkeypatch.setattr(host_cost.time, "perf_counter", lambda: now[0])
    assert host_cost._microseconds(call, wait) == pytest.approx(2)
    assert log == ["wait", "call"] * host_cost.CALLS * host_cost.ROUNDS + ["wait"]


def test_definitions_have_no_launches(monkeypatch):
    monkeypatch.setattr(runtime, "REFERENCE", True)
    assert host_cost.of_unexecuted_call(lambda: pytest.fail("called")) is None


def test_counts_launches_of_kernels_on_a_cpu():
    """A few for the model as it is, more for a norm, and three in all: none counted twice."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = ["tritium.bench", "optimizer", "--quick", "--tasks", "AdamW float32"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"Tritium +(.* float32) {2,}.* (\d+) +([\d.]+) us", done.stdout)
    assert all(float(us) > 0 for *_, us in lines)
    launches = {name.strip(): int(n) for name, n, _ in lines}
    assert 1 <= launches["AdamW float32"] < launches["clip + AdamW float32"] <= 3
