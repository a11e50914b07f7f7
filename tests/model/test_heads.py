"""Prove that heads compute each sequence as if it were alone, with its gradients, and are saved."""

import pytest
import torch
import torch.nn.functional as F
from families import LENGTH, configs, few
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from transformers import AutoModelForSequenceClassification

from tritium.kernels.info_nce import info_nce_reference
from tritium.model import (
    Classifier,
    Embedder,
    ModelConfig,
    Regressor,
    Transformer,
    pad_sequences,
)

KINDS = "classifier", "regressor", "embedder", "embedder without a layer"
POOLINGS = "last", "mean"
CONFIG = ModelConfig(vocab_size=23, n_layers=1, d_model=16, n_heads=2, max_seq_len=12)


def build(kind, pooling, config=CONFIG, seed=1, dtype=torch.float64):
    torch.manual_seed(seed)
    transformer = Transformer(config)
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in transformer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    transformer.to(dtype)
    if kind == "classifier":
        return Classifier(transformer, 5, pooling=pooling)
    if kind == "regressor":
        return Regressor(transformer, 3, pooling=pooling)
    width = 7 if kind == "embedder" else None
    return Embedder(transformer, width, pooling=pooling, temperature=0.3)


@st.composite
def ragged(draw, vocab_size):
    lengths = draw(st.lists(st.integers(1, LENGTH), min_size=2, max_size=5))
    return [torch.randint(vocab_size, (n,)) for n in lengths]


def one_by_one(model, rows):
    """The head's output of each sequence, by plain formulas, from its hidden states alone."""
    h = [model.transformer.hidden(row[None])[0] for row in rows]
    x = torch.stack([y[-1] if model.pooling == "last" else y.sum(0) / len(y) for y in h])
    if isinstance(model.linear, torch.nn.Linear):
        x = x @ model.linear.weight.mT + (0 if model.linear.bias is None else model.linear.bias)
    return x / x.norm(dim=-1, keepdim=True) if isinstance(model, Embedder) else x


def losses(model, rows, outputs):
    """The loss of a batch, by the head and by plain formulas out of `outputs`."""
    tokens, lengths = pad_sequences(rows)
    if isinstance(model, Embedder):
        other = outputs.detach().roll(1, 0)
        plain = info_nce_reference(outputs, other, temperature=0.3, symmetric=True, normalize=False)
        return model.loss(model(tokens, lengths), other), plain
    if isinstance(model, Classifier):
        targets = torch.randint(5, (len(rows),))
        return model(tokens, targets, lengths), F.cross_entropy(outputs, targets)
    targets = torch.randn_like(outputs)
    return model(tokens, targets, lengths), (outputs - targets).square().mean()


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


@given(configs(), st.sampled_from(KINDS), st.sampled_from(POOLINGS), st.data())
@few
def test_outputs_losses_and_gradients_are_those_of_each_sequence_alone(config, kind, pooling, data):
    model, rows = build(kind, pooling, config), data.draw(ragged(config.vocab_size))
    outputs = one_by_one(model, rows)
    torch.testing.assert_close(model(*padded(model, rows)), outputs, rtol=1e-9, atol=1e-10)
    found, plain = losses(model, rows, outputs)
    torch.testing.assert_close(found, plain)
    wanted = gradients(model, plain)
    for name, x in gradients(model, found).items():
        torch.testing.assert_close(x, wanted[name], rtol=1e-7, atol=1e-9, msg=name)


def padded(model, rows):
    return arguments(model, *pad_sequences(rows))


def arguments(model, tokens, lengths):
    return (tokens, lengths) if isinstance(model, Embedder) else (tokens, None, lengths)


@given(st.sampled_from(KINDS), st.sampled_from(POOLINGS), st.data())
@few
def test_padding_changes_no_bit_and_gets_no_gradient(kind, pooling, data):
    model, rows = build(kind, pooling, dtype=torch.float32), data.draw(ragged(11))
    tokens, lengths = pad_sequences(rows)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    other = torch.where(padding, torch.randint(11, 23, tokens.shape), tokens)
    weights, present = torch.linspace(1, 2, len(rows))[:, None], torch.cat(rows).unique()
    found = []
    for ids in (tokens, other):
        outputs = model(*arguments(model, ids, lengths))
        found.append(gradients(model, (outputs * weights).square().sum()) | {"outputs": outputs})
        embedding = found[-1].pop("transformer.embedding.weight")
        found[-1]["embedding"] = embedding[present]
        absent = torch.ones(23, dtype=torch.bool).index_fill(0, present, False)
        assert not embedding[absent].any()
    for name, x in found[0].items():
        torch.testing.assert_close(x, found[1][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_errs_as_little_as_the_model(kind, dtype):
    """The rounding of pooling and head is small beside that of the hidden states."""
    for pooling in POOLINGS:
        model = build(kind, pooling, dtype=dtype)
        exact = build(kind, pooling)
        exact.load_state_dict(model.state_dict())
        given = padded(model, [torch.randint(23, (n,)) for n in (12, 1, 5, 7)])
        x, y = model(*given), exact(*given)
        assert x.dtype == (torch.float32 if isinstance(model, Embedder) else dtype)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_a_full_batch_needs_no_lengths():
    tokens, full = torch.randint(23, (4, 9)), torch.full((4,), 9)
    for kind in KINDS:
        for pooling in POOLINGS:
            model = build(kind, pooling)
            expected = model(*arguments(model, tokens, full))
            torch.testing.assert_close(model(tokens), expected)
            torch.testing.assert_close(model(tokens.int(), lengths=full.int()), expected)


def test_a_frozen_model_trains_its_head_alone():
    model = build("classifier", "mean")
    model.transformer.requires_grad_(False)
    model(torch.randint(23, (3, 5)), torch.tensor([0, 4, -100])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "linear.weight", "linear.bias",
    }  # fmt: skip


def test_a_temperature_can_be_learned():
    model = build("embedder", "last")
    model.temperature = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    assert "temperature" in dict(model.named_parameters())
    x, y = (model(torch.randint(23, (4, 6))) for _ in range(2))
    (found,) = torch.autograd.grad(model.loss(x, y), model.temperature)
    step = 1e-6
    up, down = (
        info_nce_reference(x, y, temperature=0.3 + e, symmetric=True) for e in (step, -step)
    )
    torch.testing.assert_close(found, (up - down).detach() / (2 * step), rtol=1e-6, atol=1e-9)


def test_pairs_of_one_class_are_no_negatives():
    model = build("embedder", "last")
    x, y = (model(torch.randint(23, (4, 6))) for _ in range(2))
    negatives = torch.rand(4, 4) > 0.5
    expected = info_nce_reference(x, y, temperature=0.3, symmetric=True, negatives=negatives)
    torch.testing.assert_close(model.loss(x, y, negatives=negatives), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    """By PyTorch and by safetensors, tied weights once; nothing is missing, nothing left over."""
    for tied in (True, False):
        config = ModelConfig(**vars(CONFIG) | dict(tie_embeddings=tied))
        model = build(kind, "mean", config, dtype=torch.float32)
        given = padded(model, [[1, 2, 3], [4, 5, 6, 7, 8]])
        torch.save(model.state_dict(), tmp_path / "head.pt")
        save_model(model, str(tmp_path / "head.safetensors"))
        for load in (
            lambda other: other.load_state_dict(torch.load(tmp_path / "head.pt")),
            lambda other: load_model(other, str(tmp_path / "head.safetensors")),
        ):
            other = build(kind, "mean", config, seed=2, dtype=torch.float32)
            assert not torch.equal(other(*given), model(*given))
            load(other)
            assert torch.equal(other(*given), model(*given))


@pytest.mark.parametrize(
    "changes",
    [
        {}, dict(qk_norm=False, n_kv_heads=1, tie_embeddings=False),
        dict(qk_norm=False, positions="learned", norm="layer", activation="gelu", bias=True),
    ],
)  # fmt: skip
def test_a_classifier_is_that_of_transformers(changes, tmp_path):
    config = ModelConfig(**vars(CONFIG) | changes)
    model = build("classifier", "last", config, dtype=torch.float32)
    model.linear.bias = None
    model.transformer.save_pretrained(tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=5, pad_token_id=0
    ).eval()
    theirs.score.load_state_dict(model.linear.state_dict())
    tokens, lengths = pad_sequences([[1, 2, 3], [4, 5, 6, 7, 8]])
    attended = torch.arange(5) < lengths[:, None]
    expected = theirs(tokens, attention_mask=attended.long()).logits
    torch.testing.assert_close(model(tokens, lengths=lengths), expected, rtol=1e-4, atol=1e-5)


def test_compiles_in_one_graph():
    torch.compiler.reset()
    for kind in ("classifier", "embedder"):
        model = build(kind, "mean", dtype=torch.float32)
        given = padded(model, [[1, 2, 3], [4, 5, 6, 7, 8]])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), model(*given))
    torch.compiler.reset()


@given(st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=9), min_size=1, max_size=5))
@settings(max_examples=30)
def test_padded_rows_are_the_sequences(rows):
    tokens, lengths = pad_sequences(rows)
    assert tokens.dtype == torch.int64
    assert [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)] == rows
    mixed = [torch.tensor(row, dtype=torch.int32) if len(row) % 2 else row for row in rows]
    again = pad_sequences(mixed)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], lengths)


TOKENS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: pad_sequences([]), "there must be at least one sequence, got none"),
        (lambda t: pad_sequences([[1], []]), r"one row of at least one id, got \[0\] .* number 1"),
        (lambda t: pad_sequences([torch.zeros(0).long()]), r"got \[0\] in torch.int64"),
        (lambda t: pad_sequences([[0.5]]), r"got \[1\] in torch.float32 for number 0"),
        (lambda t: pad_sequences([torch.zeros(1, 2).long()]), r"got \[1, 2\] in torch.int64"),
        (lambda t: Classifier(t, 0), "Classifier: num_classes must be a whole number .*, got 0"),
        (lambda t: Classifier(t, 2.0), r"num_classes must be a whole number .*, got 2\.0"),
        (lambda t: Regressor(t, -1), "Regressor: out_features must be .*, got -1"),
        (lambda t: Embedder(t, True), "Embedder: out_features must be .*, got True"),
        (
            lambda t: Classifier(t, 2, pooling="max"),
            "Classifier: pooling must be one of last, mean, got 'max'",
        ),
        (lambda t: Classifier(t, 2)(TOKENS[:, :0]), r"L of at least 1, got \[2, 0\]"),
        (lambda t: Classifier(t, 2)(TOKENS[0]), r"tokens must be \[B, L\] ids"),
        (
            lambda t: Embedder(t)(TOKENS, torch.tensor([0, 5])),
            r"Embedder: lengths must be in \[1, 5\], the ids of a row, got 0; leave empty",
        ),
        (lambda t: Embedder(t)(TOKENS, torch.tensor([3, 6])), r"in \[1, 5\], .*, got 6"),
        (lambda t: Embedder(t)(TOKENS, torch.tensor([3])), r"\[2\] in int64 or int32, got \[1\]"),
        (lambda t: Embedder(t)(TOKENS, torch.ones(2)), r"got \[2\] in torch.float32"),
        (
            lambda t: Embedder(t)(TOKENS, torch.ones(2, dtype=torch.long, device="meta")),
            "lengths must be on the device of tokens, cpu, got meta; move them",
        ),
        (
            lambda t: Regressor(t)(TOKENS, torch.zeros(2)),
            r"targets must be \[B, out_features\], \[2, 1\], got \[2\]; reshape them",
        ),
        (lambda t: Classifier(t, 2)(TOKENS, torch.zeros(3).long()), r"must have shape \[2\]"),
        (lambda t: Classifier(t, 2)(torch.zeros(1, 13).long()), "max_seq_len is 12"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(Transformer(CONFIG))
