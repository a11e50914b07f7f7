"""Prove that every process collects the same tests under the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared_gpu import processes_on_a_gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_names_do_not_depend_on_the_process():
    # A set among the parameters, or an address in an id: the processes of pytest-xdist disagree.
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    processes = [
        subprocess.Popen(
            [*command, "tests/kernels", "tests/model"], cwd=ROOT, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed}, text=True,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = ([*process.communicate()[0].splitlines()][:-1] for process in processes)
    assert len(first) > 1000
    assert first == second


@pytest.mark.parametrize(
    ("cores", "memory", "processes"),
    [(16, 80 << 30, 16), (64, 80 << 30, 16), (4, 80 << 30, 4), (16, 24 << 30, 4), (2, 2 << 30, 1)],
)
def test_a_gpu_is_shared_by_as_many_as_its_memory_holds(cores, memory, processes):
    assert processes_on_a_gpu(cores, memory) == processes


def test_there_is_one_cache_of_compiled_kernels():
    assert os.environ["TRITON_CACHE_DIR"]
