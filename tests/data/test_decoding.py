"""A file is read in its own encoding or refused: nothing that is no text becomes a document."""

import gzip
import json
import random
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritium.data import DataError
from tritium.data.corpus import Source, documents
from tritium.data.decoding import NotTextError, detect
from tritium.data.records import Tally

SAMPLES = {
    "English": "The quick brown fox jumps over the lazy dog, twice: naïve café.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, και πάλι.",
    "Persian": "می‌خواهم این کتاب را بخوانم و بنویسم.",
    "Chinese": "天地玄黃 宇宙洪荒 日月盈昃 辰宿列張 寒來暑往 秋收冬藏",
    "code": "def f(x):\n\treturn x ** 2  # 3.14",
    "emoji": "well \U0001f600 done \U0001f468‍\U0001f469 ok",
}
MARKS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff",
         "utf-32-le": b"\xff\xfe\0\0", "utf-32-be": b"\0\0\xfe\xff"}  # fmt: skip
PACKS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
quickly = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path: Path, **options) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(documents(Source(path, **options), tally)), tally


@quickly
@given(
    lines=st.lists(st.sampled_from([*SAMPLES.values()]), min_size=1, max_size=60),
    encoding=st.sampled_from([*MARKS]),
    marked=st.booleans(),
    pack=st.sampled_from([*PACKS]),
    kind=st.sampled_from([".txt", ".jsonl", "folder"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_every_encoding_of_every_kind_of_file(
    tmp_path_factory, lines, encoding, marked, pack, kind, end
):
    folder = tmp_path_factory.mktemp("encodings")
    rows = lines
    if kind == ".jsonl":
        rows = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    content = end.join([*rows, ""]).encode(encoding)
    file = folder / f"a{'.jsonl' if kind == '.jsonl' else '.txt'}{pack}"
    file.write_bytes(PACKS[pack](MARKS[encoding] * marked + content))
    try:
        kept, tally = read(folder if kind == "folder" else file)
    except DataError as error:  # without a mark, what is no alphabet is not guessed
        unmarked = not marked and encoding.startswith("utf-16")
        if unmarked and any(SAMPLES[name] in lines for name in ("Chinese", "emoji")):
            return
        raise AssertionError(error) from error
    if kind == ".jsonl":
        assert kept == lines
    else:
        assert "".join(kept) == "\n".join([*lines, ""])
    assert not tally.bad
    assert tally.encodings == ({} if encoding == "utf-8" else {encoding.upper(): 1})


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("encoding", [each for each in MARKS if each != "utf-8"])
def test_a_long_file_keeps_its_encoding(tmp_path, name, encoding):
    text = f"{SAMPLES[name]}\n" * 9000  # far more than what is looked at
    mark = MARKS[encoding] if name in ("Chinese", "emoji") else b""
    (tmp_path / "a.txt").write_bytes(mark + text.encode(encoding))
    kept, tally = read(tmp_path / "a.txt")
    assert "".join(kept) == text
    assert not tally.bad


def png() -> bytes:
    pixels = zlib.compress(random.Random(0).randbytes(30_000))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(pixels)) + b"IDAT" + pixels


def pdf() -> bytes:
    objects = [b"%d 0 obj\n<< /Length %d >>\nendobj\n" % (i, i * i) for i in range(500)]
    return b"%PDF-1.7\n" + b"".join(objects)


def table() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [*SAMPLES.values()] * 50}), sink)
    return sink.getvalue().to_pybytes()


NO_TEXT = {
    "a PDF": pdf(),
    "a program (ELF)": b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0>\0\x01\0\0\0" * 400,
    "a zip": b"PK\x03\x04\x14\0\0\0\x08\0" + random.Random(1).randbytes(5000),
    "a picture (PNG)": png(),
    "a picture (JPEG)": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + random.Random(2).randbytes(5000),
    "compressed (gzip)": gzip.compress(random.Random(3).randbytes(5000)),
    "a parquet table": table(),
    "binary": struct.pack("<500i", *range(0, 5_000_000, 10_000)),
    "a pickle": b"\x80\x05\x95" + bytes(200),
}
OTHERS = {
    "random bytes": random.Random(4).randbytes(20_000),
    "NULs": bytes(5000),
    "a mark before numbers": b"\xff\xfe" + struct.pack("<3000H", *([1, 2, 14, 0xFFF0] * 750)),
    "floats": struct.pack("<2000d", *(random.Random(5).random() for _ in range(2000))),
    "sound": struct.pack("<9000h", *(random.Random(6).randrange(-9000, 9000) for _ in range(9000))),
    "Latin-1": ("Élève à l'école, déjà été reçu.\n" * 400).encode("latin-1"),
    "Shift JIS": ("いろはにほへと ちりぬるを\n" * 400).encode("shift-jis"),
    "KOI8-R": ((SAMPLES["Russian"] + "\n") * 400).encode("koi8-r"),
    "UTF-16 after a text": b"plain\n" * 200 + ("and more words\n" * 400).encode("utf-16-be"),
    "NULs as JSON": b"".join(b'{"text": "a\\u0000b\\u0000"}\n' for _ in range(50)),
}


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".txt.gz", ".py", ""])
@pytest.mark.parametrize("what", [*NO_TEXT, *OTHERS])
def test_what_is_no_text_is_refused_whatever_its_name(tmp_path, what, suffix):
    content = {**NO_TEXT, **OTHERS}[what]
    if what == "NULs as JSON" and suffix != ".jsonl":
        return  # escapes are plain characters there
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(content) if suffix == ".txt.gz" else content)
    with pytest.raises(DataError, match=f"not text but {what.split(' (')[0]}" if what in NO_TEXT
                       else "cannot be read|no text to use"):  # fmt: skip
        read(file)


def test_in_a_folder_it_is_counted_and_passed_over(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    for i, content in enumerate([*NO_TEXT.values()][:3]):
        (tmp_path / f"x{i}.txt").write_bytes(content)
    kept, tally = read(tmp_path)
    assert len(kept) == 20
    assert tally.bad.total() == 3
    assert "first: " in tally.summary()


@quickly
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0, 1))
def test_the_share_that_may_be_bad_is_kept(tmp_path_factory, n_bad, n_good, most):
    file = tmp_path_factory.mktemp("share") / "a.jsonl"
    rows = ['{"text": "good"}'] * n_good + ["oops"] * n_bad
    file.write_text("\n".join(rows))
    if n_bad / (n_bad + n_good) > most:
        with pytest.raises(DataError, match="of its records cannot be read"):
            read(file, max_bad=most)
    else:
        assert len(read(file, max_bad=most)[0]) == n_good


@quickly
@given(st.binary(max_size=300))
def test_every_beginning_is_decided(head):
    try:
        encoding, mark = detect(head)
    except NotTextError:
        return
    assert head.startswith(MARKS[encoding]) or not mark


@quickly
@given(st.text(max_size=200).filter(lambda text: text.isprintable()))
def test_printable_text_in_utf8_is_always_read_as_such(text):
    content = text.encode()
    if text and not text.startswith("{\\rtf") and "\ufffd" not in text:
        assert detect(content) == ("utf-8", 0)


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.txt.gz"])
@pytest.mark.parametrize("chain", [1, 2])
def test_the_name_that_was_given_says_how_to_read(tmp_path, name, chain):
    texts = [f"document {i}\n" for i in range(40)]
    blob = tmp_path / "blobs" / "0123abc"
    blob.parent.mkdir()
    if name == "train.jsonl":
        blob.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif name == "train.parquet":
        pq.write_table(pa.table({"text": texts}), blob)
    else:
        blob.write_bytes(gzip.compress("".join(texts).encode()))
    link = tmp_path / "snapshot" / name
    link.parent.mkdir()
    target = blob
    for i in range(chain - 1):
        target = tmp_path / f"between{i}"
        target.symlink_to(blob)
    link.symlink_to(target)
    assert "".join(read(link)[0]) == "".join(texts) == "".join(read(link.parent)[0])
    (tmp_path / "latest").symlink_to(link)  # without a suffix: what it leads to says it
    assert "".join(read(tmp_path / "latest")[0]) == "".join(texts)


def test_a_link_is_read_by_its_own_name_not_by_that_of_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.txt")[0] == ['{"text": "x"}\n']
