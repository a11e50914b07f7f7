"""Shares are kept all along, nothing comes twice unasked, and every pass is the same."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tritium.data import DataError, Source
from tritium.data.mixture import Mixture


def source(folder: Path, name: str, n: int, size: int = 10, **options) -> Source:
    file = folder / f"{name}.jsonl"
    texts = (f"{name}{i}".ljust(size, ".") for i in range(n))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(file, **options)


def names(texts) -> str:
    return "".join(text[0] for text in texts)


def test_without_weights_one_after_another(tmp_path):
    mixture = Mixture([source(tmp_path, "b", 3), source(tmp_path, "a", 2, epochs=2)])
    assert names(mixture) == "bbbaaaa"
    assert mixture.given == [3, 4]
    assert [tally.kept for tally in mixture.tallies] == [3, 2]


def test_shares_hold_at_every_point(tmp_path):
    sizes, weights = {"a": 7, "b": 31, "c": 90}, {"a": 1, "b": 3, "c": 6}
    mixture = Mixture(
        [source(tmp_path, name, 2000, sizes[name], weight=weights[name]) for name in "abc"]
    )
    given = Counter()
    for count, text in enumerate(islice(mixture, 500)):
        given[text[0]] += len(text)
        if count > 50:
            for name, weight in weights.items():
                assert abs(given[name] - given.total() * weight / 10) <= 2 * sizes[name] + 90


def test_ends_when_the_next_source_has_no_more(tmp_path):
    small, large = (source(tmp_path, name, n, weight=1) for name, n in (("a", 5), ("b", 99)))
    mixture = Mixture([small, large])
    assert names(mixture) == "ab" * 5
    assert mixture.given == [5, 5]
    twice = Source(small.path, weight=1, epochs=2)
    assert names(Mixture([twice, large])) == "ab" * 10


def test_every_pass_is_the_same(tmp_path):
    mixture = Mixture([source(tmp_path, "a", 30, weight=2), source(tmp_path, "b", 50, 7, weight=1)])
    first = list(mixture)
    assert list(islice(mixture, 4)) == first[:4]
    assert list(mixture) == first
    assert sum(mixture.given) == len(first)


def test_duplicates_are_left_out_across_sources(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"text": text}) + "\n" for text in "xyx"))
    b.write_text("".join(json.dumps({"text": text}) + "\n" for text in "zyw"))
    mixture = Mixture([Source(a, epochs=2), Source(b)], deduplicate=True)
    assert "".join(mixture) == "xyxyzw"
    assert [tally.left_out["duplicate"] for tally in mixture.tallies] == [1, 1]
    assert "".join(mixture) == "xyxyzw"
    assert "".join(Mixture([Source(a), Source(b)])) == "xyxzyw"


@pytest.mark.parametrize("weights", [[], [1, None], [None, 2, 3]], ids=str)
def test_refuses_some_weights_only(tmp_path, weights):
    sources = [source(tmp_path, f"{i}", 1, weight=w) for i, w in enumerate(weights)]
    with pytest.raises(DataError, match=f"got {len(weights)}, of which"):
        Mixture(sources)
