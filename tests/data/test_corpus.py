"""Every kind of source gives its documents in a fixed order; every unusable one a clear error."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError
from data.corpus import documents, source_files, source_fingerprint


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_default_is_the_standard_library():
    texts = list(documents())
    assert sum(map(len, texts)) > 5_000_000
    assert sum("class OrderedDict(dict)" in text for text in texts) == 1  # collections/__init__.py


def test_default_leaves_out_tests_and_packages():
    parts = {part for file in source_files(None) for part in file.parts[-4:]}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    assert not any(part.startswith(("config-", "_sysconfigdata")) for part in parts)


def test_folder_is_read_sorted_and_recursively(tmp_path):
    files = {
        "b.txt": b"two",
        "a/z.md": b"one",
        "c.JSONL": jsonl({"text": "three"}, {"text": "four"}),
        "d.py": b"five",
        "e.jsonl": b"",
        "e.parquet": b"",
        "e.txt": b"",
        "f.bin": b"\xff",
        ".hidden/x.txt": b"hidden",
        ".y.txt": b"hidden",
    }
    assert list(documents(write(tmp_path, files))) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "a?.txt", "a::b.txt", "a #é.txt", ".a.txt"])
def test_any_file_name(tmp_path, name):
    file = write(tmp_path / "[x] *", {name: b"hello"}) / name
    assert list(documents(file)) == ["hello"]


CONTENTS = [
    (b"a\r\nb\rc\n", ["a\nb\nc\n"]),
    (b"\xef\xbb\xbfbyte order mark", ["byte order mark"]),
    (b"a\0b", ["a\0b"]),
    (b"<|endoftext|>", ["<|endoftext|>"]),
    ("é\u2028\x85\U0001f600".encode(), ["é\u2028\x85\U0001f600"]),
]


@pytest.mark.parametrize(("content", "expected"), CONTENTS, ids=repr)
@pytest.mark.parametrize("alone", [True, False])
def test_text_arrives_as_it_is(tmp_path, content, expected, alone):
    folder = write(tmp_path, {"a.txt": content})
    assert list(documents(folder / "a.txt" if alone else folder)) == expected


@pytest.mark.parametrize("unit", ["word ", "a line\n", "a paragraph\n\n", "é", "\n x"], ids=repr)
def test_long_file_is_cut_without_loss(tmp_path, unit):
    text = unit * (200_000 // len(unit))
    pieces = list(documents(write(tmp_path, {"a.txt": text.encode()}) / "a.txt"))
    assert "".join(pieces) == text
    assert len(pieces) >= 10
    assert max(map(len, pieces)) <= 20_000


def test_long_file_is_cut_at_blank_lines(text_file):
    pieces = list(documents(text_file))
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert all(1024 <= len(piece) < 1200 for piece in pieces[:-1])


def test_nulls_and_white_space_are_left_out(tmp_path):
    rows = jsonl({"text": "a"}, {"text": None}, {"x": 1}, {"text": " \n"}, {"text": "b"})
    assert list(documents(write(tmp_path, {"a.jsonl": rows}) / "a.jsonl")) == ["a", "b"]


def test_parquet_and_field(tmp_path):
    file = parquet(tmp_path / "a.parquet", body=["a", None, "b"], n=[1, 2, 3])
    assert list(documents(file, field="body")) == ["a", "b"]


BAD_FILES = [
    ("a.txt", b"", "holds no text"),
    ("a.txt", b" \n\t\n", "holds no text"),
    ("a.txt", b"x" * 70_000 + b"\n\xff", r"a\.txt is not UTF-8 at byte 70001"),
    ("a.txt", b"cut \xf0\x9f\x98", r"not UTF-8 at byte 4"),
    ("a.jsonl", jsonl({"text": "a"}) + b'{"text":"\xff"}', r"a\.jsonl is not UTF-8 at byte 23"),
    ("a.jsonl", b"\n\n", "cannot read .*a.jsonl|holds no text"),
    ("a.jsonl", b'{"text": oops}\n', r"cannot read .*a\.jsonl: JSON parse error"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"cannot read .*a\.jsonl"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"cannot read .*a\.jsonl"),
    ("a.jsonl", jsonl({"body": "a", "id": 1}), r"no column 'text' but \['body', 'id'\]"),
    ("a.jsonl", jsonl({"text": 1}), "column 'text' holds int, not text"),
    ("a.jsonl", jsonl({"text": ["a"]}), "column 'text' holds list, not text"),
    ("a.parquet", b"", "holds no text|cannot read"),
    ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet"),
    ("a.json", b"{}", r"a\.json: \.json is none of \.txt"),
    ("a.pdf", b"%PDF", r"a\.pdf: \.pdf is none of \.txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=repr)
def test_unusable_file(tmp_path, name, content, message, capfd, monkeypatch):
    logged = logging.Handler()
    monkeypatch.setattr(logged, "emit", lambda record: pytest.fail(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [logged])
    with pytest.raises(DataError, match=message):
        list(documents(write(tmp_path, {name: content}) / name))
    assert capfd.readouterr() == ("", "")


def test_unusable_file_in_a_folder_is_named(tmp_path):
    write(tmp_path, {"a.txt": b"fine", "b.txt": b"also", "c.txt": b"not \xff"})
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8 at byte 4"):
        list(documents(tmp_path))


def test_missing_source():
    with pytest.raises(DataError, match=r"no file or folder /no/where"):
        list(documents("/no/where"))


def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match=r"holds no file of type \.txt"):
        list(documents(write(tmp_path, {"a.bin": b"x"})))


def test_fingerprint_follows_the_files(tmp_path):
    write(tmp_path, {"a.txt": b"one", "b.bin": b"ignored"})
    first = source_fingerprint(tmp_path)
    write(tmp_path, {"b.bin": b"changed"})
    assert source_fingerprint(tmp_path) == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    second = source_fingerprint(tmp_path)
    write(tmp_path, {"a.txt": b"four"})
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert len({first, second, source_fingerprint(tmp_path)}) == 3


def test_reading_early_out_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    write(tmp_path, {"scratch/keep": b"", "a.txt": b"one", "b.txt": b"two"})
    texts = documents(tmp_path)
    next(texts)
    texts.close()
    assert os.listdir(tmp_path / "scratch") == ["keep"]


def test_imports_and_cache_stay_out_of_the_way(tmp_path):
    """A prepared source needs neither datasets nor tokenizers, and no other cache is used."""
    write(tmp_path, {"a.jsonl": jsonl({"text": "a b c"}, {"text": "d e f"})})
    code = """if True:
        import sys
        from data import prepare
        assert not {"datasets", "tokenizers"} & {*sys.modules}
        prepare("a.jsonl", vocab_size=257, progress=False)
        assert {"datasets", "tokenizers"} <= {*sys.modules}
        sys.modules["datasets"] = sys.modules["tokenizers"] = None  # to import them would fail
        prepare("a.jsonl", vocab_size=257, progress=False)
    """
    keep = {"PATH", "LD_LIBRARY_PATH"}
    env = {name: value for name, value in os.environ.items() if name in keep}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert os.listdir(tmp_path / "home") == [".cache"]
    assert os.listdir(tmp_path / "home" / ".cache") == ["tritium"]
