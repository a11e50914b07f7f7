"""Prove that a sequence read in parts, with a cache, gives what it gives when read at once."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.model.kv_cache import Cache

LENGTH = 12
CONFIG = ModelConfig(vocab_size=23, n_layers=2, d_model=16, n_heads=4, max_seq_len=LENGTH)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}


@cache
def model_of(
    kv_heads: int, dtype: torch.dtype, device: str, window=None, full_every=None, softcap=None,
    attention="sdpa", token_shift=False,
) -> Transformer:  # fmt: skip
    torch.manual_seed(1)
    config = replace(
        CONFIG, n_kv_heads=kv_heads, window=window, full_every=full_every,
        attention_softcap=softcap, attention=attention, token_shift=token_shift,
    )  # fmt: skip
    model = Transformer(config).to(device, dtype)
    with torch.no_grad():  # as after training: blocks that matter
        for block in model.blocks:
            block.attention.output.weight.mul_(20)
            if token_shift:
                block.attention.token_shift.weight.normal_()
    return model


def parts(length: int):
    """Ways to cut `length` tokens, as a list of lengths."""
    ends = st.sets(st.integers(1, length - 1)).map(sorted) if length > 1 else st.just([])
    return ends.map(lambda e: [b - a for a, b in zip([0, *e], [*e, length], strict=True)])


@st.composite
def readings(draw):
    length = draw(st.integers(1, LENGTH))
    rows = draw(st.integers(1, 3))
    documents = [draw(parts(length)) for _ in range(rows)]
    return (
        draw(parts(length)),
        [[i for n in row for i in range(n)] for row in documents],
        draw(st.booleans()),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from(sorted(TOLERANCE, key=str))),
        draw(st.lists(st.integers(0, 4), min_size=length, max_size=length)),
        draw(attentions()),
    )


def attentions():
    """Window, layers without it, softcap, the way to attend, and whether tokens are shifted."""
    windows = st.tuples(st.sampled_from([1, 2, 3, 5, 20]), st.sampled_from([None, 2]))
    return st.tuples(
        st.just((None, None)) | windows, st.sampled_from([None, 0.5]),
        st.sampled_from(["sdpa", "softmax"]), st.booleans(),
    ).map(lambda x: (*x[0], *x[1:]))  # fmt: skip


@given(readings())
@torch.no_grad()
def test_every_way_of_cutting_equals_one_pass(reading):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cuts, positions, packed, kv_heads, dtype, wrong, options = reading
    model = model_of(kv_heads, dtype, device, *options)
    positions = torch.tensor(positions, device=device)
    tokens = torch.randint(CONFIG.vocab_size, positions.shape, device=device)
    expected = model(tokens, positions=positions if packed else None)
    held, found = model.new_cache(), []
    for n, guesses in zip(cuts, wrong, strict=False):
        begin, end = held.length, held.length + n
        if guesses := min(guesses, LENGTH - begin):  # read and forgotten, as by a wrong guess
            guess = torch.zeros(len(tokens), guesses, dtype=torch.long, device=device)
            model.hidden(guess, held, guess if packed else None)
            held.truncate(begin)
        places = positions[:, begin:end] if packed else None
        found.append(model.logits(model.hidden(tokens[:, begin:end], held, places)))
    assert held.length == tokens.shape[1]
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@torch.no_grad()
def test_tokens_without_positions_continue_the_last_document(device):
    model = model_of(2, torch.float64, device)
    tokens = torch.randint(CONFIG.vocab_size, (2, 9), device=device)
    positions = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3, 4, 5]])
    held = model.new_cache()
    first = model.hidden(tokens[:, :4], held, positions[:, :4].to(device))
    both = torch.cat((first, model.hidden(tokens[:, 4:], held)), 1)
    torch.testing.assert_close(both, model.hidden(tokens, positions=positions.to(device)))
    late = model.new_cache()  # positions may come late: one document was read before them
    first = model.hidden(tokens[1:, :2], late)
    both = torch.cat((first, model.hidden(tokens[1:, 2:], late, positions[1:, 2:].to(device))), 1)
    torch.testing.assert_close(both, model.hidden(tokens[1:], positions=positions[1:].to(device)))


@torch.no_grad()
def test_a_cache_that_forgot_all_begins_anew(device):
    model = Transformer(replace(CONFIG, positions="learned")).to(device).double()
    tokens = torch.randint(CONFIG.vocab_size, (2, 9), device=device)
    held = model.new_cache()
    model.hidden(tokens, held, torch.arange(9, device=device).expand(2, -1) % 4)
    held.truncate(0)
    torch.testing.assert_close(model.hidden(tokens, held), model.hidden(tokens))


@torch.no_grad()
def test_keys_are_kept_as_wide_as_one_pass_has_them():
    model, tokens = model_of(4, torch.bfloat16, "cpu"), torch.randint(23, (1, 8))
    held = model.new_cache()
    model.hidden(tokens, held)
    keys, _ = held.append(0, *(torch.zeros(1, 1, 4, 4),) * 2)
    assert keys.dtype == torch.float32  # as attention is computed on a CPU


@torch.no_grad()
def test_a_window_forgets_what_no_token_sees(device):
    model = model_of(2, torch.float64, device, window=2, full_every=2)
    tokens = torch.randint(CONFIG.vocab_size, (1, LENGTH), device=device)
    held, one = model.new_cache(), model.new_cache()
    model.hidden(tokens[:, :7], held)
    for begin in range(LENGTH):
        model.hidden(tokens[:, begin : begin + 1], one)
    assert [layer.keys.shape[1] for layer in held._layers] == [7, LENGTH]  # what one call read
    assert [layer.keys.shape[1] for layer in one._layers] == [4, LENGTH]
    held.truncate(3)  # the tokens of the last call
    torch.testing.assert_close(model.hidden(tokens[:, 3:], held), model.hidden(tokens)[:, 3:])
    with pytest.raises(ValueError, match=r"length must be 0, or at least 10, .* before 9, got 9"):
        one.truncate(9)
    one.truncate(10)
    torch.testing.assert_close(model.hidden(tokens[:, 10:], one), model.hidden(tokens)[:, 10:])
    one.truncate(0)
    torch.testing.assert_close(model.hidden(tokens, one), model.hidden(tokens))


@torch.no_grad()
def test_a_shift_remembers_the_last_call_and_the_token_before_it(device):
    model = model_of(2, torch.float64, device, token_shift=True)
    tokens = torch.randint(CONFIG.vocab_size, (1, LENGTH), device=device)
    held, expected = model.new_cache(), model.hidden(tokens)
    for begin, end in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 9)):
        model.hidden(tokens[:, begin:end], held)
    with pytest.raises(ValueError, match=r"at least [45], as .* or a token shift has forgotten"):
        held.truncate(2)
    assert held.length == 9
    for length in (8, 5):  # of the last call
        held.truncate(length)
    torch.testing.assert_close(model.hidden(tokens[:, 5:], held), expected[:, 5:])
    held.truncate(0)
    torch.testing.assert_close(model.hidden(tokens, held), expected)


def test_refuses_what_would_be_read_wrongly(device):
    model, tokens = model_of(2, torch.float32, device), torch.zeros(3, 4, dtype=torch.long)
    tokens, held = tokens.to(device), model.new_cache()
    model.hidden(tokens, held)
    with pytest.raises(ValueError, match="the cache's number of rows, 3, got 1"):
        model.hidden(tokens[:1], held)
    with pytest.raises(ValueError, match=r"truncate: length must be in \[0, 4\], got 5"):
        held.truncate(5)
    small = Cache(2, 6)
    model.hidden(tokens, small)
    with pytest.raises(ValueError, match="the cache has room for 6 tokens, got 4 after 4"):
        model.hidden(tokens, small)
    with pytest.raises(ValueError, match="the cache is of 3 layers, the model has 2"):
        model.hidden(tokens, Cache(3, 12))
    with pytest.raises(ValueError, match="the cache is of a model without token_shift; take one"):
        model_of(2, torch.float32, device, token_shift=True).hidden(tokens, Cache(2, 12))
    model.hidden(tokens, held)
    model.hidden(tokens, held)
    with pytest.raises(ValueError, match="tokens reach position 16, but max_seq_len is 12"):
        model.hidden(tokens, held)


@given(
    cuts=st.lists(st.integers(1, 8), max_size=2),
    packed=st.booleans(),
    policy=st.sampled_from(["none", "selective", "full"]),
    reversible=st.booleans(),
    options=st.sampled_from([{}, dict(window=2, full_every=2), dict(positions="learned")]),
    token_shift=st.booleans(),
)
def test_gradients_flow_through_all_parts(cuts, packed, policy, reversible, options, token_shift):
    """They are those of all tokens at once, also where activations would be recomputed."""
    torch.manual_seed(0)
    config = replace(CONFIG, n_kv_heads=2, reversible=reversible, token_shift=token_shift)
    policy = "none" if reversible else policy
    model = Transformer(replace(config, **options), activation_checkpointing=policy).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    tokens, held = torch.randint(CONFIG.vocab_size, (2, 9)), model.new_cache()
    positions = torch.arange(9).expand(2, -1) % 5 if packed else None
    weight = torch.randn(2, 9, 1, dtype=torch.float64)
    weights = list(model.parameters())
    loss = (model.hidden(tokens, positions=positions).sin() * weight).sum()
    expected = torch.autograd.grad(loss, weights, allow_unused=True)
    ends = sorted({*cuts, 9})
    parts = [
        model.hidden(tokens[:, i:j], held, None if positions is None else positions[:, i:j])
        for i, j in pairwise([0, *ends])
    ]
    loss = (torch.cat(parts, 1).sin() * weight).sum()
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
