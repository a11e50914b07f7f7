"""Prove that Ctrl-C ends with one line at most, which names nothing that would be refused."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tritium.bench.ends import ended
from tritium.training.command_line import next_command

ROOT = Path(__file__).parents[2]

# Ctrl-C where train.py imports torch.
IMPORTS = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored, in the background
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_while_it_is_imported_it_ends_without_a_word():
    ended = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGINT  # which a shell shows as 130
    assert ended.stderr == ended.stdout == b""


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


def test_a_verb_of_the_bench_ends_with_130(capsys):
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit, ended("bench step"):
        raise KeyboardInterrupt
    assert exit.value.args == (130,)
    assert capsys.readouterr() == ("", "")
