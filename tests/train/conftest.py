"""A corpus, and train.py as a process of its own or in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of a few small modules, quick to prepare."""
    folder = tmp_path_factory.mktemp("corpus")
    files = [*sorted(Path(json.__file__).parent.glob("*.py")), Path(os.__file__)]
    for file in files:
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


# Train, then name the kernels that ran.
RECORDER = """
import runpy, sys
from triton.runtime.interpreter import GridExecutor
launched, launch = set(), GridExecutor.__call__
def recording(self, *args, **kwargs):
    launched.add(self.fn.__name__)
    return launch(self, *args, **kwargs)
GridExecutor.__call__ = recording
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
print(*sorted(launched))
"""


@pytest.fixture
def start(corpus, home):
    """Start train.py as a user would: a process of its own, its kernels on the references."""

    def start(*arguments: str, interpret: bool = False, script: str = "") -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITIUM_HOME": str(home)} | (
            {"TRITON_INTERPRET": "1"} if interpret else {}
        )
        code = RECORDER if interpret else script
        program = ["-c", code] if code else ["train.py"]
        return subprocess.Popen(
            [sys.executable, *program, "tiny", *arguments, "--data", str(corpus)], cwd=ROOT,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture
def run(monkeypatch, home, corpus, capsys) -> Run:
    return Run(monkeypatch, home, corpus, capsys)
