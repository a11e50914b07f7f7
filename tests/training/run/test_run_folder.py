"""Prove that a run folder serves one process at a time, and that its log stays whole."""

import errno
import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from math import inf, isfinite, nan

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritium.training.run.run_folder import RunFolderError, RunLog, lock_folder, read_lines

HOLD = """
import sys
from pathlib import Path
from tritium.training.run.run_folder import lock_folder
with lock_folder(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_keeps_a_second_process_out_until_the_first_is_killed(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for resume in (False, True):
        with (
            pytest.raises(RunFolderError, match=f"in use by process {holder.pid} on"),
            lock_folder(run, resume=resume),
        ):
            pass
    assert run.exists()
    holder.kill()
    holder.communicate()
    with lock_folder(run, resume=True):
        pass


def test_refuses_another_run(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(RunFolderError, match="is not empty; pass --resume"):
        lock_folder(tmp_path, resume=False).__enter__()
    with pytest.raises(RunFolderError, match="is a file"):
        lock_folder(tmp_path / "log.jsonl", resume=False).__enter__()
    with lock_folder(tmp_path, resume=True) as run:
        assert run == tmp_path


def test_leaves_no_folder_where_nothing_was_made(tmp_path):
    with (
        pytest.raises(ValueError, match="wrong"),
        lock_folder(tmp_path / "a" / "run", resume=False),
    ):
        raise ValueError("wrong")
    assert not (tmp_path / "a" / "run").exists()
    with suppress(ValueError), lock_folder(tmp_path / "b", resume=False) as run:
        (run / "config.json").write_text("")
        raise ValueError("wrong")
    assert (tmp_path / "b" / "config.json").exists()


@pytest.mark.parametrize("call", ["mkdir", "open", "write"])
def test_says_at_once_that_it_cannot_write(call, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RunFolderError, match=r"cannot be written \(Read-only file system\)"):
        lock_folder(tmp_path / "run", resume=False).__enter__()


def entries(*steps):
    return [{"step": step, "loss": step / 3} for step in steps]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(entry) for entry in entries(1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')  # killed while it wrote
    log = RunLog(path, 3, pytest.fail)
    assert log.entries == read(path) == entries(1, 2, 3)
    log.append(entries(4, 5))
    log.sync()
    assert log.entries == read(path) == entries(1, 2, 3, 4, 5)


@given(st.binary(max_size=20))
@example(b"\xdf\xff\x80\x01")
@example(b"\0" * 16)
@example(b"12")
@example(b"null")
def test_no_bytes_behind_the_last_whole_line_cost_a_line(tmp_path_factory, rest):
    """As a loss of power may leave them, in each file of a run; nothing behind them is read."""
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    for name in (path, path.with_name("abandoned-log.jsonl")):
        lines = (json.dumps(x | {"abandoned": 1}) for x in entries(1, 2))
        name.write_bytes(
            "".join(f"{line}\n" for line in lines).encode() + rest + b'\n{"step": 1}\n'
        )
    log = RunLog(path, 2, pytest.fail, 1)
    assert [x["step"] for x in log.entries] == [x["step"] for x in read(path)] == [1, 2]
    assert read(path.with_name("abandoned-log.jsonl")) == read(path)


def test_what_is_done_again_moves_to_another_file(tmp_path):
    path, abandoned = tmp_path / "log.jsonl", tmp_path / "abandoned-log.jsonl"
    log = RunLog(path, 0, pytest.fail)
    log.append(entries(1, 2, 3, 4))
    log.rewind(2, 1)
    log.append(entries(3, 4, 5))
    log.rewind(4, 2)
    log.append(entries(5))
    assert log.entries == read(path) == entries(1, 2, 3, 4, 5)
    given_up = [(3, 1), (4, 1), (5, 2)]
    assert [(x["step"], x["abandoned"]) for x in read(abandoned)] == given_up
    # Killed, and resumed from a checkpoint that knows of one time only.
    log = RunLog(path, 4, pytest.fail, 1)
    assert log.entries == read(path) == entries(1, 2, 3, 4)
    assert [(x["step"], x["abandoned"]) for x in read(abandoned)] == given_up[:2]


class FullDisk(io.FileIO):
    """Takes half of what it is given, then nothing, until there is room."""

    room = False
    calls = 0

    def write(self, data):
        if FullDisk.room:
            return super().write(data)
        FullDisk.calls += 1
        if FullDisk.calls % 2:
            return super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_no_line(tmp_path, monkeypatch):
    told = []
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0, told.append)
    log.append(entries(1))
    monkeypatch.setattr("pathlib.Path.open", lambda self, *_, **__: FullDisk(self, "r+"))
    for step in (2, 3):
        log.append(entries(step))
        assert read(path) == entries(1)
    assert len(told) == 2
    assert "No space left on device" in told[0]
    FullDisk.room = True
    log.append(entries(4))
    assert read(path) == log.entries == entries(1, 2, 3, 4)


@settings(max_examples=60)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["loss", "lr", "grad_norm"]),
            st.floats() | st.integers() | st.lists(st.floats(), max_size=3),
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@example([{"loss": nan, "lr": -inf, "grad_norm": [nan, inf, 1.0]}])
def test_a_log_is_json_whatever_the_numbers_are(tmp_path_factory, numbers):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    written = [{"step": i, **entry} for i, entry in enumerate(numbers)]
    RunLog(path, 0, print).append(written)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)

    def shown(x):
        if isinstance(x, list):
            return [shown(y) for y in x]
        return x if isinstance(x, int) or isfinite(x) else "nan"

    expected = [{name: shown(x) for name, x in entry.items()} for entry in written]
    found = [{name: shown(x) for name, x in entry.items()} for entry in read_lines(path)]
    assert found == expected
    again = RunLog(path, len(numbers), print)  # written anew, as a resumed run does
    assert [{name: shown(x) for name, x in entry.items()} for entry in again.entries] == expected
