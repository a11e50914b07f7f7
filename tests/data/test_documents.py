"""Every token is a target once per epoch, next to its own document's tokens and no others."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.data import DataError, DocumentLoader, TokenLoader
from tritium.data.journal import remove
from tritium.data.packing import cut, pack
from tritium.data.shards import VERSION, Manifest, ShardWriter, write_manifest

L = 16


@pytest.fixture
def lengths() -> list[int]:
    """Lengths of documents, end-of-text included: many are short, some longer than a window."""
    rng = np.random.default_rng(0)
    return [*rng.integers(1, 12, 60).tolist(), 15, 16, 17, 32, 33, 50, 1]


@pytest.fixture
def folder(tmp_path, tokenizer, lengths) -> Path:
    """Documents in which a token is its own position, except for the end-of-text at each end."""
    splits = {}
    for split, shard_of in (("train", 25), ("val", 1000)):
        writer, start = ShardWriter(tmp_path, split, "<u2"), 400
        for i, length in enumerate(lengths):
            ids = np.arange(start, start + length)
            ids[-1] = tokenizer.eot
            writer.add(ids, np.array([length]), np.array([0]))
            start += length
            if i % shard_of == shard_of - 1:
                writer.flush()
        writer.flush()
        splits[split] = writer.shards
    remove(tmp_path)
    tokenizer.save(tmp_path)
    manifest = Manifest(VERSION, "<u2", 2000, tokenizer.fingerprint, "x", {}, [], splits)
    write_manifest(tmp_path, manifest)
    return tmp_path


def loader(folder, **options) -> DocumentLoader:
    return DocumentLoader(folder, "train", **{"batch_size": 1, "length": L, **options})


def epoch(reader: DocumentLoader) -> list:
    return [reader.next_batch() for _ in range(reader.n_windows)]


def test_an_epoch_has_every_token_as_a_target_once(folder, lengths, tokenizer):
    everything = np.concatenate(loader(folder)._tokens._shards)
    reader = loader(folder)
    for _ in range(2):
        targets = torch.cat([batch.targets for batch in epoch(reader)])
        assert Counter(targets[targets != -100].tolist()) == Counter(everything.tolist())
    assert (everything == tokenizer.eot).sum() == len(lengths)
    assert reader.filled == len(everything) / targets.numel()


def test_a_document_is_fed_from_its_end_of_text_to_its_last_token(folder, tokenizer):
    whole = 0
    for tokens, targets, positions in epoch(loader(folder)):
        known = targets[0] != -100
        starts = torch.nonzero(positions[0] == 0)[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], L], strict=True):
            part = slice(start, end)
            if not known[start]:
                assert (end, tokens[0, start]) == (start + 1, tokenizer.eot)
                continue
            assert known[part].all()
            assert positions[0, part].tolist() == list(range(end - start))
            assert torch.equal(tokens[0, part][1:], targets[0, part][:-1])
            first, last = tokens[0, start], targets[0, end - 1]
            whole += bool(first == tokenizer.eot and last == tokenizer.eot)
            if first != tokenizer.eot:  # the rest of a document that was cut
                assert targets[0, start] in (first + 1, tokenizer.eot)
            if last != tokenizer.eot:
                assert end - start == L  # only what fills a window is ever cut
    assert whole == 63  # all that are not longer than a window


def test_documents_are_numbered(folder):
    batch = loader(folder, batch_size=4).next_batch()
    for row, positions in zip(batch.documents, batch.positions, strict=True):
        steps = row.diff()
        assert row[0] == 0
        assert torch.equal(steps, (positions[1:] == 0).long())


def test_a_batch(folder):
    for x in loader(folder, batch_size=4).next_batch():
        assert (x.shape, x.dtype, x.is_contiguous()) == ((4, L), torch.int64, True)


def test_ranks_share_every_batch_and_may_change(folder):
    whole = loader(folder, batch_size=6)
    pairs = [loader(folder, batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(4):
        parts = [reader.next_batch() for reader in pairs]
        for i, expected in enumerate(whole.next_batch()):
            assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    state = json.loads(json.dumps(whole.state()))
    threes = [loader(folder, batch_size=2, rank=rank, world_size=3, seed=0) for rank in range(3)]
    for reader in threes:
        reader.load_state(state)
    for _ in range(30):
        parts = [reader.next_batch() for reader in threes]
        for i, expected in enumerate(whole.next_batch()):
            assert torch.equal(torch.cat([part[i] for part in parts]), expected)


def test_position_is_not_that_of_another_packing(folder):
    contiguous = TokenLoader(folder, "train", batch_size=1, length=L)
    with pytest.raises(DataError, match="cannot resume: the saved fingerprint is"):
        loader(folder).load_state(contiguous.state())
    with pytest.raises(DataError, match="the same data, packing, seed and length"):
        contiguous.load_state(loader(folder).state())


def test_fixed_batches_have_every_token(folder):
    reader = DocumentLoader(folder, "val", batch_size=3, length=L)
    first, second = ([*reader.fixed_batches(10**9)] for _ in range(2))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(first, second, strict=True))
    targets = torch.cat([batch.targets for batch in first])
    assert (targets != -100).sum() == reader.n_tokens
    assert sum(len(batch.tokens) for batch in reader.fixed_batches(3 * L + 1)) == 4


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack piece by piece, as the reference says, which leaves ties open but not their effect."""
    windows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(capacity - sum(w), i) for i, w in enumerate(windows)]
        fitting = [(room, i) for room, i in rooms if room >= length]
        if fitting:
            windows[min(fitting)[1]].append(length)
        else:
            windows.append([length])
    return windows


@settings(max_examples=300)
@given(st.integers(1, 24).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_packing_is_best_fit_decreasing(case):
    capacity, lengths = case
    windows = pack(np.array(lengths, dtype=np.int64), capacity)
    n = windows.max() + 1 if lengths else 0
    packed = [np.array(lengths)[windows == w].tolist() for w in range(n)]
    assert all(0 < sum(w) <= capacity for w in packed)
    assert sorted(map(sum, packed)) == sorted(map(sum, best_fit_decreasing(lengths, capacity)))
    _, first = np.unique(windows, return_index=True)
    assert (np.diff(first) > 0).all()


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 12))
def test_cutting(lengths, capacity):
    ends = np.cumsum(lengths)
    starts, stops = cut(ends, capacity)
    assert starts.tolist() == [0, *stops[:-1].tolist()]
    assert {*ends.tolist()} <= {*stops.tolist()}
    assert len(starts) == sum(-(-length // capacity) for length in lengths)
    assert ((stops - starts) >= 1).all()
    assert ((stops - starts) <= capacity).all()
