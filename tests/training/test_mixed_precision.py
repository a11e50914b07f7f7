"""Prove that `MixedPrecision` makes the gradients of autocast, bit for bit, and leaves nothing."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train
from tritium.kernels import runtime
from tritium.model import ModelConfig, Transformer
from tritium.training.mixed_precision import MixedPrecision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ModelConfig(vocab_size=50, n_layers=2, d_model=32, n_heads=2, max_seq_len=8)


@pytest.fixture(autouse=True, scope="module")
def no_interpreter():
    """Run the references, which are quick on a CPU: no kernel is proven here."""
    with mock.patch.object(runtime, "CPU_KERNELS", False):
        yield


def pair(**options):
    model = Transformer(CONFIG, **options).to(DEVICE)
    return model, copy.deepcopy(model)


def gradients(model, batch, size, cast):
    loss = train.accumulate_gradients(model, batch, size, cast)
    return [loss, *(p.grad for p in model.parameters())]


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@settings(max_examples=10)
@given(seed=st.integers(0, 99), rows=st.integers(1, 6), size=st.integers(1, 6), steps=st.booleans(),
       policy=st.sampled_from(["none", "full", "selective"]))  # fmt: skip
def test_gradients_are_those_of_autocast(seed, rows, size, steps, policy):
    torch.manual_seed(seed)
    own, usual = pair(activation_checkpointing=policy)
    cast = MixedPrecision(own)
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    for _ in range(1 + steps):
        batch = torch.randint(50, (2, rows, 8)).unbind()
        assert_equal(gradients(own, batch, size, cast), gradients(usual, batch, size, autocast))
        for model in (own, usual):
            for p in model.parameters():
                p.data.sub_(p.grad)
            model.zero_grad()


def test_adds_to_gradients_that_there_are():
    own, usual = pair()
    batch = torch.randint(50, (2, 4, 8)).unbind()
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    for _ in range(2):
        found = gradients(own, batch, 2, MixedPrecision(own))
        assert_equal(found, gradients(usual, batch, 2, autocast))


def test_a_frozen_weight_gets_no_gradient():
    own, usual = pair()
    for model in (own, usual):
        model.blocks[0].feed_forward.down.weight.requires_grad_(False)
        model.blocks[1].attention_norm.weight.requires_grad_(False)
    batch = torch.randint(50, (2, 2, 8)).unbind()
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    found = gradients(own, batch, 1, MixedPrecision(own))
    assert sum(x is None for x in found) == 2
    assert_equal(found, gradients(usual, batch, 1, autocast))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_nothing_behind(fails):
    model, usual = pair()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    cast = MixedPrecision(model)
    batch = torch.randint(50, (2, 2, 8)).unbind()
    if fails:
        with pytest.raises(ZeroDivisionError), cast:
            model(*(x.to(DEVICE) for x in batch)).backward() or 1 / 0
    else:
        gradients(model, batch, 1, cast)
    assert not torch.is_autocast_enabled(DEVICE)
    assert all(layer.narrow is None for layer in cast._layers)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert {name: x.shape for name, x in state.items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }
    model.zero_grad()
    # Outside, and in it again, the model trains as if nothing had been.
    loss = model(*(x.to(DEVICE) for x in batch))
    loss.backward()
    other = usual(*(x.to(DEVICE) for x in batch))
    other.backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in usual.parameters()])
    model.zero_grad(), usual.zero_grad()
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    assert_equal(gradients(model, batch, 1, cast), gradients(usual, batch, 1, autocast))


def test_weights_may_be_replaced_between_steps():
    own, usual = pair()
    cast = MixedPrecision(own)
    batch = torch.randint(50, (2, 2, 8)).unbind()
    gradients(own, batch, 1, cast), own.zero_grad()
    other = Transformer(CONFIG).state_dict()
    own.load_state_dict(other), usual.load_state_dict(other)
    autocast = torch.autocast(DEVICE, torch.bfloat16)
    assert_equal(gradients(own, batch, 1, cast), gradients(usual, batch, 1, autocast))


def test_in_evaluation_it_is_autocast():
    model, usual = pair()
    tokens = torch.randint(50, (2, 8), device=DEVICE)
    with torch.no_grad():
        with MixedPrecision(model):
            y = model.eval()(tokens)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(y, usual.eval()(tokens))
    assert isinstance(model.head, nn.Linear)


@settings(max_examples=5)
@given(seed=st.integers(0, 99), tied=st.booleans(), size=st.integers(1, 3))
def test_gradients_of_embeddings_are_added_where_kernels_run(seed, tied, size):
    """A table may be an output layer too; over micro-batches sums are those of autocast."""
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    own = Transformer(config).to(DEVICE)
    usual, batch = copy.deepcopy(own), torch.randint(50, (2, 3, 8)).unbind()
    with mock.patch.object(runtime, "CPU_KERNELS", True):
        found = gradients(own, batch, size, MixedPrecision(own))
        assert own.embedding.weight.grad is not None
        assert not own.embedding.into_grad
        expected = gradients(usual, batch, size, torch.autocast(DEVICE, torch.bfloat16))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
