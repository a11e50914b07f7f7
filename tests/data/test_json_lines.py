"""Prove that what a kill or a loss of power leaves in a file of lines costs no whole line.

Neither one before it nor one that is appended later.
"""

import json
import os
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tritium.data.json_lines import append, opened, read

ENTRIES = st.lists(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text() | st.none()), max_size=4
)


@pytest.fixture(autouse=True, scope="module")
def synced():
    """The calls that wait for the disk, which wait for nothing here."""
    with mock.patch.object(os, "fsync") as calls:
        yield calls


def test_the_disk_has_a_line_before_the_next(tmp_path, synced):
    path, lengths = tmp_path / "file.jsonl", []
    synced.side_effect = lambda number: lengths.append(os.fstat(number).st_size)
    for step in (1, 2):
        append(path, {"step": step})
    assert lengths == [12, 24]
    synced.side_effect = None


@given(ENTRIES, st.data())
def test_a_cut_at_any_byte_costs_the_last_entry_alone(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    assert opened(path) == read(path) == []
    ends = []
    for entry in entries:
        append(path, entry)
        ends.append(path.stat().st_size)
    content = path.read_bytes() if entries else b""
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    whole = sum(end <= path.stat().st_size for end in ends)
    assert opened(path) == entries[:whole]
    append(path, {"more": 1})
    append(path, {"more": 2})
    assert opened(path) == read(path) == [*entries[:whole], {"more": 1}, {"more": 2}]


@given(st.binary(max_size=20))
@example(b'{"step": 3, "lo')
@example(b'{"step": 3}')
@example(b"\xdf\xff\x80\x01")
@example(b"\0" * 16)
@example(b"\r{}")
@example(b"null")
@example("{}".encode("utf-16-le") + b"\n")
@example(b"12\n")
@example(b"\n")
def test_no_bytes_behind_the_last_whole_line_cost_a_line(tmp_path_factory, rest):
    path = tmp_path_factory.mktemp("lines") / "file.jsonl"
    append(path, {"step": 1})
    append(path, {"step": 2, "text": "a\r\nb\u2028é"})
    before, content = read(path), path.read_bytes()
    path.write_bytes(content + rest)
    assert read(path) == before
    assert path.read_bytes() == content + rest  # reading changes nothing
    assert opened(path) == before
    assert path.read_bytes() == content
    append(path, {"step": 3})
    assert read(path) == [*before, {"step": 3}]


@pytest.mark.parametrize("line", [b"null\n", b"{\n", b"\xff\n", b"3\n", b"\n", b"\0\0\n"])
def test_nothing_behind_a_broken_line_is_read(tmp_path, line):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"kind": "a"}\n' + line + b'{"kind": "b"}\n')
    assert read(path) == opened(path) == [{"kind": "a"}]
    assert path.read_bytes() == b'{"kind": "a"}\n'


def test_reads_from_a_line_on(tmp_path):
    path = tmp_path / "file.jsonl"
    append(path, {"step": 1})
    start = path.stat().st_size
    append(path, {"step": 2})
    assert read(path, start) == [{"step": 2}]
    assert read(path, path.stat().st_size) == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "file.jsonl"
    append(path, {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.0]}


def test_lines_behind_a_broken_one_are_kept_beside(tmp_path, synced):
    path, beside = tmp_path / "file.jsonl", tmp_path / "file.jsonl.broken"
    path.write_bytes(b'{"step": 1}\n{"st')
    assert opened(path) == [{"step": 1}]
    assert not beside.exists()  # a kill leaves as much
    for behind in (b'{"st{"step": 2}\n{"step": 3}\n', b"\0\0\n"):
        before = beside.read_bytes() if beside.exists() else b""
        path.write_bytes(path.read_bytes() + behind)
        calls = synced.call_count
        assert opened(path) == [{"step": 1}]
        assert path.read_bytes() == b'{"step": 1}\n'
        assert beside.read_bytes() == before + behind
        assert synced.call_count == calls + 1
