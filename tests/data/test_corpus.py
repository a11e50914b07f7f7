"""Every kind of source gives its documents in a fixed order; every unusable one a clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tritium.data import DataError
from tritium.data.corpus import Source, documents, fingerprint, parse_source, source_files
from tritium.data.records import Tally


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
    parts = {part for file in source_files(Source()) for part in file.parts[-4:]}
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


def test_a_file_alone_in_its_folder_is_cut_as_if_it_was_named(text_file, tmp_path):
    """And kept whole beside another; a table's rows are its documents anyway."""
    pieces = list(documents(text_file))
    assert len(pieces) > 1
    assert list(documents(text_file.parent)) == pieces
    (tmp_path / "z.txt").write_text("other")
    assert list(documents(text_file.parent)) == ["".join(pieces), "other"]
    rows = [{"text": "long " * 9999}, {"text": "short"}]
    write(tmp_path / "table", {"a.jsonl": jsonl(*rows)})
    assert list(documents(tmp_path / "table")) == [row["text"] for row in rows]


def test_nulls_and_white_space_are_left_out(tmp_path):
    rows = jsonl({"text": "a"}, {"text": None}, {"x": 1}, {"text": " \n"}, {"text": "b"})
    assert list(documents(write(tmp_path, {"a.jsonl": rows}) / "a.jsonl")) == ["a", "b"]


def test_parquet_and_field(tmp_path):
    file = parquet(tmp_path / "a.parquet", body=["a", None, "b"], n=[1, 2, 3])
    assert list(documents(Source(file, field="body"))) == ["a", "b"]


UNUSABLE = [
    ("a.txt", b"", "a.txt holds no text to use: it is empty; name another"),
    ("a.txt", b" \n\t\n", "holds no text to use: 1 empty"),
    ("a.txt", b"\xffcut \n", r"1 bad \(1 not UTF-8; first: \S+a\.txt at byte 0"),
    ("a.jsonl", b"\n\n", "it is empty"),
    (
        "a.jsonl",
        b'{"text": oops}\n[1]\n',
        r"2 bad \(1 not JSON, 1 not a JSON object; first: .*:1: ",
    ),
    ("a.jsonl", jsonl({"body": "a", "id": 1}), r"no field 'text'; first: .*it has 'body', 'id'"),
    ("a.jsonl", jsonl({"text": 1}, {"text": 2}), "2 field 'text' is int, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "1 half of a surrogate pair"),
    ("a.jsonl.gz", b"not compressed", "1 damaged file"),
    ("a.jsonl.zst", b"not compressed", "1 damaged file"),
    ("a.parquet", b"", "1 damaged file"),
    ("a.parquet", b"PAR1 not really", "1 damaged file"),
    ("a.json", b"{}", r"a\.json: \.json is none of \.txt"),
    ("a.pdf", b"%PDF", r"a\.pdf: \.pdf is none of \.txt"),
    ("a.parquet.gz", b"", r"a\.parquet\.gz: \.gz is none of"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE, ids=[m for *_, m in UNUSABLE])
def test_unusable_file(tmp_path, name, content, message, capfd):
    with pytest.raises(DataError, match=message):
        list(documents(write(tmp_path, {name: content}) / name))
    assert capfd.readouterr() == ("", "")


def test_missing_source():
    with pytest.raises(DataError, match=r"no file or folder /no/where"):
        list(documents("/no/where"))


def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match=r"holds no file of type \.txt"):
        list(documents(write(tmp_path, {"a.bin": b"x"})))


def test_fingerprint_follows_the_files(tmp_path):
    write(tmp_path, {"a.txt": b"one", "b.bin": b"ignored"})
    first = fingerprint(Source(tmp_path))
    write(tmp_path, {"b.bin": b"changed"})
    assert fingerprint(Source(tmp_path)) == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    second = fingerprint(Source(tmp_path))
    write(tmp_path, {"a.txt": b"four"})
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert len({first, second, fingerprint(Source(tmp_path))}) == 3


def test_imports_and_cache_stay_out_of_the_way(tmp_path):
    """Local text needs no datasets, a prepared source no tokenizers; no other cache is used."""
    write(tmp_path, {"a.jsonl": jsonl({"text": "a b c"}, {"text": "d e f"})})
    code = """if True:
        import sys
        from tritium.data import prepare
        assert not {"datasets", "tokenizers"} & {*sys.modules}
        prepare("a.jsonl", vocab_size=257, progress=False)
        assert "tokenizers" in sys.modules and "datasets" not in sys.modules
        sys.modules["tokenizers"] = None  # to import it would fail
        prepare("a.jsonl", vocab_size=257, progress=False)
    """
    keep = {"PATH", "LD_LIBRARY_PATH"}
    env = {name: value for name, value in os.environ.items() if name in keep}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert os.listdir(tmp_path / "home") == [".cache"]
    assert os.listdir(tmp_path / "home" / ".cache") == ["tritium"]


def test_string_form():
    text = "x/a?.jsonl?weight=0.5&field=a%26b&match=^a+$&limit=3&stream=1&epochs=2"
    expected = Source("x/a", weight=0.5, field="a&b", match="^a+$", limit=3, stream=True, epochs=2)
    assert parse_source(text.replace("a?.jsonl", "a")) == expected
    assert parse_source("hf://a/b@c", field="body") == Source("hf://a/b@c", field="body")


def test_a_string_too_long_for_a_file_name():
    assert parse_source("hf://a/b?match=" + "x" * 5000).match == "x" * 5000


def test_a_file_of_that_name_comes_first(tmp_path):
    file = write(tmp_path, {"a?field=b": b"hello"}) / "a?field=b"
    assert parse_source(str(file)) == Source(str(file))


BAD_STRINGS = [
    ("a?wieght=1", r"unknown key 'wieght'; the keys are weight, epochs, field"),
    ("a?path=b", "unknown key 'path'"),
    ("a?weight=much", "a.weight=much: weight: could not convert"),
    ("a?weight=0", "weight must be above 0, got 0.0"),
    ("a?weight=nan", "weight must be above 0, got nan"),
    ("a?epochs=0", "epochs must be at least 1, got 0"),
    ("a?limit=0", "limit must be at least 1"),
    ("a?match=(", "match is no regular expression: missing"),
    ("a?stream=yes", "stream: must be 0 or 1, got yes"),
]


@pytest.mark.parametrize(("text", "message"), BAD_STRINGS, ids=[text for text, _ in BAD_STRINGS])
def test_refuses_a_string(text, message):
    with pytest.raises(DataError, match=message):
        parse_source(text)


FILTERS = [
    ({"min_chars": 3}, ["ccc", "dddd"], {"under 3 characters": 2}),
    ({"max_chars": 2}, ["a", "bb"], {"over 2 characters": 2}),
    ({"match": "[bd]"}, ["bb", "dddd"], {"without a match": 2}),
    ({"limit": 2}, ["a", "bb"], {}),
    ({"limit": 2, "min_chars": 2}, ["bb", "ccc"], {"under 2 characters": 1}),
]


@pytest.mark.parametrize(("options", "kept", "left_out"), FILTERS, ids=str)
def test_filters(tmp_path, options, kept, left_out):
    rows = jsonl(*({"text": text} for text in ("a", "bb", "ccc", "dddd")))
    file, tally = write(tmp_path, {"a.jsonl": rows}) / "a.jsonl", Tally()
    assert list(documents(Source(file, **options), tally)) == kept
    assert (tally.kept, tally.left_out, tally.bad) == (len(kept), left_out, {})


def test_fingerprint_is_of_the_settings_too(tmp_path):
    write(tmp_path, {"a.txt": b"one"})
    sources = Source(tmp_path), Source(tmp_path, min_chars=2), Source(tmp_path, weight=1)
    assert len({fingerprint(source) for source in sources}) == 3
