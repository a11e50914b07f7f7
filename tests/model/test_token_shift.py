"""Prove that keys and values take their share of the token before, and of no other."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.model.kv_cache import Cache, Cursor
from tritium.model.native import FormatError, model_type
from tritium.model.token_shift import TokenShift

CONFIG = ModelConfig(
    vocab_size=23, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=16,
    token_shift=True,
)  # fmt: skip
G, K = CONFIG.kv_heads, CONFIG.head_width


def build(**changes):
    torch.manual_seed(1)
    model = Transformer(replace(CONFIG, **changes)).double()
    with torch.no_grad():  # as after training: blocks that matter, and shares
        for block in model.blocks:
            block.attention.output.weight.mul_(20)
            if block.attention.token_shift is not None:
                block.attention.token_shift.weight.normal_()
    return model


def ids(*shape):
    return torch.randint(CONFIG.vocab_size, shape)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 3), st.booleans(), st.data())
def test_is_the_formula(rows, length, n_queries, documents, data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    shift = TokenShift(G, K)
    torch.nn.init.normal_(shift.weight)
    x = torch.randn(rows, length, n_queries + 2 * G, K).to(dtype).requires_grad_()
    follows = torch.rand(rows, length) < 0.6 if documents else None
    found = shift(x, follows)
    w = shift.weight.detach().double().view(2 * G, K)
    expected = x.detach().double()
    before = expected.clone()
    for b in range(rows):
        for t in range(1, length):
            if follows is None or follows[b, t]:
                expected[b, t, n_queries:] += w * before[b, t - 1, n_queries:]
    assert found.dtype == dtype
    error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=error)


def test_takes_nothing_at_first():
    # Then a model is the one without, and learns what to take from there.
    torch.manual_seed(1)
    model, tokens = Transformer(CONFIG), ids(2, 9)
    torch.manual_seed(1)
    without = Transformer(replace(CONFIG, token_shift=False))
    assert torch.equal(model(tokens), without(tokens))
    model(tokens, tokens).backward()
    for block in model.blocks:
        assert block.attention.token_shift.weight.grad.abs().min() > 0


@torch.no_grad()
def test_a_document_sees_none_before_it():
    model, tokens = build(), ids(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [5, 6, 0, 1, 2, 3, 4, 5, 6]])
    found = model(tokens, positions=positions)
    other = tokens.clone()
    other[0, :7] = (other[0, :7] + 1) % CONFIG.vocab_size
    assert torch.equal(model(other, positions=positions)[0, 7:], found[0, 7:])
    torch.testing.assert_close(found[0, 7:], model(tokens[:1, 7:])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 3])
def test_parts_behind_a_cache_are_one_pass(window):
    model, tokens = build(window=window), ids(3, 14)
    positions = torch.arange(14).expand(3, -1) - torch.tensor([[0], [2], [6]])
    positions = positions.clamp(min=0)  # padded rows
    expected = model.hidden(tokens, positions=positions)
    for cuts in ([1, 1, 1, 5, 1, 5], [8, 6], [14]):
        held, found, begin = model.new_cache(), [], 0
        for n in cuts:
            end = begin + n
            found.append(model.hidden(tokens[:, begin:end], held, positions[:, begin:end]))
            begin = end
        torch.testing.assert_close(torch.cat(found, 1), expected)
        last = held._layers[CONFIG.n_layers]
        assert last is not None
        assert last.keys.shape[1] <= max(4, max(cuts) + 1)  # of the last call, not of all


@torch.no_grad()
def test_a_step_with_its_place_on_the_device_is_one_more_token():
    # One row has no token of its own before: what is there is padding.
    model, tokens, begins = build(), ids(3, 9), torch.tensor([[0], [3], [7]])
    positions = torch.arange(9).expand(3, -1) - begins
    positions = positions.clamp(min=0)
    expected = model.hidden(tokens, positions=positions)
    for read in (7, 8):
        cache = model.new_cache(16, fixed=True)
        model.hidden(tokens[:, :read], cache, positions[:, :read])
        cursor = Cursor(cache, rows=True)
        cursor.seek(begins)
        for place in range(read, 9):
            found = model.next_hidden(tokens[:, place : place + 1], cursor)
            torch.testing.assert_close(found[:, 0], expected[:, place])
            cursor.advance()


def test_a_cache_of_another_model_is_refused():
    model = build()
    with pytest.raises(ValueError, match="the cache is of a model without token_shift; take one"):
        model.hidden(ids(1, 3), Cache(CONFIG.n_layers, 12))


def test_no_native_layout_holds_it():
    with pytest.raises(FormatError, match=r"except for token_shift=True \(it has False\)"):
        model_type(CONFIG)
