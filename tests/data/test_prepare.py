"""Shards say exactly what the text said; a folder of them appears whole or not at all, once."""

import hashlib
import json
import re
import runpy
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tritium.data import DataError, Tokenizer, prepare, shards
from tritium.data.corpus import documents
from tritium.data.prepare import _learn
from tritium.data.prepare.split import assign_splits
from tritium.data.shards import open_prepared


def quietly(source, **options) -> Path:
    return Path(prepare(source, **{"vocab_size": 300, "progress": False, **options}))


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, from its shards."""
    prepared = open_prepared(folder)
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    texts = []
    for shard in manifest.splits[split]:
        ids = np.fromfile(folder / shard.file, manifest.dtype)
        assert ids[-1] == tokenizer.eot
        ends = np.flatnonzero(ids == tokenizer.eot)
        parts = [part[part != tokenizer.eot] for part in np.split(ids, ends[:-1] + 1)]
        assert len(parts) == shard.documents
        texts += [tokenizer.decode(part.tolist()) for part in parts]
    return texts


@pytest.fixture
def many(tmp_path) -> Path:
    """A folder of 60 documents, of which three are the same."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(60):
        n = 0 if i in (20, 40) else i
        (folder / f"{i:02}.txt").write_text(f"document {n}\n" + "some words <|endoftext|> é " * n)
    return folder


@pytest.mark.parametrize("shard_tokens", [500, 1 << 25])
def test_shards_hold_every_document_once(many, monkeypatch, shard_tokens):
    monkeypatch.setattr(shards, "SHARD_TOKENS", shard_tokens)
    folder = quietly(many, val_fraction=0.3)
    train, val = decoded(folder, "train"), decoded(folder, "val")
    assert Counter(train + val) == Counter(documents(many))
    assert not set(train) & set(val)
    assert len(set(val)) > 5


def test_manifest_describes_the_files(many, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    folder = quietly(many)
    prepared = open_prepared(folder)
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    listed = [shard for split in manifest.splits.values() for shard in split]
    assert len(manifest.splits["train"]) > 3
    for shard in listed:
        content = (folder / shard.file).read_bytes()
        assert len(content) == 2 * shard.tokens
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert sum(shard.bytes for shard in listed) == sum(len(t.encode()) for t in documents(many))
    assert {shard.file for shard in listed} | {"manifest.json", "tokenizer.json"} == {
        file.name for file in folder.iterdir()
    }
    assert (manifest.dtype, manifest.vocab_size, manifest.source) == ("<u2", 300, str(many))
    assert manifest.tokenizer == tokenizer.fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_fit_the_dtype(vocab_size, dtype):
    assert shards.token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_same_files_from_the_same_text(many, tmp_path):
    first, second = (quietly(many, cache=tmp_path / name) for name in "ab")
    assert first.name == second.name
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_reuses_what_is_prepared(many, monkeypatch):
    folder = quietly(many)
    monkeypatch.delattr(
        sys.modules["tritium.data.prepare"], "lock"
    )  # nothing can be written without it
    assert quietly(many) == folder


@pytest.mark.parametrize(
    "options", [{"vocab_size": 301}, {"val_fraction": 0.1}, {"field": "x"}], ids=str
)
def test_other_settings_are_prepared_apart(text_file, options):
    assert quietly(text_file, **options) != quietly(text_file)


def test_changed_source_is_prepared_anew(text_file):
    first = quietly(text_file)
    text_file.write_text(text_file.read_text() + "more")
    assert quietly(text_file) != first


def test_uses_a_given_tokenizer(text_file, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    folder = quietly(text_file, tokenizer=tmp_path, vocab_size=5)
    assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def lose_shard(folder):
    (folder / "val-00000.bin").unlink()


def truncate_shard(folder):
    content = (folder / "train-00000.bin").read_bytes()
    (folder / "train-00000.bin").write_bytes(content[:-1])


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def kill_while_writing(folder):
    folder.rename(folder.with_suffix(".tmp"))
    (folder.with_suffix(".tmp") / "train-00001.bin").write_bytes(b"half")


DAMAGES = [damage_manifest, lose_shard, truncate_shard, lose_tokenizer, kill_while_writing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_repaired(text_file, damage):
    folder = quietly(text_file)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder)
    assert quietly(text_file) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_many_at_once_prepare_once(text_file, monkeypatch):
    runs = []
    monkeypatch.setattr(
        sys.modules["tritium.data.prepare"], "_learn", lambda *a: (runs.append(1), _learn(*a))[1]
    )
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(quietly, [text_file] * 8))
    assert (len(folders), len(runs)) == (1, 1)
    open_prepared(folders.pop())


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.95])
def test_split_depends_on_the_text_alone(fraction):
    texts = [f"document {i}" for i in range(1000)]
    forward, backward = (set(assign_splits(t, fraction)) for t in (texts, texts[::-1]))
    assert forward == backward
    assert abs(sum(split == "val" for split, _ in forward) - 1000 * fraction) < 50


@pytest.mark.parametrize("n", [2, 3, 10])
def test_few_documents_still_leave_one_for_validation(n):
    texts = [f"document {i}" for i in range(n)] * 3
    for order in (texts, texts[::-1]):
        pairs = list(assign_splits(order, 1e-9))
        assert Counter(text for _, text in pairs) == Counter(texts)
        assert len({text for split, text in pairs if split == "val"}) == 1
        assert sum(split == "val" for split, _ in pairs) == 3


def leftovers(home: Path) -> list[str]:
    return [file.name for file in (home / "prepared").iterdir() if file.suffix != ".lock"]


BAD_SOURCES = [
    (b"short", "too short to hold some back for validation: 5 bytes are one .* at least 8,193"),
    (b"x" * 8192, "leaves nothing to train on: validation takes all of its 2 document"),
    (b"\xff\n" * 999, "holds no text to use: 999 bad .999 not UTF-8; first: .*a.txt at byte 0"),
    (b"", "holds no text"),
]


@pytest.mark.parametrize(
    ("content", "message"), BAD_SOURCES, ids=["short", "same", "utf8", "empty"]
)
def test_unusable_source_leaves_nothing(tmp_path, home, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        quietly(tmp_path / "a.txt")
    assert leftovers(home) == []


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -1, 2, float("nan")])
def test_refuses_a_fraction(val_fraction):
    with pytest.raises(DataError, match="val_fraction must be between 0 and 1, got"):
        prepare(val_fraction=val_fraction)


def test_refuses_no_threads(text_file):
    with pytest.raises(DataError, match="threads must be at least 1, got 0"):
        quietly(text_file, threads=0)


def test_refuses_a_small_vocabulary(text_file, home):
    with pytest.raises(DataError, match="vocab_size must be at least 257"):
        quietly(text_file, vocab_size=100)
    assert leftovers(home) == []


def test_refuses_a_source_that_changes_meanwhile(text_file, home, monkeypatch):
    def learn_and_touch(*args):
        text_file.write_text("something else " * 1000)
        return _learn(*args)

    monkeypatch.setattr(sys.modules["tritium.data.prepare"], "_learn", learn_and_touch)
    with pytest.raises(DataError, match=r"text\.txt changed while it was read; run again"):
        quietly(text_file)
    assert leftovers(home) == []


def test_refuses_a_cache_that_cannot_be_written(text_file, tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*TRITIUM_HOME"):
        quietly(text_file, cache=text_file)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRITIUM_HOME": "/t", "XDG_CACHE_HOME": "/x"}, "/t"),
        ({"TRITIUM_HOME": "", "XDG_CACHE_HOME": "/x"}, "/x/tritium"),
        ({"TRITIUM_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/tritium"),
    ],
    ids=str,
)
def test_cache_root(monkeypatch, variables, expected):
    from tritium.data.cache import cache_root

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch, text_file):
    for name in ("TRITIUM_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in a container
    with pytest.raises(DataError, match=r"no home folder; set TRITIUM_HOME"):
        quietly(text_file)


def test_a_tilde_of_no_user_is_a_letter(monkeypatch, text_file):
    monkeypatch.chdir(text_file.parent)
    folder = quietly(str(text_file.rename("~nosuch.txt")))
    with pytest.raises(DataError, match="cannot read the tokenizer ~nosuch: No such file"):
        Tokenizer.load("~nosuch")
    Path("~nosuch").symlink_to(folder)
    assert Tokenizer.load("~nosuch").fingerprint == Tokenizer.load(folder).fingerprint


def command(monkeypatch, *args) -> None:
    monkeypatch.setattr(sys, "argv", ["tritium.data.prepare", *map(str, args)])
    runpy.run_module("tritium.data.prepare", run_name="__main__")


def test_command_prints_a_summary(text_file, monkeypatch, capfd):
    command(monkeypatch, text_file, "--vocab-size", "300")
    out, err = capfd.readouterr()
    folder, train, val, seconds = out.splitlines()
    assert json.loads((Path(folder) / "manifest.json").read_text())["source"] == str(text_file)
    assert train.startswith("train: ")
    assert "bytes per token" in val
    assert seconds.endswith(" s")
    assert [line.split(" in ")[0] for line in err.splitlines()] == [
        "learned a tokenizer of 300 tokens",
        "encoded 0.0 MB",
    ]


def test_command_mixes_sources(many, text_file, monkeypatch, capfd):
    command(monkeypatch, f"{many}?weight=1", f"{text_file}?weight=3", "--vocab-size", "300")
    manifest = open_prepared(capfd.readouterr().out.splitlines()[0]).manifest
    assert [source["weight"] for source in manifest.settings["sources"]] == [1, 3]
    assert all(read["documents"] for read in manifest.read)


def test_command_can_be_stopped(text_file, monkeypatch, capfd):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["tritium.data.prepare"], "_learn", stop)
    with pytest.raises(SystemExit, match="130"):
        command(monkeypatch, text_file)
    assert (
        capfd.readouterr().err
        == "tritium.data.prepare: stopped; the same command resumes from here\n"
    )


def test_command_tells_an_error_in_one_line(monkeypatch, capfd):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "/no/where")
    message = "there is no file or folder /no/where; a dataset of the hub is hf://NAME"
    assert capfd.readouterr() == ("", f"tritium.data.prepare: {message}\n")


def test_inspect_shows_what_is_there(many, monkeypatch, capsys, tmp_path):
    folder = quietly(many, val_fraction=0.3, deduplicate=True)
    command(monkeypatch, "inspect", folder, "--samples", "2", "--picture", tmp_path / "a.png")
    out = " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"from {many} 300 ids as uint16" in out
    assert "each as its sha256 says" in out
    assert "2 duplicate" in out
    assert len(re.findall(r"train document [\d,]+, [\d,]+ tokens ─+ document \d+", out)) == 2
    manifest = open_prepared(folder).manifest
    for name in ("documents", "tokens"):
        totals = (sum(getattr(s, name) for s in split) for split in manifest.splits.values())
        assert f"{name} {' '.join(f'{total:,}' for total in totals)}" in out


def test_inspect_finds_a_flipped_bit(text_file, monkeypatch, capfd):
    folder = quietly(text_file)
    content = bytearray((folder / "train-00000.bin").read_bytes())
    content[99] ^= 1
    (folder / "train-00000.bin").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "inspect", folder)
    assert "train-00000.bin is damaged" in capfd.readouterr().err
    assert not (folder / "lengths.png").exists()
