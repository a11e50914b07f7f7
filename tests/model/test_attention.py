"""Prove that attention sees what its masks say, and that packed documents learn as each alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tritium.model import ModelConfig, Transformer
from tritium.model import attention as attention_module
from tritium.model import masks as masks_module
from tritium.model.attention import attend, attention_weights
from tritium.model.masks import block_mask, dense_mask, document_numbers, make_masks

CONFIG = ModelConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=16)
LENGTHS = [[5, 1, 7, 3], [16], [1, 15]]


def windows(device, lengths):
    tokens, targets = (torch.randint(40, (len(lengths), 16), device=device) for _ in range(2))
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return tokens, targets, torch.stack(positions).to(device)


def gradients(model, total):
    return torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("policy", ["none", "full"])
def test_packed_documents_equal_each_alone(device, policy):
    model = Transformer(CONFIG, activation_checkpointing=policy).to(device)
    tokens, targets, positions = windows(device, LENGTHS)
    targets[0, 2] = -100
    packed = model(tokens, targets, positions)
    alone, counted = torch.zeros((), device=device), (targets >= 0).sum()
    for row, lengths in enumerate(LENGTHS):
        documents = zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
        for ids, following in documents:
            share = (following >= 0).sum() / counted
            alone = alone + model(ids[None], following[None]) * share
    torch.testing.assert_close(packed, alone)
    for actual, expected in zip(gradients(model, packed), gradients(model, alone), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_document_does_not_see_the_one_before_it(device):
    model = Transformer(CONFIG).to(device)
    tokens, _, positions = windows(device, [[6, 10]])
    changed = tokens.clone()
    changed[0, :6] = (changed[0, :6] + 1) % 40
    before, after = (model(x, positions=positions) for x in (tokens, changed))
    torch.testing.assert_close(before[:, 6:], after[:, 6:])
    assert not torch.allclose(model(tokens)[:, 6:], model(changed)[:, 6:], atol=1e-3)


def test_one_document_is_causal(device):
    q, k, v = (torch.randn(2, 3, 16, 8, device=device) for _ in range(3))
    positions = torch.arange(16, device=device).expand(2, -1)
    mask = dense_mask(16, 16, q.device, document_numbers(positions))
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, None))


def test_bfloat16_on_a_cpu_is_attended_in_float32(monkeypatch):
    dtypes, sdpa = [], F.scaled_dot_product_attention

    def recording(q, k, v, *others, **options):
        dtypes.append((q.dtype, k.dtype, v.dtype))
        return sdpa(q, k, v, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    tokens = torch.randint(40, (2, 9))
    wide = Transformer(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        wide(tokens, tokens)
    narrow = Transformer(CONFIG).bfloat16()
    assert narrow(tokens).dtype == torch.bfloat16
    assert narrow.generate(tokens, 3).shape == (2, 12)
    assert {*dtypes} == {(torch.float32,) * 3}


def test_packed_documents_compile(device):
    model = Transformer(CONFIG).to(device)
    inputs = windows(device, LENGTHS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def documents(draw, rows, length):
    """Positions of tokens in random documents, or None."""
    begins = st.lists(st.booleans(), min_size=length, max_size=length)
    if not draw(st.booleans()):
        return None
    rows = [[True, *draw(begins)[1:]] for _ in range(rows)]
    return torch.tensor([[i - max(j for j in range(i + 1) if row[j]) for i in range(length)]
                         for row in rows])  # fmt: skip


def seen(positions, L, S, window):
    """The visible pairs, `[B, L, S]`, one by one."""
    number = torch.zeros(1, S) if positions is None else document_numbers(positions)
    return torch.tensor([
        [[j <= i and row[i] == row[j] and i - j < (window or S) for j in range(S)]
         for i in range(S - L, S)]
        for row in number.tolist()
    ])  # fmt: skip


@st.composite
def attentions(draw):
    S = draw(st.integers(1, 9))
    options = dict(
        n_heads=draw(st.sampled_from([2, 4])), window=draw(st.sampled_from([None, 1, 2, 4, 20])),
        attention_softcap=draw(st.sampled_from([None, 0.5])),
        attention=draw(st.sampled_from(["sdpa", "softmax"])),
    )  # fmt: skip
    config = replace(CONFIG, **options, n_kv_heads=draw(st.sampled_from([1, 2])))
    return config, draw(st.integers(1, S)), S, documents(draw, 2, S)


@given(attentions())
def test_attention_is_that_of_the_formula(case):
    config, L, S, positions = case
    H, G, K, cap = config.n_heads, config.kv_heads, 6, config.attention_softcap
    q, k, v = (
        torch.randn(2, heads, n, K, dtype=torch.float64, requires_grad=True)
        for heads, n in ((H, L), (G, S), (G, S))
    )
    masks = make_masks(config, L, S, positions, q)
    kinds = [(masks.full, None), (masks.windowed, config.window)]
    for mask, window in kinds[: 1 if config.window is None else 2]:
        visible = S if window is None else min(S, L + window - 1)  # as a cache returns them
        behind = slice(S - visible, S)
        found = attend(q, k[:, :, behind], v[:, :, behind], mask, softcap=cap, by=config.attention)
        wide = [x.repeat_interleave(H // G, 1) for x in (k, v)]
        scores = torch.einsum("bhlk,bhsk->bhls", q, wide[0]) / K**0.5
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        p = scores.masked_fill(~seen(positions, L, S, window).unsqueeze(1), -torch.inf).softmax(-1)
        expected = p @ wide[1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        weights = attention_weights(q, k[:, :, behind], mask, cap)
        torch.testing.assert_close(weights, p[..., behind], rtol=1e-9, atol=1e-11)
        pull = torch.randn_like(found)
        dense, own = (torch.autograd.grad(y, (q, k, v), pull) for y in (expected, found))
        for x, y in zip(own, dense, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@given(st.data(), st.integers(1, 40), st.sampled_from([4, 8, 16]))
@settings(max_examples=25)  # torch maps a function over every pair
def test_blocks_are_those_in_which_something_is_seen(data, L, size):
    positions = documents(data.draw, 2, L)
    window = data.draw(st.sampled_from([None, 1, 3, 4, 9, 50]))
    number = None if positions is None else document_numbers(positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks_module, "BLOCK", size)
        found = block_mask(L, L, torch.device("cpu"), number, window)
    rows = 1 if number is None else 2
    expected = create_block_mask(found.mask_mod, rows, 1, L, L, "cpu", size)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.seq_lengths == expected.seq_lengths
    pair = torch.meshgrid(*(torch.arange(n) for n in (rows, L, L)), indexing="ij")
    b, i, j = pair
    same = found.mask_mod(b, 0, i, j) == seen(positions, L, L, window).expand(rows, L, L)
    assert same.all()


@pytest.mark.parametrize(
    ("begins", "window", "softcap"), [([0, 4, 5], None, 0.5), ([0], 3, None), ([0, 7], 4, 2.0)]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(begins, window, softcap, monkeypatch):
    monkeypatch.setattr(masks_module, "BLOCK", 4)
    monkeypatch.setattr(attention_module, "_flex_attention", lambda _: flex_attention)
    # It has gradients on a CPU too, and refuses them there.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    qkv = [torch.randn(2, n, 10, 16, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    numbers = torch.isin(torch.arange(10), torch.tensor(begins)).cumsum(0).repeat(2, 1)
    numbers = None if len(begins) == 1 else numbers
    outputs = []
    for make in (block_mask, dense_mask):
        y = attend(*qkv, make(10, 10, torch.device("cpu"), numbers, window), softcap=softcap)
        pull = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        outputs.append([y, *torch.autograd.grad(y, qkv, pull)])
    for x, y in zip(*outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "none"), (dict(packed=True), "blocks"), (dict(window=9), "blocks"),
        (dict(attention_softcap=2.0), "blocks"), (dict(window=9, attention="softmax"), "dense"),
        (dict(window=9, d_head=8), "dense"), (dict(window=9, dtype=torch.float64), "dense"),
        (dict(window=9, L=127, S=127), "dense"), (dict(window=9, L=128, S=140), "dense"),
    ],
)  # fmt: skip
def test_blocks_are_chosen_where_a_dense_mask_would_be_large(changes, kind):
    class OnGPU:  # a tensor's place and dtype are all that is asked for
        device, dtype = torch.device("cuda"), changes.pop("dtype", torch.bfloat16)

    packed, L, S = changes.pop("packed", False), changes.pop("L", 128), changes.pop("S", 128)
    config = replace(CONFIG, **dict(d_head=16) | changes)
    numbers = torch.zeros(1, S) if packed else None
    found = masks_module._in_blocks(config, L, S, numbers, OnGPU())
    assert found == (kind == "blocks")
