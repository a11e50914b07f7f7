"""Prove that the journal of a session keeps each entry, and begins behind the last whole one."""

from tritium.bench.gpu.journal import Journal


def test_an_entry_is_kept_and_what_a_kill_cut_short_is_not(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    first = Journal(path)
    first.append(kind="row", error=float("nan"))
    first.append(kind="other", shape=(1, 2))
    entries = [{"kind": "row", "error": None}, {"kind": "other", "shape": [1, 2]}]
    assert first.entries == entries
    path.write_bytes(path.read_bytes() + b'{"kind": "r')
    again = Journal(path)
    assert again.entries == entries
    again.append(kind="row")  # behind a whole line, not behind the rest of one
    assert Journal(path).entries == again.entries == [*entries, {"kind": "row"}]
    assert again.of("row") == [entries[0], {"kind": "row"}]


def test_one_of_several_that_append_reads_and_removes_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"kind": "r')  # another process is writing it
    one = Journal(path, keep=False)
    assert one.entries == []
    assert path.read_bytes() == b'{"kind": "r'
    path.write_bytes(b"")
    one.append(kind="a")
    Journal(path, keep=False).append(kind="b")
    assert one.entries == []
    assert Journal(path).entries == [{"kind": "a"}, {"kind": "b"}]
