"""Prove which parameter gets which update, and that an option reaches its optimizer or nobody."""

import pytest

from tritium.model import ModelConfig, Transformer
from tritium.training.optim import OPTIMIZERS, OptimizerConfig, parameter_groups

CONFIG = ModelConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=16)


@pytest.mark.parametrize("tie", [True, False])
def test_decays_matrices_only(tie):
    model = Transformer(ModelConfig(**{**vars(CONFIG), "tie_embeddings": tie}))
    named = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    names = {kind: {named[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert names["embeddings"] == {"embedding.weight"}
    assert names["norms and biases"] == {name for name in named.values() if "norm" in name}
    assert names["matrices"] == {*named.values()} - names["embeddings"] - names["norms and biases"]
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"matrices": 0.1, "embeddings": 0.0, "norms and biases": 0.0}


def test_leaves_frozen_parameters_out():
    model = Transformer(CONFIG)
    model.embedding.weight.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(model, 0.1)] == [
        "matrices", "norms and biases",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_makes_every_optimizer_of_the_library(name):
    optimizer = OptimizerConfig(name=name, weight_decay=0.3, max_grad_norm=2.0).make(
        Transformer(CONFIG)
    )
    assert type(optimizer) is OPTIMIZERS[name]
    assert optimizer.max_grad_norm == 2.0
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("adamw", {}, {"betas": (0.9, 0.95), "eps": 1e-8}),
        ("adam", {"beta2": 0.99, "eps": 1e-6}, {"betas": (0.9, 0.99), "eps": 1e-6}),
        ("lion", {"beta1": 0.8}, {"betas": (0.8, 0.99)}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"alpha": 0.5, "centered": True}, {"alpha": 0.5, "centered": True}),
        ("adagrad", {"initial_accumulator_value": 0.1}, {"initial_accumulator_value": 0.1}),
    ],
)  # fmt: skip
def test_options_reach_the_optimizer(name, given, expected):
    for group in OptimizerConfig(name=name, **given).make(Transformer(CONFIG)).param_groups:
        assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="sgd", beta1=0.8), "sgd has no beta1"),
        (dict(name="lion", eps=1e-8), "lion has no eps"),
        (dict(momentum=0.9), "adamw has no momentum"),
        (dict(beta1=1.0), "must"),
        (dict(name="sgd", nesterov=True), "nesterov must have momentum"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive"),
    ],
)
def test_refuses_options_that_nobody_takes(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options).check()
