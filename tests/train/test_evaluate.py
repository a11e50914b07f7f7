"""Prove that perplexity and bits per byte are those of every token in the window that holds it."""

import gzip
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.data import Tokenizer
from tritium.data.records import Tally, read_files
from tritium.model import ModelConfig, Transformer
from tritium.training.evaluate import main, nats_of
from tritium.training.multiple_choice import accuracy, read_questions

CONFIG = ModelConfig(vocab_size=23, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)


def build():
    torch.manual_seed(1)
    model = Transformer(CONFIG).eval()
    with torch.no_grad():  # as after training: a block that matters
        model.blocks[0].attention.output.weight.mul_(30)
    return model.double()


@torch.no_grad()
def one_by_one(model, ids, stride):
    """The losses of all ids but the first, each computed alone from what its window holds."""
    length, total = model.config.max_seq_len, 0.0
    for i in range(1, len(ids)):
        # Windows begin at the multiples of stride; the first one that reaches the token counts.
        window = max(0, math.ceil((i - length) / stride))
        before = ids[window * stride : i]
        logits = model(torch.tensor([before]))[0, -1]
        total -= logits.log_softmax(-1)[ids[i]].item()
    return total


@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 5))
def test_every_token_counts_once_with_the_context_of_its_window(length, stride, batch_size):
    model, ids = build(), torch.randint(23, (length,)).tolist()
    found = nats_of(model, ids, stride, batch_size)
    assert found == pytest.approx(one_by_one(model, ids, stride), rel=1e-5)


def test_a_run_is_measured_on_a_file(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "4") == 0
    run.output()
    text = "def f(x):\n    return {x: '\u00e9'}\n" * 20
    (tmp_path / "text.txt").write_text(text)
    main(tmp_path / "run", tmp_path / "text.txt", device="cpu", stride=16)
    printed = run.output()
    model, tokenizer = Transformer.load(tmp_path / "run"), Tokenizer.load(tmp_path / "run")
    ids = [tokenizer.eot, *tokenizer.encode(text)]
    nats = one_by_one(model, ids, 16)
    perplexity, bits = (
        float(re.search(pattern, printed)[1].replace(",", ""))
        for pattern in (r"perplexity ([\d.,]+)", r"([\d.]+) bits per byte")
    )
    assert perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-3)
    assert bits == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-3)
    for name, content in (
        ("utf16.txt", text.encode("utf-16")),
        ("crlf.txt", text.replace("\n", "\r\n").encode()),
        ("cr", text.replace("\n", "\r").encode()),
        ("text.txt.gz", gzip.compress(text.encode())),
        ("crlf.py.gz", gzip.compress(text.replace("\n", "\r\n").encode())),
    ):
        (tmp_path / name).write_bytes(content)
        main(tmp_path / "run", tmp_path / name, device="cpu", stride=16)
        assert printed.replace("text.txt", name) == run.output()
        (as_trained,) = read_files([tmp_path / name], "text", Tally(), cut=False)
        assert as_trained == text
    questions = tmp_path / "questions.jsonl"
    asked = [dict(ctx="def f(x):", endings=["return x", "{{{{ \u00e9"], label=0)] * 3
    questions.write_text("\n".join(map(json.dumps, asked)))
    main(tmp_path / "run", questions, device="cpu", multiple_choice=True)
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(gzip.compress(questions.read_bytes()))
    assert read_questions(packed) == read_questions(questions)
    found = accuracy(model, tokenizer, read_questions(questions))
    printed = run.output()
    assert f"{questions}: 3 questions, by chance 50.0%" in printed
    assert f"accuracy {found.plain:.1%} ± 0.0%, normalised by the bytes" in printed
    assert f"ending {found.normalised:.1%} ± 0.0%" in printed
    too_long = dict(ctx="", endings=["x", "{\u00e9" * 99], label=0)
    (tmp_path / "long.jsonl").write_text("\n" + json.dumps(too_long))
    with pytest.raises(ValueError, match=r"long\.jsonl, line 2: an ending must have at most 64"):
        main(tmp_path / "run", tmp_path / "long.jsonl", device="cpu", multiple_choice=True)
    with pytest.raises(ValueError, match="stride is of a text, and --multiple-choice of quest"):
        main(tmp_path / "run", questions, stride=3, multiple_choice=True)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff" * 9)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(text.encode())[:-20])
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4" + bytes(range(256)))
    for name, options, message in (
        ("empty.txt", {}, "empty.txt is empty; name a text"),
        ("bad.txt", {}, "cannot read .*bad.txt at byte 2: not UTF-8; name a text"),
        ("a.pdf", {}, "cannot read .*a.pdf: not text but a PDF; name a text"),
        ("cut.txt.gz", {}, "cannot read .*cut.txt.gz .*: damaged file; name a text"),
        ("questions.jsonl", {}, "questions.jsonl is a table of texts; name one text"),
        ("nowhere.txt", {}, "cannot read .*nowhere.txt: No such file"),
        ("text.txt", dict(stride=65), r"stride must be in \[1, 64\], the model's context, got 65"),
        ("text.txt", dict(batch_size=0), "batch_size must be at least 1, got 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            main(tmp_path / "run", tmp_path / name, device="cpu", **options)
