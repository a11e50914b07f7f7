"""Prove that the first weights have the deviations that their sources state."""

from dataclasses import replace

import pytest
import torch

from tritium.model import ModelConfig, Transformer

D, DEPTH = 128, 8
CONFIG = ModelConfig(
    vocab_size=4000, n_layers=DEPTH, d_model=D, n_heads=4, d_ff=512, max_seq_len=400,
    positions="learned", activation="gelu", bias=True, tie_embeddings=False,
)  # fmt: skip
NEAR = dict(inner=0.5 / D**0.5, head=0.5 / D**0.5, place=0.02, token=0.02)
DEVIATIONS = {
    "near_identity": NEAR | dict(output=0.5 / D**0.5 / 40, down=0.5 / 512**0.5 / 40),
    "gpt2": dict(inner=0.02, head=0.02, output=0.005, down=0.005, place=0.01, token=0.02),
    "small": dict.fromkeys(("inner", "head", "place", "token"), (2 / 5 / D) ** 0.5)
    | dict.fromkeys(("output", "down"), 2 / DEPTH / D**0.5),
    "zero": NEAR | dict(output=0, down=0),
}


@pytest.mark.parametrize("kind", DEVIATIONS)
def test_deviations_are_those_of_the_sources(kind):
    torch.manual_seed(1)
    model, wanted = Transformer(replace(CONFIG, initialisation=kind)), DEVIATIONS[kind]
    found = {
        "head": [model.head], "token": [model.embedding], "place": [model.position_embedding],
        "output": [block.attention.output for block in model.blocks],
        "down": [block.feed_forward.down for block in model.blocks],
        "inner": [layer for block in model.blocks
                  for layer in (block.attention.query_key_value, block.feed_forward.up)],
    }  # fmt: skip
    for name, layers in found.items():
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        assert weights.std().item() == pytest.approx(wanted[name], rel=0.02), name
        assert abs(weights.mean().item()) <= 0.02 * wanted[name]
        for layer in layers:
            assert getattr(layer, "bias", None) is None or not layer.bias.any()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, name.endswith("weight")))


@pytest.mark.parametrize("gain", [1.0, 1.75])
def test_norms_of_queries_and_keys_begin_at_their_gain_and_no_other_does(gain):
    model = Transformer(replace(CONFIG, positions="rope", qk_gain=gain))
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            of_heads = name.endswith(("query_norm.weight", "key_norm.weight"))
            assert torch.equal(p, torch.full_like(p, gain if of_heads else 1.0)), name
    without = Transformer(replace(CONFIG, positions="rope", qk_norm=False, qk_gain=gain))
    assert not any("query_norm" in name or "key_norm" in name for name in without.state_dict())


@pytest.mark.parametrize("kind", DEVIATIONS)
def test_an_embedding_that_is_the_output_layer_is_drawn_as_one(kind):
    torch.manual_seed(1)
    model = Transformer(replace(CONFIG, initialisation=kind, tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.std().item() == pytest.approx(DEVIATIONS[kind]["token"], rel=0.02)
