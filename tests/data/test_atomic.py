"""A file is replaced whole or stays as it was, whatever fails, and no draft is left behind."""

import os

import pytest

from tritium.data import atomic


@pytest.mark.parametrize("content", [b"\x00\xff", "é\r\n", ""])
@pytest.mark.parametrize("name", ["a.bin", "b", ".c", "x" * 255, "d [1]\n.json"])
def test_writes(tmp_path, content, name):
    for _ in range(2):
        atomic.write(tmp_path / name, content)
        expected = content.encode() if isinstance(content, str) else content
        assert (tmp_path / name).read_bytes() == expected
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("fails", ["block", "fsync", "replace"])
def test_after_an_error_all_is_as_before(tmp_path, monkeypatch, error, fails):
    def fail(*args):
        raise error

    file = tmp_path / "a.png"
    file.write_text("old")
    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif fails == "replace":
        monkeypatch.setattr("pathlib.Path.replace", fail)

    def rewrite():
        with atomic.replacing(file) as draft:
            assert draft.suffix == ".png"
            draft.write_text("half")
            assert file.read_text() == "old"
            if fails == "block":
                raise error

    with pytest.raises(error):
        rewrite()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_two_at_once_do_not_meet(tmp_path):
    with atomic.replacing(tmp_path / "a") as one, atomic.replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"


def test_the_disk_has_it_before_the_name_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(atomic, "sync", lambda path: seen.append((path.name, path.exists())))
    atomic.write(tmp_path / "a", b"x")
    draft, folder = seen
    assert draft[0].endswith(".tmp")
    assert draft[1]
    assert folder == (tmp_path.name, True)
