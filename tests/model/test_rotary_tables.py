"""Prove that no cast, move or copy of a model reaches its rotary tables."""

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from tritium.model import ModelConfig, Transformer

CONFIG = ModelConfig(vocab_size=23, n_layers=1, d_model=16, n_heads=2, max_seq_len=16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def trained():
    torch.manual_seed(1)
    return Transformer(CONFIG).to(DEVICE)


def exact_tables():
    j = torch.arange(CONFIG.head_width // 2, dtype=torch.float64)
    wavelengths = CONFIG.rope_theta ** (-2 * j / CONFIG.head_width)
    angles = torch.arange(CONFIG.max_seq_len, dtype=torch.float64)[:, None] * wavelengths
    return angles.cos().float(), angles.sin().float()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False, map_location=DEVICE)


def emptied(model):
    model = model.to("meta").to_empty(device=DEVICE)
    model.load_state_dict(trained().state_dict())
    return model


def assigned(model):
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model.load_state_dict(trained().state_dict(), assign=True)
    return model


def made_on_meta(model):
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model.to_empty(device=DEVICE).initialise()
    return model


def in_default_dtype(model):
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Transformer(CONFIG).to(DEVICE)
    finally:
        torch.set_default_dtype(torch.float32)


def made_in_inference_mode(model):
    with torch.inference_mode():
        other = Transformer(CONFIG).to(DEVICE)
    model._cos_LK, model._sin_LK = other.cos_LK, other.sin_LK
    return model


WAYS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(like)": lambda m: m.to(torch.zeros(1, dtype=torch.float16, device=DEVICE)),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "inside another": lambda m: nn.Sequential(m).bfloat16()[0],
    "cpu and back": lambda m: m.cpu().to(DEVICE),
    "meta and back": emptied,
    "made on meta": made_on_meta,
    "assigned": assigned,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_and_loaded,
    "default dtype": in_default_dtype,
    "inference mode": made_in_inference_mode,
    "train and eval": lambda m: m.eval().requires_grad_(False).requires_grad_(True).train(),
    "type": lambda m: m.type(torch.float32),
}


@given(st.lists(st.sampled_from(sorted(WAYS)), max_size=4))
def test_casts_and_moves_leave_the_angles_alone(ways):
    """And embedding and output layer the one weight that they are."""
    model = copy.deepcopy(trained())
    for way in ways:
        model = WAYS[way](model)
        assert model.head.weight is model.embedding.weight
    for table, exact in zip((model.cos_LK, model.sin_LK), exact_tables(), strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table.cpu(), exact)
    model(torch.zeros(1, 4, dtype=torch.long, device=DEVICE)).sum().backward()
    model = model.float()
    model.load_state_dict(trained().state_dict())
    tokens = torch.arange(16, device=DEVICE)[None]
    assert torch.equal(model(tokens, tokens), trained()(tokens, tokens))


def test_the_checkpoint_holds_weights_alone():
    assert trained().state_dict().keys() == dict(trained().named_parameters(
        remove_duplicate=False)).keys()  # fmt: skip


@pytest.mark.parametrize("device", ["meta", DEVICE])
def test_weights_brought_by_a_call_decide_where_the_angles_are(device):
    with torch.device(device):
        model = Transformer(CONFIG)
    tokens = torch.arange(16, device=DEVICE)[None]
    found = functional_call(model, dict(trained().named_parameters()), (tokens, tokens))
    assert torch.equal(found, trained()(tokens, tokens))


def test_a_model_without_memory_can_be_run():
    model = Transformer(CONFIG).to("meta")
    assert model(torch.zeros(2, 9, dtype=torch.long, device="meta")).shape == (2, 9, 23)


def test_tells_its_size_and_place():
    model = trained()
    assert model.num_parameters() == sum(p.numel() for p in {*model.parameters()})
    assert (model.device, model.dtype) == (model.head.weight.device, torch.float32)
    assert copy.deepcopy(model).bfloat16().dtype == torch.bfloat16
