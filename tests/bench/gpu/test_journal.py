"""Prove that the journal of a session keeps each entry, and survives being cut at any byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench.gpu.journal import Journal

ENTRIES = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.integers() | st.text() | st.none()), max_size=4
)


@given(ENTRIES, st.data())
def test_a_cut_costs_the_last_entry_alone(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("journal") / "rows.jsonl"
    journal, ends = Journal(path), [0]
    for entry in entries:
        journal.append(kind="row", **entry)
        ends.append(path.stat().st_size)
    content = path.read_bytes() if entries else b""
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = sum(end <= cut for end in ends[1:])
    after = Journal(path)
    assert after.entries == [{"kind": "row", **entry} for entry in entries[:whole]]
    after.append(kind="more")  # behind a whole line, not behind the rest of one
    assert Journal(path).entries == [*after.entries]
    assert len(Journal(path).of("more")) == 1


@pytest.mark.parametrize("line", [b"null\n", b"{\n", b"\xff\n", b"3\n"])
def test_a_line_that_is_no_entry_ends_it(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"kind": "a"}\n' + line + b'{"kind": "b"}\n')
    assert Journal(path).entries == [{"kind": "a"}]
    assert path.read_bytes() == b'{"kind": "a"}\n'


def test_numbers_that_are_not_finite_are_null(tmp_path):
    Journal(tmp_path / "rows.jsonl").append(kind="row", error=float("nan"))
    assert Journal(tmp_path / "rows.jsonl").entries == [{"kind": "row", "error": None}]
