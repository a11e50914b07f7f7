"""Prove that the weights that are shown are those with which a model attends."""

from dataclasses import replace

import pytest
import torch
from families import LENGTH, configs, few
from hypothesis import given
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer, reversible
from tritium.model.attention import attend


def build(config):
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.double()


@given(configs(), st.integers(1, LENGTH), st.booleans())
@few
def test_weights_times_values_are_what_attention_returns(config, length, packed):
    model, tokens = build(config), torch.randint(config.vocab_size, (2, length))
    positions = torch.arange(length).expand(2, -1) % 3 if packed else None
    weights = model.attention_weights(tokens, positions)
    assert weights.shape == (config.n_layers, 2, config.n_heads, length, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]).double())
    for i, block in enumerate(model.blocks):
        seen = {}

        def keep(attention, inputs, _, seen=seen, shown=weights[i]):
            q, k, v = attention.heads(*inputs[:2])
            wide = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
            mask, cap = attention.mask(inputs[1]), config.attention_softcap
            seen["own"] = attend(q, k, v, mask, softcap=cap, by=config.attention)
            seen["shown"] = shown @ wide

        hook = block.attention.register_forward_hook(keep)
        model(tokens, positions=positions)
        hook.remove()
        torch.testing.assert_close(seen["shown"], seen["own"], rtol=1e-8, atol=1e-10)


def test_both_ways_to_attend_have_the_same_loss_and_gradients():
    config = ModelConfig(vocab_size=19, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2)
    tokens = torch.randint(19, (2, 11))
    found = []
    for attention in ("sdpa", "softmax"):
        model = build(replace(config, attention=attention))
        loss = model(tokens, tokens)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_weights_have_gradients_and_no_hook_stays():
    model = build(ModelConfig(vocab_size=19, n_layers=2, d_model=24, n_heads=4))
    weights = model.attention_weights(torch.randint(19, (1, 5)))
    (dw,) = torch.autograd.grad(weights.square().sum(), [model.embedding.weight])
    assert dw.abs().sum() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert not model.attention_weights(torch.randint(19, (1, 5))).requires_grad


@pytest.mark.parametrize("policy", ["selective", "full", "reversible"])
def test_gradients_of_weights_are_those_of_a_model_that_recomputes_nothing(policy, monkeypatch):
    two = policy == "reversible"
    config = ModelConfig(
        vocab_size=19, n_layers=2, d_model=24, n_heads=4, reversible=two, token_shift=True
    )
    model, tokens, found = build(config), torch.randint(19, (2, 7)), []
    factors = torch.randn(2, 2, 4, 7, 7).double()
    for recomputes in (False, True):
        monkeypatch.setattr(reversible, "sees_through", lambda ordinary=not recomputes: ordinary)
        if recomputes and not two:
            model.activation_checkpointing = policy
        weights = model.attention_weights(tokens)
        wanted = [*model.blocks.parameters(), model.embedding.weight]
        loss = (weights * factors).sum()
        found.append(torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True))
    torch.testing.assert_close(*found)
