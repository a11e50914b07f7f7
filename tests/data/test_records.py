"""One bad record costs that record: it is counted, named, and passed over."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.data.corpus import Source, documents
from tritium.data.records import Tally


def rows(n: int) -> list[str]:
    rng = random.Random(n)
    return [f"row {i} {'é' * rng.randrange(9)} {rng.random()}" for i in range(n)]


def read(path: Path, **options) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(documents(Source(path, **options), tally)), tally


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


BREAKS = {
    "not JSON": lambda line: line[:9] + b"\n",
    "not UTF-8": lambda line: line.replace(b"row", b"\xff"),
    "not a JSON object": lambda line: b'"text"\n',
    "no field 'text'": lambda line: line.replace(b'"text"', b'"body"'),
    "field 'text' is list, not text": lambda line: b'{"text": ["a"]}\n',
    "half of a surrogate pair": lambda line: line.replace(b"row", b"\\ud800"),
}


@pytest.mark.parametrize("reason", BREAKS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_fifth_line_broken(tmp_path, reason, suffix):
    texts = rows(100)
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts]
    lines[::5] = [BREAKS[reason](line) for line in lines[::5]]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(b"".join(lines)))
    kept, tally = read(file)
    assert kept == [text for i, text in enumerate(texts) if i % 5]
    assert tally.bad == {reason: 20}
    assert tally.first_bad.startswith(f"{file}:1")
    assert tally.position() == file.stat().st_size
    assert "20 bad (20 " in tally.summary()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_parts_one_after_another(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": zstd}[suffix]
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(pack(b"one\n") + pack(b"two\n"))
    assert read(file)[0] == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_file_gives_what_comes_before(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": zstd}[suffix]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows(20_000))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines)[:-100])
    (tmp_path / "b.txt").write_text("after it")
    kept, tally = read(tmp_path)
    assert kept[-1] == "after it"
    assert kept[:-1] == rows(20_000)[: len(kept) - 1]
    assert len(kept) > 10_000
    assert tally.bad.total() in (1, 2)  # the file, and a line cut short where it ends
    assert tally.bad["damaged file"] == 1


def test_parquet_row_that_is_not_utf8(tmp_path):
    column = pa.array([b"one", b"\xff", None, b"four"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    kept, tally = read(tmp_path)
    assert kept == ["one", "four"]
    assert (tally.bad, tally.left_out) == ({"not UTF-8": 1}, {"empty": 1})
    assert tally.first_bad == f"{tmp_path / 'a.parquet'} row 2: not UTF-8"


def test_files_of_a_folder_that_cannot_be_used(tmp_path):
    pq.write_table(pa.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "c.txt").write_bytes(b"not \xff")
    (tmp_path / "d.txt").write_bytes(b"fine")
    kept, tally = read(tmp_path, max_bad=1)
    assert kept == ["fine"]
    assert tally.bad == {"no field 'text'": 2, "damaged file": 1, "not UTF-8": 1}
    assert "it has 'body'" in tally.first_bad


def test_bad_line_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\xfftwo\nthree\ncut \xf0\x9f")
    kept, tally = read(tmp_path / "a.txt", max_bad=0.4)
    assert kept == ["one\nthree\ncut "]
    assert tally.bad == {"not UTF-8": 2}
    assert tally.first_bad.endswith("a.txt at byte 4: not UTF-8")


@settings(max_examples=100)
@given(st.text(st.sampled_from("a é\n\r\U0001f600"), max_size=60), st.integers(1, 9))
def test_text_read_in_parts_is_whole(tmp_path_factory, text, part):
    file = tmp_path_factory.mktemp("parts") / "a.txt"
    file.write_bytes(("x" + text).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tritium.data.records._LINE", part)
        kept, tally = read(file)
    assert "".join(kept) == "x" + text.replace("\r\n", "\n").replace("\r", "\n")
    assert not tally.bad
