"""Prove that documents packed into a window learn as each would alone."""

import pytest
import torch
import torch.nn.functional as F

from tritium.model import ModelConfig, Transformer
from tritium.model.attention import attend, document_mask, document_numbers

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
    mask = document_mask(document_numbers(positions), 16)
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
