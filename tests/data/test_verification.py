"""Prove that no shard that changed since it was written stays unnoticed."""

import builtins
import errno
import time
from pathlib import Path

import pytest

from tritium.data import DataError, prepare, shards
from tritium.data.verification import Verification


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"document {i} " * 20)
    return Path(prepare(text, vocab_size=300, val_fraction=0.3, progress=False))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("shard", ["train-00000.bin", "train-00002.bin", "val-00000.bin"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_is_found_before_the_run(folder, shard, place):
    Verification(folder)
    flip(folder / shard, place)
    with pytest.raises(DataError, match=rf"the shard \S+{shard} is damaged: its bytes are not"):
        Verification(folder)


def found_later(verification: Verification) -> str:
    for _ in range(1000):
        try:
            verification.check()
        except DataError as error:
            return str(error)
        time.sleep(0.01)
    return ""


def test_of_much_data_it_is_found_while_the_run_goes_on(folder):
    flip(folder / "train-00001.bin", 7)
    assert "train-00001.bin is damaged" in found_later(Verification(folder, at_once=100))


def test_a_shard_that_cannot_be_read_is_named(folder, monkeypatch):
    read = shards.hashlib.file_digest

    def unreadable(file, name):
        if "train-00001" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, name)

    monkeypatch.setattr(shards.hashlib, "file_digest", unreadable)
    message = r"cannot read the shard \S+train-00001.bin: Input/output error"
    with pytest.raises(DataError, match=message):
        Verification(folder)
    assert "train-00001.bin: Input" in found_later(Verification(folder, at_once=100))


def test_whole_shards_are_read_once(folder, monkeypatch):
    opened, open_ = [], builtins.open
    monkeypatch.setattr(
        Path, "open", lambda p, *a, **k: (opened.append(p.name), open_(p, *a, **k))[1]
    )
    Verification(folder).check()
    names = sorted(p.name for p in folder.glob("*.bin"))
    assert sorted(name for name in opened if name.endswith(".bin")) == names
