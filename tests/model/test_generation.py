"""Prove that prompts of any lengths are continued as each is alone, and as transformers does."""

import pytest
import torch
from families import LENGTH, configs
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation import RepetitionPenaltyLogitsProcessor

from tritium.model import ModelConfig, Transformer
from tritium.model.sampling import sample, stream

CONFIG = ModelConfig(vocab_size=40, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=16)


def build(config, dtype=torch.float64):
    torch.manual_seed(1)
    model = Transformer(config).eval()
    with torch.no_grad():  # as after training: blocks that matter
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.to(dtype)


@given(configs(), st.lists(st.integers(1, LENGTH - 2), min_size=1, max_size=4), st.data())
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(config, lengths, data):
    model = build(config)
    prompts = [torch.randint(config.vocab_size, (n,)).tolist() for n in lengths]
    stops = data.draw(st.sets(st.integers(0, config.vocab_size - 1), max_size=3))
    penalty = data.draw(st.sampled_from([1.0, 1.3, 0.7]))
    options = dict(temperature=0, stop_tokens=sorted(stops), repetition_penalty=penalty)
    new = LENGTH - max(lengths)
    found = model.generate(prompts, new, **options)
    for prompt, row in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), new, **options)[0]
        assert torch.equal(row, alone)
        assert row.tolist()[: len(prompt)] == prompt


@given(configs(), st.integers(1, LENGTH - 1))
@torch.no_grad()
def test_the_cache_changes_no_token(config, length):
    model, tokens = build(config), torch.randint(config.vocab_size, (2, length))
    expected = tokens
    for _ in range(LENGTH - length):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), 1)
    assert torch.equal(model.generate(tokens, LENGTH - length, temperature=0), expected)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_ragged_rows_outlast_the_context(positions):
    model = build(ModelConfig(**{**vars(CONFIG), "positions": positions}))
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [*range(30)]]
    found = model.generate(prompts, 30, temperature=0)
    assert [len(row) for row in found] == [33, 42, 60]
    for row in found:  # of each the last 8 tokens are read again when 16 are reached
        assert row[-1] in row.new_tensor(
            [int(model(row[None, -n:-1])[0, -1].argmax()) for n in range(9, 17)]
        )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_tokens_are_those_of_transformers(kv_heads, penalty, tmp_path):
    config = ModelConfig(**{**vars(CONFIG), "n_kv_heads": kv_heads, "max_seq_len": 32})
    model = build(config, torch.float32)
    model.save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
    padded = torch.tensor([[0] * (8 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (8 - len(row)) + [1] * len(row) for row in prompts])
    found = model.generate(prompts, 20, temperature=0)
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    for row, prompt, theirs_row in zip(found, prompts, expected, strict=True):
        assert row[len(prompt) :].tolist() == theirs_row[8:].tolist()
    alone = torch.tensor(prompts[:1])
    found = model.generate(alone, 20, temperature=0, repetition_penalty=penalty)
    expected = theirs.generate(
        alone, attention_mask=torch.ones_like(alone), max_new_tokens=20, do_sample=False,
        repetition_penalty=penalty, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_the_penalty_is_that_of_ctrl():
    model, tokens = build(CONFIG), torch.tensor([[3, 3, 7]])
    logits = model(tokens)[:, -1]
    expected = RepetitionPenaltyLogitsProcessor(2.0)(tokens, logits)
    generator = torch.Generator().manual_seed(4)
    found = model.generate(tokens, 1, repetition_penalty=2.0, generator=generator)
    drawn = sample(expected, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found[:, -1:], drawn)
    assert not torch.equal(expected, logits)


def test_min_p_leaves_what_is_probable_enough():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    for min_p, kept in ((0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2]), (0.5, [0, 1]), (1.0, [0])):
        assert sample(logits, min_p=min_p).unique().tolist() == kept
    drawn = torch.bincount(sample(logits, min_p=0.5)[:, 0], minlength=4) / 4000
    torch.testing.assert_close(drawn[:2], torch.tensor([0.625, 0.375]), atol=0.03, rtol=0)


def test_a_seed_decides_the_text_and_the_global_generator_is_left_alone():
    model, prompts = build(CONFIG), [[1, 2, 3], [4]]
    before = torch.get_rng_state()
    first, again, other = (
        model.generate(prompts, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_is_no_longer_than_what_is_generated(monkeypatch):
    model, lengths = build(CONFIG), []
    make = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda n: lengths.append(n) or make(n))
    model.generate(torch.ones(1, 3, dtype=torch.long), 4)
    model.generate(torch.ones(1, 3, dtype=torch.long), 40)
    assert {*lengths[:1]} == {7}
    assert {*lengths[1:]} == {16}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[]], "at least one id, got .0. for number 0; an empty text begins with the end of text"),
        ([[1], [[2]]], "a prompt must be one row of at least one id"),
        ([[1, 40]], r"tokens must be in \[0, 40\), the model's vocabulary, got 40"),
        (torch.tensor([[1, -1]]), r"tokens must be in \[0, 40\), the model's vocabulary, got -1"),
        (torch.ones(1, 3), "tokens must be int64 or int32, got torch.float32"),
        ([[1.5]], "tokens must be int64 or int32, got torch.float32"),
        (torch.ones(3, dtype=torch.long), r"tokens must be \[B, L\] with L >= 1, got \[3\]"),
        (torch.ones(2, 0, dtype=torch.long), r"tokens must be \[B, L\] with L >= 1, got \[2, 0\]"),
    ],
)
def test_odd_prompts_are_refused_at_once(tokens, message):
    with pytest.raises(ValueError, match=message):
        stream(build(CONFIG), tokens, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(min_p=1.5), r"min_p must be in \[0, 1\], got 1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIG).generate([[1]], 2, **option)


def test_no_rows_and_no_tokens_come_back_as_they_are():
    model = build(CONFIG)
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert torch.equal(model.generate(empty, 5), empty)
    assert model.generate([], 5) == []
    (row,) = model.generate([[1, 2]], 0)
    assert row.tolist() == [1, 2]
    narrow = torch.ones(1, 2, dtype=torch.int32)
    assert model.generate(narrow, 2).shape == (1, 4)
