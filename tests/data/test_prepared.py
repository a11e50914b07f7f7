"""Prove what `prepare` takes and returns: read once, reported at every start, or refused."""

import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

import tritium.data.tokenizer as tokenizer_module
from tritium.data import (
    DataError,
    DocumentLoader,
    Prepared,
    Source,
    Tokenizer,
    TokenLoader,
    prepare,
)
from tritium.data.corpus import INSTALLED, documents, fingerprint, source_files
from tritium.data.error import printable
from tritium.data.records import Tally, only_code
from tritium.data.verification import Verification

OPTIONS = {"vocab_size": 300, "val_fraction": 0.3}


@pytest.fixture
def rows(tmp_path) -> Path:
    """A table of 60 documents, with 6 lines that are none and a copy."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"document {i % 59} " * 9}) for i in range(60)] + ["oops"] * 6
    file.write_text("\n".join(lines))
    return file


def test_every_start_says_what_was_left_out(rows, capfd):
    said = []
    for _ in range(3):
        prepared = prepare(rows, deduplicate=True, **OPTIONS)
        said.append([line for line in capfd.readouterr().err.splitlines() if "left out" in line])
        assert said[-1] == prepared.left_out
    expected = f"{rows}: left out 6 bad (6 not JSON; first: {rows}:61: not JSON), 1 duplicate"
    assert said == [[expected]] * 3
    prepare(prepared.folder)
    assert capfd.readouterr().err == f"{expected}\n"
    prepare(rows, deduplicate=True, progress=False, **OPTIONS)
    assert capfd.readouterr() == ("", "")


def test_says_nothing_where_nothing_was_left_out(text_file, capfd):
    prepare(text_file, **OPTIONS)
    capfd.readouterr()
    assert prepare(text_file, **OPTIONS).left_out == []
    assert capfd.readouterr() == ("", "")


def test_a_start_parses_the_tokenizer_once(text_file, monkeypatch):
    prepare(text_file, progress=False, **OPTIONS)
    parsed, engine = [], tokenizer_module._engine
    monkeypatch.setattr(
        tokenizer_module, "_engine", lambda spec: (parsed.append(1), engine(spec))[1]
    )
    prepared = prepare(text_file, progress=False, **OPTIONS)
    Verification(prepared)
    assert Tokenizer.load(prepared) is prepared.tokenizer
    for loader in (TokenLoader, DocumentLoader):
        for split in ("train", "val"):
            loader(prepared, split, batch_size=2, length=8)
    assert parsed == [1]


def test_is_a_path(text_file):
    prepared = prepare(text_file, progress=False, **OPTIONS)
    assert isinstance(prepared, Prepared)
    assert os.fspath(prepared) == str(prepared) == str(Path(prepared))
    assert prepared == prepared.folder
    assert {prepared} == {prepared.folder}
    assert (prepared / "manifest.json").is_file()
    assert prepare(prepared, progress=False) == prepared
    (prepared / "val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"val-00000\.bin is missing"):
        TokenLoader(prepared, "train", batch_size=1, length=8)


def test_takes_a_tokenizer(text_file, tokenizer):
    prepared = prepare(text_file, tokenizer=tokenizer, progress=False)
    assert prepared.tokenizer.fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tokenizer) is tokenizer


def test_takes_an_output_folder(text_file, tmp_path, home):
    out = tmp_path / "out.v1"
    for _ in range(2):  # made, then found
        prepared = prepare(text_file, out=out, progress=False, **OPTIONS)
        assert prepared == out
    assert {"manifest.json", "tokenizer.json"} < {*os.listdir(out)}
    assert not (home / "prepared").exists()
    with pytest.raises(DataError, match="out must be a new or empty folder"):
        prepare(text_file, out=out, progress=False, vocab_size=301)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds something else"):
        prepare(text_file, out=mine, progress=False, **OPTIONS)
    assert os.listdir(mine) == ["thesis.txt"]
    with pytest.raises(DataError, match="is a file; name another"):
        prepare(text_file, out=text_file, progress=False, **OPTIONS)


NO_SOURCES = [
    (["once upon a time " * 400, "another text"], "reads like the text itself"),
    ("once\nupon a time" * 99, "reads like the text itself"),
    ("a\0b", "cannot read|no file or folder"),
    ("~nobody_of_that_name/a.txt", "cannot read|no file or folder"),
    ([], "at least one source"),
    (5, "a source is a path, a string or a Source, got int"),
    ([b"a"], "a source is a path, a string or a Source, got bytes"),
    ("python://everything", "the only source of this kind is python://installed"),
]


@pytest.mark.parametrize(("source", "message"), NO_SOURCES, ids=[m for _, m in NO_SOURCES])
def test_what_is_no_source(source, message):
    with pytest.raises(DataError, match=message):
        prepare(source, progress=False)


@pytest.mark.parametrize("line", ["hello", "a" * 8192])
def test_too_short_to_hold_some_back(tmp_path, line):
    file = tmp_path / "short.txt"
    file.write_text(line)
    with pytest.raises(DataError, match=r"too short to hold|copies of one text stay") as e:
        prepare(file, progress=False)
    assert "val_fraction" not in str(e.value)  # train.py has no such flag


def test_the_length_that_is_asked_for_is_enough(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("".join(chr(97 + i * i % 23) for i in range(8193)))
    prepare(file, progress=False, **OPTIONS)


NAMES = [
    b"a [red].txt",
    b"a[b] [!].txt",
    b"line\nbreak.txt",
    b"latin \xe9.txt",
    b"esc \x1b[31m.txt",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trouble", [False, True])
def test_no_name_ends_a_run(tmp_path, name, trouble, capfd):
    file = os.fsencode(tmp_path) + b"/" + name
    lines = [f"line {i} about foxes and dogs\n\n".encode() for i in range(400)]
    with open(file, "wb") as f:
        f.write(b"".join([*lines, *[b"\xff\n"] * trouble]))
    prepared = prepare(os.fsdecode(file), **OPTIONS)
    console = Console(file=sys.stderr, markup=False)
    for text in (prepared.manifest.source, *prepared.left_out):
        text.encode()
        assert text.isprintable()
        console.print(text)
    assert len(prepared.left_out) == trouble
    capfd.readouterr()
    os.remove(file)
    with pytest.raises(DataError) as error:
        prepare(os.fsdecode(file))
    assert str(error.value).isprintable()
    assert repr(os.fsdecode(name))[1:4] in str(error.value)


def test_printable():
    assert printable("é [b] 中") == "é [b] 中"
    assert printable("a\nb\x1b\udce9") == r"a\nb\x1b\udce9"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/no/where")])
def test_a_pipe_or_a_link_to_nothing_is_refused(tmp_path, make):
    (tmp_path / "a.txt").write_text("text")
    make(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"cannot read \S+b\.txt: "):
        prepare(tmp_path, progress=False)


def test_default_is_without_tables_of_characters():
    assert not any("encodings" in file.parts for file in source_files(Source()))


def test_installed_packages_are_a_source():
    source, tally = Source(INSTALLED, limit=700), Tally()
    files = source_files(source)
    assert fingerprint(source) == fingerprint(source)
    parts = {part for file in files for part in file.parts[-3:]}
    assert not parts & {"tests", "test", "__pycache__"}
    assert any("torch" in file.parts for file in files)
    texts = list(documents(source, tally))
    assert len(texts) == len({*texts}) == 700
    assert "packages installed beside torch" in str(source)


def test_code_is_taken_once_and_tables_are_not():
    code = "def f(x):\n    return x + 1\n"
    table = "TABLE = [\n" + "    0x1f, 0x2e, 37, 41,\n" * 50 + "]\n"
    wide = "x = '" + "a" * 2000 + "'\n" + code * 50
    tally = Tally()
    assert list(only_code([code, table, code, wide, "# other\n"], tally)) == [code, "# other\n"]
    assert tally.left_out == {
        "tables of numbers": 1, "duplicate": 1, "generated, with long lines": 1,
    }  # fmt: skip


def test_a_module_that_cannot_be_decoded_is_counted(tmp_path):
    from tritium.data.records import read_modules

    contents = [b"x = 1\n", b"# coding: nothing\n", b"y = '\xff'\n", b"# coding: latin-1\n# \xe9\n"]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.py").write_bytes(content)
    tally = Tally()
    assert list(read_modules(sorted(tmp_path.iterdir()), tally)) == [
        "x = 1\n", "# coding: latin-1\n# é\n",
    ]  # fmt: skip
    assert tally.bad == {"not in the encoding that it declares": 2}
