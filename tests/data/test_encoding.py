"""A run that is killed, anywhere and often, ends in the bytes of one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritium.data import DataError, Source, atomic, journal, prepare, shards
from tritium.data.prepare import encoding
from tritium.data.shards import open_prepared

ROOT = Path(__file__).parents[2]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing here may catch it."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 700)


@pytest.fixture
def file(tmp_path) -> Path:
    rng = random.Random(0)
    words = [f"{rng.randrange(1000)} <|endoftext|> é"[: rng.randrange(18)] for _ in range(3000)]
    text = "".join(f"{' '.join(rng.sample(words, rng.randrange(1, 40)))}\n\n" for _ in range(200))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path / "text.txt"


def run(file, **options) -> Path:
    options = {"vocab_size": 300, "progress": False, "val_fraction": 0.3, **options}
    return Path(prepare(file, **options))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(n: int, monkeypatch, after: bool) -> None:
    """Let the n-th write from now on, or the moment after it, be the last."""
    write, left = atomic.write, [n]

    def dying(path, data):
        left[0] -= 1
        if left[0] == 0:
            if after:
                write(path, data)
            else:  # in the middle of the draft
                path.with_name(f".half.tmp{path.suffix}").write_bytes(b"half")
            raise KilledError
        write(path, data)

    for module in (shards, journal):
        monkeypatch.setattr(module, "write", dying)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_write(file, tmp_path, monkeypatch, after):
    whole = content(run(file, cache=tmp_path / "whole"))
    assert len(whole) > 10
    kills = 0
    while kills < 100:
        with monkeypatch.context() as patch:
            kill_at(1 + kills % 4, patch, after)
            try:
                folder = run(file)
                break
            except KilledError:
                kills += 1
    assert content(folder) == whole
    assert kills > 5


def test_keeps_finished_shards(file, home, monkeypatch, capfd):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with monkeypatch.context() as patch:
        kill_at(7, patch, after=True)
        with pytest.raises(KilledError):
            run(file)
    (work,) = (home / "prepared").glob("*.tmp")
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.bin")}
    folder = run(file, progress=True)
    assert "resuming after" in capfd.readouterr().err
    kept = [n for n, t in before.items() if (folder / n).stat().st_mtime_ns == t]
    assert len(kept) == len(before) - 1 >= 4  # the last one was not noted in the journal


@pytest.mark.parametrize("fault", ["flip", "cut", "lose", "journal"])
def test_a_shard_damaged_meanwhile_is_made_again(file, home, tmp_path, monkeypatch, fault):
    whole = content(run(file, cache=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_at(9, patch, after=True)
        with pytest.raises(KilledError):
            run(file)
    (work,) = (home / "prepared").glob("*.tmp")
    shard, listed = work / "train-00001.bin", work / journal.FILE
    data = bytearray(shard.read_bytes())
    if fault == "flip":
        data[100] ^= 1
        shard.write_bytes(data)
    elif fault == "cut":
        shard.write_bytes(data[:-2])
    elif fault == "lose":
        shard.unlink()
    else:
        listed.write_bytes(listed.read_bytes()[:-30])
    assert content(run(file)) == whole


def test_another_tokenizer_library_starts_over(file, tmp_path, monkeypatch):
    whole = content(run(file, cache=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_at(6, patch, after=True)
        with pytest.raises(KilledError):
            run(file)
    (work,) = (tmp_path.parent).rglob("*.tmp/journal.jsonl")
    work.write_text(work.read_text().replace('"tokenizer": "', '"tokenizer": "x', 1))
    assert content(run(file)) == whole


CODE = """
import sys
from tritium.data import prepare, shards
from tritium.data.prepare import encoding
shards.SHARD_TOKENS, encoding.BATCH_CHARS = 500, 700
prepare(sys.argv[1], vocab_size=300, progress=False, val_fraction=0.3)
"""


def test_sigkill(file, home, tmp_path):
    whole = content(run(file, cache=tmp_path / "whole"))
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(file)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    while process.poll() is None and not list((home / "prepared").glob("*.tmp/train-00002.bin")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert content(run(file)) == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(file, tmp_path, monkeypatch, threads):
    whole = content(run(file, cache=tmp_path / "whole", threads=2))
    monkeypatch.setattr(encoding, "BATCH_CHARS", 10_000)
    assert content(run(file, threads=threads)) == whole


def test_disk_full_keeps_what_is_finished(file, home, tmp_path, monkeypatch):
    whole = content(run(file, cache=tmp_path / "whole"))
    write, left = atomic.write, [6]

    def filling(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", filling)
        with pytest.raises(DataError, match="No space left on device; make room there"):
            run(file)
    assert len(list((home / "prepared").glob("*.tmp/*.bin"))) == 6
    assert content(run(file)) == whole


def test_what_was_left_out_is_reported_and_kept(tmp_path, capfd):
    lines = [json.dumps({"text": f"line {i % 80}"}) + "\n" for i in range(100)]
    lines[::5] = ["broken\n"] * 20
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = f"{tmp_path / 'a.jsonl'}?min_chars=7"
    folder = run([source], deduplicate=True, progress=True)
    manifest = open_prepared(folder).manifest
    documents = sum(s.documents for split in manifest.splits.values() for s in split)
    (read,) = manifest.read
    assert read["bad"] == {"not JSON": 20}
    assert read["left_out"] == {"under 7 characters": 16, "duplicate": 8}
    assert read["documents"] == documents == 100 - 20 - 16 - 8
    reported = capfd.readouterr().err
    assert f"a.jsonl: left out 20 bad (20 not JSON; first: {tmp_path / 'a.jsonl'}:1: " in reported
    assert "under 7 characters" in reported
    assert "duplicate" in reported


def test_several_sources_and_weights(file, tmp_path):
    (tmp_path / "b.txt").write_text("another text\n\n" * 4000)
    sources = [Source(file, weight=1), f"{tmp_path / 'b.txt'}?weight=3"]
    first = run(sources)
    manifest = open_prepared(first).manifest
    assert [read["source"] for read in manifest.read] == [str(file), str(tmp_path / "b.txt")]
    assert manifest.source == f"{file}, {tmp_path / 'b.txt'}"
    assert run(sources) == first != run(sources[::-1])


def test_a_prepared_folder_is_returned_as_it_is(file):
    folder = run(file)
    assert run(folder) == folder
    (folder / "val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"val-00000\.bin is missing"):
        run(folder)
