"""Prove that Ctrl-C ends with one line at most, which names nothing that would be refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
import tritium
from tritium.bench.ends import ended
from tritium.training.command_line import next_command

ROOT = Path(__file__).parents[2]
ROOMS = "kernels", "model", "data", "training", "bench"
SCRIPTS = [
    file
    for room in ROOMS
    for file in sorted((ROOT / room).rglob("*.py"))
    if '\nif __name__ == "__main__":' in file.read_text()
]
"""Every file that is a program, except train.py."""

# Python runs it at its start: Ctrl-C comes where torch is imported.
AT_TORCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored, in the background
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
"""

# A program of somebody else, who has a train.py too.
PROGRAM = """
import signal, tritium
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
import tritium.kernels
"""


def interrupt(*_, **__):
    raise KeyboardInterrupt


def at_torch(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python with Ctrl-C where it imports torch."""
    (folder / "sitecustomize.py").write_text(AT_TORCH)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip


def module(file: Path) -> str:
    """Return the name behind `-m` of a file."""
    name = ".".join(["tritium", *file.relative_to(ROOT).with_suffix("").parts])
    return name.removesuffix(".__main__")


@pytest.mark.parametrize("file", [ROOT / "train.py", *SCRIPTS], ids=lambda x: x.stem)
def test_while_it_is_imported_it_ends_without_a_word(file, tmp_path):
    words = [str(file)] if file.parent == ROOT else ["-m", module(file), "softmax"]
    ended = at_torch(tmp_path, *words)
    assert ended.returncode == -signal.SIGINT  # which a shell shows as 130
    assert ended.stderr == ended.stdout == ""


@pytest.mark.parametrize("words", [("train.py",), ("-m", "mine.tool"), ("-c", PROGRAM)])
def test_ctrl_c_in_the_program_of_somebody_else_stays_theirs(words, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("train.py", "mine/__init__.py"):
        (tmp_path / name).write_text(PROGRAM)
    ended = at_torch(tmp_path, *words)
    assert ended.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("file", [ROOT / "train.py", *SCRIPTS], ids=lambda x: x.stem)
def test_every_command_can_be_interrupted_after_its_imports(file):
    """Else Ctrl-C would kill it there without cleaning up."""
    assert ("with tritium.interruptible(" in file.read_text()) or file.parent.name == "bench"


@pytest.mark.parametrize("block", [tritium.interruptible, lambda: ended("bench step")])
def test_a_command_cleans_up_and_ends_with_130(block, capsys):
    """Whether its imports could be interrupted, or Ctrl-C was another's before."""
    cleaned = []

    def work():
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL  # which ended the tests
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            cleaned.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    for handler in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        try:
            with pytest.raises(SystemExit) as exit, block():
                work()
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
        assert exit.value.code == 130
    assert cleaned == [signal.default_int_handler] * 2
    assert capsys.readouterr() == ("", "")


def test_a_command_in_the_background_ignores_ctrl_c_as_before(capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with tritium.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(SystemExit), tritium.interruptible("a line"):
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "a line\n")


@pytest.mark.parametrize("at", ["prepare", "print_start"])
def test_before_the_first_step_it_names_what_can_be_done(at, run, tmp_path, monkeypatch):
    """A run is resumed by its folder only if its settings are there."""
    folder, more = tmp_path / "run", ("--max-steps", "2")
    with monkeypatch.context() as patched:
        patched.setattr(train, at, interrupt)
        assert run(folder, *more) == 130
    said = run.output().strip().splitlines()[-1]
    if at == "prepare":
        assert said == "train.py: stopped; to resume: the same command again (it had made no step)"
        assert not folder.exists()
        assert run(folder, *more) == 0
    else:
        assert said.endswith(f" --resume {folder}")
        assert run(folder, *more, "--resume") == 0


def test_no_run_is_named_where_there_is_none(tmp_path, monkeypatch):
    """Nor a config.json of something else in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "--resume" not in next_command(None)
    assert "--resume" not in next_command(tmp_path / "run")
    assert next_command(tmp_path).endswith(f" --resume {tmp_path}")
