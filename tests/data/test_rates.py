"""The benchmark of data runs, and measures the same work twice."""

from tritium.bench.runs import data as bench
from tritium.data import Tokenizer
from tritium.data.shards import open_prepared


def test_prints_every_rate(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "data.md")
    monkeypatch.setattr(bench, "BATCHES", 1)
    bench.main(mb=0.4, repeats=1, write=True)
    shown, written = capsys.readouterr().out, (tmp_path / "data.md").read_text()
    for text in (shown, written):
        assert text.count("encode_ordinary_batch") == text.count(" prepare ") == 2
        assert "TokenLoader, batch 32 × 1024" in text
        assert "--mb 0.4 --repeats 1 --write" in text


def test_prepare_encodes_what_the_other_encodes(tmp_path):
    texts = ["some text here"] * 50 + [f"other {i}" for i in range(50)]
    tokenizer = Tokenizer.train(texts, 300)
    tokenizer.save(tmp_path)
    [*bench._prepare_rows("a", texts, tokenizer, tmp_path, 1)]
    manifest = open_prepared(bench._prepare(tmp_path, "a", "0")).manifest
    tokens = sum(shard.tokens for shards in manifest.splits.values() for shard in shards)
    assert tokens == sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
