"""Prove which parameter gets which update, and that an option reaches its optimizer or nobody."""

import pytest

from tritium.model import ModelConfig, Transformer
from tritium.training.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    muon_groups,
    parameter_groups,
    set_rate,
)

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


@pytest.mark.parametrize("tie", [True, False])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(tie):
    model = Transformer(ModelConfig(**{**vars(CONFIG), "tie_embeddings": tie}))
    model.blocks[0].feed_forward.down.weight.requires_grad_(False)
    named = {id(p): name for name, p in model.named_parameters()}
    groups = muon_groups(model, 0.1, 20.0)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )
    found = {
        named[id(p)].removesuffix(".weight"): (group.get("use_muon", True), group.get("splits"))
        for group in groups for p in group["params"]
    }  # fmt: skip
    F = CONFIG.feed_forward_width
    assert found == {
        name.removesuffix(".weight"): (
            name.startswith("blocks") and "norm" not in name,
            (32, 16, 16) if "query_key_value" in name else (F, F) if "gate_up" in name else None,
        )
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    scales = {bool(group.get("use_muon", True)): group.get("lr_scale") for group in groups}
    assert scales == {True: 20.0, False: None}


def test_muon_has_a_learning_rate_of_its_own():
    config = OptimizerConfig(name="muon", muon_learning_rate=0.02)
    optimizer = config.make(Transformer(CONFIG), learning_rate=0.004)
    set_rate(optimizer, 0.001)
    rates = {bool(group["use_muon"]): group["lr"] for group in optimizer.param_groups}
    assert rates == {True: pytest.approx(0.005), False: 0.001}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_predicts_the_bytes_of_the_state(name):
    model, config = Transformer(CONFIG), OptimizerConfig(name=name)
    if name == "muon":
        config = OptimizerConfig(name=name, row_beta2=0.9)
    optimizer = config.make(model)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert config.state_bytes(model) == held


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
        ("muon", {}, {"ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw",
                      "betas": (0.9, 0.95), "adamw_eps": 1e-8, "beta2": None}),
        ("muon", {"eps": 1e-6, "row_beta2": 0.9, "ns_steps": 3, "momentum": 0.8, "nesterov": False},
         {"adamw_eps": 1e-6, "beta2": 0.9, "ns_steps": 3, "momentum": 0.8, "nesterov": False}),
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
        (dict(muon_learning_rate=0.9), "adamw has no muon_learning_rate"),
        (dict(name="muon", momentum=1.0), "momentum must be in"),
        (dict(beta1=1.0), "must"),
        (dict(name="sgd", nesterov=True), "nesterov must have momentum"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive"),
    ],
)
def test_refuses_options_that_nobody_takes(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options).check()
