"""Prove that a session's tests are named on the disk as they end, sampled and continued."""

import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench.gpu import pytest_results, suite
from tritium.bench.gpu.suite import Suite

TESTS = """
import os, signal, time
import pytest

@pytest.mark.parametrize("x", [1, 2, 3])
def test_passes(x):
    pass

def test_fails():
    assert 1 == 2, "one is not two"

def test_skips():
    pytest.skip("no reason")

@pytest.fixture
def broken():
    raise ValueError("a fixture")

def test_error(broken):
    pass

def test_last():
    if os.path.exists("hang"):
        time.sleep(60)
"""

UNUSABLE = """
import sys, types, os

def synchronize():
    if os.path.exists("broken"):
        os.remove("broken")
        raise RuntimeError("device-side assert")

def pytest_runtest_logreport(report):
    if report.nodeid.endswith("test_fails") and report.when == "call":
        open("broken", "w").close()
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "test_some.py").write_text(textwrap.dedent(TESTS))
    (root / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "out").mkdir()
    return root


def run(tree: Path, until: float = 120.0) -> tuple[dict[str, dict], str]:
    made = Suite(tree.parent / "out", 2, cuda=False, tests=("test_some.py",), root=tree)
    assert not made.missing
    made.start()
    deadline = time.monotonic() + until
    while made.running and time.monotonic() < deadline:
        time.sleep(0.05)
    how = made.end()
    return suite.results(tree.parent / "out"), how


def outcomes(found: dict[str, dict]) -> dict[str, str]:
    return {name.partition("::")[2]: entry["outcome"] for name, entry in found.items()}


def test_each_result_is_named_with_its_reason(tree):
    found, how = run(tree)
    assert how == "complete"
    assert outcomes(found) == {
        "test_passes[1]": "passed", "test_passes[2]": "passed", "test_passes[3]": "passed",
        "test_fails": "failed", "test_skips": "skipped", "test_error": "failed",
        "test_last": "passed",
    }  # fmt: skip
    assert "one is not two" in found["test_some.py::test_fails"]["reason"]
    assert "a fixture" in found["test_some.py::test_error"]["reason"]
    assert "no reason" in found["test_some.py::test_skips"]["reason"]


def test_results_of_a_run_that_is_cut_are_there_and_the_next_takes_the_rest(tree):
    (tree / "hang").touch()
    log = tree.parent / "out" / suite.RESULTS
    made = Suite(tree.parent / "out", 2, cuda=False, tests=("test_some.py",), root=tree)
    made.start()
    deadline = time.monotonic() + 120
    try:
        while "test_some.py::test_fails" not in suite.results(tree.parent / "out"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        how = made.end()
    assert how == "cut"
    first = suite.results(tree.parent / "out")
    assert made.left == 7 - len(first)
    assert "test_last" not in outcomes(first)
    assert outcomes(first)["test_fails"] == "failed"
    (tree / "hang").unlink()
    text = log.read_text()
    with log.open("a") as file:
        file.write('{"test": "a line that a kill cut sh')
    found, how = run(tree)
    assert how == "complete"
    assert len(found) == 7
    entries = map(json.loads, log.read_text()[len(text) :].splitlines())
    added = [entry["test"] for entry in entries if "seconds" in entry]
    assert sorted(added) == sorted({*found} - {*first})


def test_a_process_that_dies_is_a_failed_test_and_the_others_run(tree):
    source = (tree / "test_some.py").read_text()
    dies = source.replace('pytest.skip("no reason")', f"os.kill(os.getpid(), {signal.SIGSEGV:d})")
    (tree / "test_some.py").write_text(dies)
    found, _ = run(tree)
    assert outcomes(found)["test_skips"] == "failed"
    assert "crashed" in found["test_some.py::test_skips"]["reason"]
    assert len(found) == 7


def test_a_process_that_cannot_use_its_gpu_is_replaced(tree):
    """The outcome of its last test counts; the rest of its files runs in another process."""
    (tree / "conftest.py").write_text(UNUSABLE)
    found, how = run(tree)
    assert how == "complete"
    assert "one is not two" in found["test_some.py::test_fails"]["reason"]
    assert len(found) == 7


def test_files_are_divided_by_their_bytes(tmp_path):
    for i, size in enumerate([50, 10, 10, 20, 30]):
        (tmp_path / f"test_{i}.py").write_text("#" * size)
    assert suite.shares(tmp_path, (".",), 2) == [
        ["test_0.py", "test_1.py"], ["test_4.py", "test_3.py", "test_2.py"]
    ]  # fmt: skip
    assert suite.shares(tmp_path, ("test_1.py",), 9) == [["test_1.py"]]


NAMES = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("fgh"), st.integers(0, 5)), unique=True
)


@given(NAMES)
def test_a_cut_order_has_seen_as_much_of_each_file_as_it_could(cases):
    cases.sort(key=lambda case: case[:2])  # pytest collects file by file, function by function
    names = [f"{file}.py::{function}[{x}]" for file, function, x in cases]
    quick = dict.fromkeys(names, 0.5)
    order = pytest_results.sample_order(names, quick)
    assert sorted(order) == sorted(names)
    assert order == pytest_results.sample_order(list(names), quick)
    functions = {name.partition("[")[0] for name in names}
    assert {name.partition("[")[0] for name in order[: len(functions)]} == functions
    files = {name.partition("::")[0] for name in names}
    assert {name.partition("::")[0] for name in order[: len(files)]} == files


@given(NAMES, st.randoms(use_true_random=False))
def test_a_cut_order_has_the_quick_tests_first(cases, random):
    """Seconds count in powers of two, and what the end cut comes last."""
    names = [f"{file}.py::{function}[{x}]" for file, function, x in sorted(cases)]
    seconds = {name: random.choice([0.0, 0.7, 1.5, 1.9, 60.0, math.inf]) for name in names}
    order = pytest_results.sample_order(names, seconds)
    assert sorted(order) == sorted(names)
    about = {0.0: 0, 0.7: 0, 1.5: 1, 1.9: 1, 60.0: 6, math.inf: math.inf}
    steps = [about[seconds[name]] for name in order]
    assert steps == sorted(steps)


def test_what_a_test_took_is_known_of_its_other_cases(tmp_path):
    """The longest case stands for a function; one that the end cut comes last the next time."""
    entries = [
        {"test": "a.py::f[1]", "outcome": "begun"},
        {"test": "a.py::f[1]", "outcome": "passed", "seconds": 0.5},
        {"test": "a.py::f[2]", "outcome": "failed", "seconds": 3.0},
        {"test": "a.py::f[3]", "outcome": "passed", "seconds": 2.0},
        {"test": "a.py::g", "outcome": "begun"},
    ]
    cut = b'{"test": "a.py::h", "outc'  # a line that pytest is writing
    lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
    (tmp_path / suite.RESULTS).write_bytes(b"".join([*lines, cut]))
    assert suite.costs(tmp_path) == {"a.py::f": 3.0, "a.py::g": math.inf}
    assert list(suite.results(tmp_path)) == ["a.py::f[1]", "a.py::f[2]", "a.py::f[3]"]


def test_the_plugin_leaves_triton_to_the_tests():
    # tests/conftest.py chooses between the interpreter and the compiler before Triton is imported.
    program = (
        f"import sys, {suite.PLUGIN}; "
        "sys.exit(', '.join({'torch', 'triton'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=suite.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_says_that_a_wheel_has_no_tests(tmp_path):
    assert "in a checkout" in Suite(tmp_path, 1, cuda=True, root=tmp_path).missing
