"""Every window comes once per epoch, on one rank, in an order that survives being interrupted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.data import DataError, DocumentLoader, Tokenizer, TokenLoader, prepare
from tritium.data.journal import remove
from tritium.data.shards import (
    MANIFEST_FILE,
    VERSION,
    Manifest,
    ShardWriter,
    open_prepared,
    write_manifest,
)
from tritium.data.tokens import _halves

N, L = 1003, 10
M = N // L


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """Shards in which every token is its own position: 1003 in train, 60 in val."""
    splits = {}
    for split, sizes in (("train", [400, 1, 5, 597]), ("val", [60])):
        writer = ShardWriter(tmp_path, split, "<u2")
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            writer.add(np.arange(end - size, end), np.array([size]), np.array([0]))
            writer.flush()
        splits[split] = writer.shards
    tokenizer.save(tmp_path)
    remove(tmp_path)
    manifest = Manifest(VERSION, "<u2", 2000, tokenizer.fingerprint, "numbers", {}, [], splits)
    write_manifest(tmp_path, manifest)
    return tmp_path


def loader(folder, split="train", **options) -> TokenLoader:
    return TokenLoader(folder, split, **{"batch_size": 4, "length": L, **options})


def rewrite(folder, change) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def first_tokens(reader, batches) -> list[int]:
    return [x for _ in range(batches) for x in reader.next_batch()[0][:, 0].tolist()]


def test_a_batch(folder):
    tokens, targets = loader(folder).next_batch()
    for x in (tokens, targets):
        assert (x.shape, x.dtype, x.is_contiguous()) == ((4, L), torch.int64, True)
    assert torch.equal(targets, (tokens + 1) % N)  # the split is a circle
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_an_epoch_has_every_window_once(folder):
    reader = loader(folder, batch_size=1)
    epochs = [first_tokens(reader, M) for _ in range(4)]
    for starts in epochs:
        covered = {(start + i) % N for start in starts for i in range(L)}
        assert len(covered) == M * L
    assert len({tuple(starts) for starts in epochs}) == 4
    assert len({tuple(start % L for start in sorted(starts)) for starts in epochs}) > 1


def test_a_batch_may_span_epochs(folder):
    ones, threes = loader(folder, batch_size=1), loader(folder, batch_size=3)
    assert first_tokens(threes, 2 * M) == first_tokens(ones, 6 * M)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(folder, world_size):
    whole = loader(folder, batch_size=4 * world_size)
    ranks = [loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2 * M // 4):
        parts = [rank.next_batch() for rank in ranks]
        for side, expected in enumerate(whole.next_batch()):
            assert torch.equal(torch.cat([part[side] for part in parts]), expected)
        assert all(rank.state() == whole.state() for rank in ranks)


def test_order_is_of_the_seed_alone(folder):
    assert first_tokens(loader(folder), 9) == first_tokens(loader(folder), 9)
    assert first_tokens(loader(folder), 9) != first_tokens(loader(folder, seed=1), 9)


def test_order_is_the_same_in_every_version(folder):
    """Pinned: a resumed run must see the windows it would have seen."""
    assert first_tokens(loader(folder, seed=7), 2) == [332, 362, 72, 752, 282, 652, 472, 712]


@pytest.mark.parametrize("done", [0, 1, 33, 34, 67])  # the 34th batch of 3 spans two epochs
def test_resumes_exactly(folder, done):
    reader = loader(folder, batch_size=3)
    first_tokens(reader, done)
    state = json.loads(json.dumps(reader.state()))
    resumed = loader(folder, batch_size=3)
    resumed.load_state(state)
    assert resumed.state() == state
    assert first_tokens(resumed, 40) == first_tokens(reader, 40)


def test_resumes_back_and_with_other_batches(folder):
    reader = loader(folder)
    state = reader.state()
    starts = first_tokens(reader, 60)
    reader.load_state(state)
    assert first_tokens(reader, 60) == starts
    other = loader(folder, batch_size=2, world_size=3, rank=1)
    other.load_state(state | {"windows": 13})
    assert first_tokens(other, 1) == starts[15:17]


def test_the_sequence_does_not_depend_on_how_many_ranks_read_on(folder):
    """One global batch of 12, read by one number of ranks after another, over two epochs."""
    whole, state = loader(folder, batch_size=12), None
    for world_size, batches in ((4, 5), (2, 4), (1, 3), (3, 2), (12, 2), (6, 1)):
        places = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
        ranks = [loader(folder, batch_size=12 // world_size, **place) for place in places]
        for rank in ranks:
            rank.load_state(state or rank.state())
        for _ in range(batches):
            read = torch.cat([rank.next_batch()[0] for rank in ranks])
            assert torch.equal(read, whole.next_batch()[0])
        state = json.loads(json.dumps(ranks[-1].state()))
        assert state == whole.state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "saved seed is 1, this run's is 0"),
        ({"length": 11}, "saved length is 11, this run's is 10"),
        ({"fingerprint": "beef"}, "saved fingerprint is beef"),
        ({"fingerprint": None}, "saved fingerprint is None"),
        ({"windows": -1}, "saved position is -1"),
        ({"windows": None}, "saved position is None"),
        ({"windows": 1.5}, "saved position is 1.5"),
    ],
    ids=str,
)
def test_refuses_another_state(folder, change, message):
    reader = loader(folder)
    with pytest.raises(DataError, match=f"cannot resume: the {message}"):
        reader.load_state(reader.state() | change)


def test_fingerprint_is_of_the_content(folder):
    train, val = loader(folder).fingerprint, loader(folder, "val").fingerprint
    rewrite(folder, lambda manifest: manifest["splits"]["train"][0].update(sha256="0"))
    assert len({train, val, loader(folder).fingerprint}) == 3
    assert loader(folder, "val").fingerprint == val


def test_fixed_batches_are_the_first_windows_in_order(folder):
    reader = loader(folder, "val")
    first_tokens(reader, 3)
    for _ in range(2):
        (a, a_next), (b, b_next) = reader.fixed_batches(50)
        assert torch.equal(torch.cat([a, b]), torch.arange(50).view(5, L))
        assert torch.equal(torch.cat([a_next, b_next]), torch.arange(1, 51).view(5, L))


@pytest.mark.parametrize(("n_tokens", "windows"), [(1, 1), (10, 1), (11, 2), (56, 5), (10**9, 5)])
def test_fixed_batches_stop_at_what_there_is(folder, n_tokens, windows):
    assert sum(len(x) for x, _ in loader(folder, "val").fixed_batches(n_tokens)) == windows


def test_fixed_batches_are_as_many_on_each_rank(folder):
    ranks = [loader(folder, "val", batch_size=1, rank=r, world_size=2) for r in range(2)]
    shares = [[x[0, 0].item() for x, _ in rank.fixed_batches(10**9)] for rank in ranks]
    assert shares == [[0, 20], [10, 30]]


@pytest.mark.parametrize(("n_tokens", "world_size"), [(100, 6), (0, 1), (-1, 1)])
def test_fixed_batches_refuse_a_rank_without_a_window(folder, n_tokens, world_size):
    message = f"5 windows of length 10 for {world_size} ranks, and n_tokens is {n_tokens}"
    with pytest.raises(DataError, match=message):
        loader(folder, "val", world_size=world_size).fixed_batches(n_tokens)


def test_counts_the_text_of_its_targets(text_file):
    prepared = prepare(text_file, vocab_size=300, progress=False)
    manifest, tokenizer = open_prepared(prepared).manifest, open_prepared(prepared).tokenizer
    (val,) = manifest.splits["val"]
    reader = TokenLoader(prepared, "val", batch_size=1, length=val.tokens - 1)
    ((tokens, targets),) = reader.fixed_batches(1)
    first = tokenizer.byte_lengths[tokens[0, 0]]
    assert tokenizer.byte_lengths[targets].sum() == val.bytes - first


def drop(name):
    return lambda folder: (folder / name).unlink()


def put(content):
    return lambda folder: (folder / MANIFEST_FILE).write_text(content)


def resize(by):
    def change(folder):
        content = (folder / "train-00000.bin").read_bytes() + b"\0"
        (folder / "train-00000.bin").write_bytes(content[: len(content) - 1 + by])

    return change


def in_manifest(**fields):
    return lambda folder: rewrite(folder, lambda manifest: manifest.update(fields))


def shard_named(name):
    return lambda folder: rewrite(
        folder, lambda manifest: manifest["splits"]["val"][0].update(file=name)
    )


def other_tokenizer(folder):
    Tokenizer.train(["another text"], 260).save(folder)


DAMAGES = [
    (drop("manifest.json"), r"manifest\.json: No such file or directory; run prepare first"),
    (put("{"), r"manifest\.json is damaged"),
    (put("[]"), r"manifest\.json is damaged: TypeError"),
    (in_manifest(version=1), "has version 1, this is 4; run prepare again"),
    (in_manifest(splits={}), r"manifest\.json is damaged: KeyError"),
    (in_manifest(splits={"train": [], "val": []}), r"damaged.*a split has no shard"),
    (in_manifest(extra=1), r"manifest\.json is damaged: TypeError.*extra"),
    (shard_named("../outside.bin"), r"damaged.*outside the folder"),
    (shard_named("/etc/hostname"), r"damaged.*is outside the folder"),
    (drop("train-00002.bin"), r"shard .*train-00002\.bin is missing; run prepare again"),
    (resize(-2), "has 798 bytes, its 400 tokens take 800; run prepare again"),
    (resize(-1), "has 799 bytes, its 400 tokens take 800"),
    (resize(+1), "has 801 bytes, its 400 tokens take 800"),
    (drop("tokenizer.json"), r"cannot read the tokenizer .*tokenizer\.json"),
    (other_tokenizer, r"shards were made with tokenizer \w+, the folder has \w+; run prepare"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_refuses_a_damaged_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        loader(folder)


def test_refuses_an_id_outside_the_vocabulary(folder):
    rewrite(folder, lambda manifest: manifest.update(vocab_size=1002))
    reader = loader(folder)
    with pytest.raises(DataError, match="holds the id 1002, the vocabulary has 1002"):
        first_tokens(reader, 26)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1003}, "train has 1003 tokens, a window of length 1003 takes 1004"),
        ({"batch_size": 101}, r"train has 100 windows of length 10, a batch takes 101; add text"),
        ({"batch_size": 51, "world_size": 2}, r"a batch takes 102 \(51 on each of 2 ranks\)"),
        ({"split": "val", "length": 60}, "val has 60 tokens, a window of length 60 takes 61"),
        ({"split": "test"}, "split must be one of"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"length": 0}, "must be at least 1"),
        ({"length": -1}, "must be at least 1"),
        ({"world_size": 0}, "must be at least 1"),
        ({"rank": 1}, r"rank in \[0, world_size\)"),
        ({"rank": -1}, r"rank in \[0, world_size\)"),
        ({"seed": -1}, "seed in"),
        ({"seed": 1 << 64}, "seed in"),
    ],
    ids=str,
)
def test_refuses_what_does_not_fit(folder, options, message):
    with pytest.raises(DataError, match=message):
        loader(folder, **options)


@pytest.mark.parametrize("options", [{"length": 1003}, {"batch_size": 101}], ids=str)
def test_a_short_text_is_named_by_its_source_and_what_to_lower_by_its_flag(folder, options):
    rewrite(folder, lambda manifest: manifest.update(source="book.txt"))
    with pytest.raises(
        DataError, match=r"^book\.txt: the split train has .* \(--.*train\.py\)$"
    ) as e:
        loader(folder, **options)
    assert str(folder) not in str(e.value)


def test_largest_fit(folder):
    assert loader(folder, batch_size=100).next_batch()[0].unique().numel() == 1000
    tokens, targets = loader(folder, batch_size=1, length=1002).next_batch()
    assert torch.equal(targets, (tokens + 1) % N)


def test_attributes(folder):
    reader = loader(folder)
    assert (reader.vocab_size, reader.n_tokens) == (2000, N)


@pytest.mark.parametrize("shard", ["train-00000.bin", "train-00003.bin"])
def test_a_flipped_bit_is_found_on_request(folder, shard):
    content = bytearray((folder / shard).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / shard).write_bytes(content)
    loader(folder)
    with pytest.raises(DataError, match=rf"the shard \S+{shard} is damaged: .*sha256.* again"):
        loader(folder, verify=True)
    loader(folder, "val", verify=True)


def test_whole_shards_pass(folder):
    reader = loader(folder, verify=True)
    assert first_tokens(reader, 3) == first_tokens(loader(folder), 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_halves_hold_each_document_once_and_are_balanced(sizes, least):
    """Documents of one more token each; every half has them whole, in their order."""
    documents = [np.r_[np.full(n, i + 1), 0] for i, n in enumerate(sizes)]
    ids = np.concatenate(documents)
    halves = _halves(ids, 0)
    choose, report = halves["choose"], halves["report"]
    assert len(choose) + len(report) == len(ids)
    assert abs(len(choose) - len(report)) <= max(map(len, documents))
    if len(sizes) > 1:
        for half in (choose, report):
            whole = [documents[i - 1] for i in dict.fromkeys(half.tolist()) if i]
            assert np.array_equal(half, np.concatenate(whole))
        assert not {*choose.tolist()} & {*report.tolist()} - {0}


def test_a_split_too_short_for_two_halves_is_read_whole(folder):
    loaders = {
        (length, half): TokenLoader(folder, "val", batch_size=1, length=length, half=half)
        for length in (29, 30)
        for half in ("choose", "report")
    }
    assert {k: x.n_tokens for k, x in loaders.items()} == {
        (29, "choose"): 30, (29, "report"): 30, (30, "choose"): 60, (30, "report"): 60,
    }  # fmt: skip
    first = next(loaders[29, "report"].fixed_batches(29))[0]
    assert first[0, 0] == 30  # of one document each half has a part


def test_part_of_a_document_is_packed_to_its_end(folder):
    """It has no end-of-text token where it was cut."""
    loader = DocumentLoader(folder, "val", batch_size=9, length=10, half="choose")
    ((_, targets, _),) = loader.fixed_batches(30)
    assert sorted(targets[targets >= 0].tolist()) == [*range(30)]
