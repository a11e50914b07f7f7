"""Datasets by name and revision come through `datasets`: from disk, and from a stub."""

import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from tritium.data import DataError, prepare, shards
from tritium.data.corpus import Source, documents, fingerprint
from tritium.data.prepare import encoding
from tritium.data.records import Tally

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = [f"text {i}" for i in range(150)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"body": text, "n": i} for i, text in enumerate(TEXTS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({"body": "held out", "n": 0}) + "\n")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset, which notes what it is asked for."""
    asked = []

    def dataset_info(self, name, revision=None):
        asked.append(("revision", name, revision))
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(path, **options):
        asked.append(("load", path, options))
        return datasets.Dataset.from_dict({"text": [*TEXTS, None], "n": [0] * 151})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("stream", [False, True])
def test_dataset_on_disk(folder, stream):
    source = Source(f"hf://{folder}", field="body", stream=stream)
    assert list(documents(source)) == TEXTS
    held_out = Source(f"hf://{folder}", field="body", split="test", stream=stream)
    assert list(documents(held_out)) == ["held out"]


def test_dataset_of_the_hub(hub):
    tally = Tally()
    source = Source("hf://owner/name@v2", config="en", split="validation", stream=True)
    assert list(documents(source, tally)) == TEXTS
    options = {"name": "en", "split": "validation", "revision": COMMIT, "streaming": True}
    assert hub == [("revision", "owner/name", "v2"), ("load", "owner/name", options)]
    assert tally.left_out == {"empty": 1}


def test_a_commit_needs_no_asking(hub):
    fingerprint(Source(f"hf://owner/name@{COMMIT}"))
    assert hub == []
    assert fingerprint(Source("hf://owner/name")) != fingerprint(Source("hf://owner/name@v2"))
    assert hub == [("revision", "owner/name", None), ("revision", "owner/name", "v2")]


def test_prepared_once(hub):
    options = {"vocab_size": 260, "progress": False, "val_fraction": 0.2}
    first = prepare("hf://owner/name", **options)
    loads = len([kind for kind, *_ in hub if kind == "load"])
    assert prepare("hf://owner/name", **options) == first
    assert len([kind for kind, *_ in hub if kind == "load"]) == loads


def test_unknown_column(folder, hub):
    with pytest.raises(DataError, match=r"has no column 'body' but \['n', 'text'\]; set field="):
        list(documents(Source("hf://owner/name", field="body")))


def test_out_of_reach():
    with pytest.raises(
        DataError, match=r"cannot ask the hub for revision main of owner/name: .*@40"
    ):
        list(documents(Source("hf://owner/name")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "nothing"}, r"split nothing\): ValueError"),
        ({"config": "nothing"}, r"configuration nothing, .*: ValueError"),
        ({"field": "nothing"}, r"nothing"),
    ],
    ids=str,
)
def test_dataset_that_cannot_be_read(folder, options, message):
    with pytest.raises(DataError, match=message):
        list(documents(Source(f"hf://{folder}", **{"field": "body", **options})))


def test_no_such_folder():
    with pytest.raises(DataError, match="there is no folder /no/where"):
        fingerprint(Source("hf:///no/where"))


def test_a_network_that_fails_half_way_costs_nothing(hub, home, monkeypatch):
    class Failing:
        column_names = ("text",)

        def select_columns(self, columns):
            return self

        def iter(self, size):
            yield {"text": ["some text " * 50] * 40}
            raise ConnectionError("no route")

    options = {"vocab_size": 260, "progress": False, "val_fraction": 0.2, "threads": 1}
    whole = prepare("hf://owner/name", cache=home / "whole", **options)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 100)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Failing())
    with pytest.raises(DataError, match=r"cannot read hf://owner/name .*ConnectionError: no route"):
        prepare("hf://owner/name", tokenizer=whole, **options)
    assert len(list((home / "prepared").glob("*.tmp/*.bin"))) > 2
