"""Prove that adapters compute what their formula says, that they alone are trained, and merge."""

import json
from dataclasses import replace

import pytest
import torch
from families import LENGTH, configs, few, gpt2s, llamas, qwens
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tritium.kernels import linear_cross_entropy
from tritium.model import Classifier, ModelConfig, Transformer, cpu_linear, lora
from tritium.model.activation_checkpointing import saved_bytes
from tritium.model.pretrained import native_weights
from tritium.model.shapes import flops_per_token
from tritium.training.memory.predict import Memory
from tritium.training.mixed_precision import MixedPrecision
from tritium.training.optim import OptimizerConfig

CONFIG = ModelConfig(
    vocab_size=23, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=LENGTH
)
ROWS = {
    "query": lambda c: c.n_heads * c.head_width, "key": lambda c: c.kv_heads * c.head_width,
    "value": lambda c: c.kv_heads * c.head_width, "output": lambda c: c.d_model,
    "gate": lambda c: c.feed_forward_width, "up": lambda c: c.feed_forward_width,
    "down": lambda c: c.d_model,
}  # fmt: skip
COLUMNS = {"output": ROWS["query"], "down": ROWS["up"]}


def projections(config):
    return [name for name in ROWS if name != "gate" or config.gated]


def most(config, layers):
    sides = [(ROWS[x](config), COLUMNS.get(x, ROWS["output"])(config)) for x in layers]
    return min(map(min, sides))


@st.composite
def adapted(draw, kinds=None):
    """A model with random weights, adapters that are not zero, and what they were asked to be."""
    config = draw(configs() if kinds is None else kinds)
    layers = draw(st.lists(st.sampled_from(projections(config)), min_size=0, unique=True))
    rank = draw(st.integers(1, most(config, layers or projections(config))))
    torch.manual_seed(draw(st.integers(0, 99)))
    model = Transformer(config).double()
    lora.adapt(model, rank, draw(st.sampled_from([None, 0.5, 7.0])), layers)
    stir(model)
    return model


def stir(model):
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def ids(model, rows=2, length=LENGTH):
    return torch.randint(model.config.vocab_size, (rows, length))


def small(rank=2, **options):
    torch.manual_seed(1)
    model = Transformer(CONFIG, **options)
    lora.adapt(model, rank)
    return model


def dense(model):
    """The weights that a plain model has where this one has adapters, by the formula."""
    spec, config, own = lora.adapters_of(model), model.config, dict(model.named_parameters())
    plain = {name: p for name, p in own.items() if ".adapters." not in name}
    into = {"feed_forward.gate_up": ("gate", "up")}
    packs = {
        "attention.query_key_value": ("query", "key", "value"), "attention.output": ("output",),
        "feed_forward.down": ("down",), **(into if config.gated else {"feed_forward.up": ("up",)}),
    }  # fmt: skip
    for i in range(config.n_layers):
        for layer, parts in packs.items():
            name, deltas = f"blocks.{i}.{layer}", []
            for part in parts:
                a, b = (own.get(f"{name}.adapters.{part}.{x}.weight") for x in "AB")
                zero = plain[f"{name}.weight"].new_zeros(ROWS[part](config), 1)
                deltas.append(
                    zero * plain[f"{name}.weight"][:1] if a is None
                    else spec.alpha / spec.rank * b @ a
                )  # fmt: skip
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + torch.cat(deltas)
    return plain


@given(adapted())
@few
def test_loss_and_gradients_are_those_of_the_dense_formula(model):
    tokens, targets = ids(model), ids(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = functional_call(Transformer(model.config).double(), dense(model), (tokens, targets))
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    for x, y in zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)


@given(configs(), st.data())
@few
def test_adapters_change_no_logit_before_the_first_step(config, data):
    model = Transformer(config)
    tokens = ids(model)
    before = model(tokens)
    lora.adapt(model, 1, layers=data.draw(st.lists(st.sampled_from(projections(config)))))
    assert torch.equal(model(tokens), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".adapters." in name
    }


@given(adapted(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@few
@torch.no_grad()
def test_a_merged_model_is_the_adapted_one_to_rounding(model, dtype):
    spec, names = lora.adapters_of(model), dict(Transformer(model.config).named_parameters()).keys()
    model.to(dtype)
    wanted = {name: p.clone() for name, p in dense(model.double()).items()}
    model.to(dtype)
    merged = dict(lora.merged_parameters(model))
    lora.merge(model)
    own = dict(model.named_parameters())
    assert spec is not None
    assert lora.adapters_of(model) is None
    assert own.keys() == merged.keys() == names
    for name, p in own.items():
        assert p.dtype == dtype
        assert p.requires_grad
        assert torch.equal(p, merged[name])
        # The sum is of float32 or wider, and rounded once.
        atol = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(p.double(), wanted[name], rtol=torch.finfo(dtype).eps, atol=atol)


@given(adapted(gpt2s() | llamas() | qwens()))
@few
@torch.no_grad()
def test_what_is_exported_is_what_was_merged(model):
    tokens = ids(model)
    wanted, exported = model(tokens), dict(native_weights(model, model.config))
    spec = lora.adapters_of(model)
    lora.merge(model)
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-9, atol=1e-10)
    for name, x in native_weights(model, model.config):
        assert torch.equal(exported.pop(name), x), (name, spec)
    assert not exported


@torch.no_grad()
def test_transformers_opens_what_an_adapted_model_saves(tmp_path):
    model = stir(small())
    model.save_pretrained(tmp_path / "native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "qwen3"
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "native"), ids(model)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    assert lora.adapters_of(model) == lora.Adapters(2, 2.0, tuple(ROWS))  # which saving left


@pytest.mark.parametrize(
    "options",
    [
        {}, dict(state_dtype="uint8"), dict(name="muon"), dict(name="muon", row_beta2=0.9),
        dict(name="lion"), dict(name="sgd", momentum=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_only_adapters_change_and_have_states(options):
    config, model = OptimizerConfig(**options), small()
    optimizer, tokens = config.make(model), ids(model, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * group.get("lr_scale", 1.0)
        losses.append(model(tokens, tokens))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (".adapters." not in name), name
        assert (p in optimizer.state) == (".adapters." in name), name
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    assert held == config.state_bytes(model)
    if config.name == "muon":
        assert {group["name"] for group in optimizer.param_groups} == {"hidden matrices"}


@pytest.mark.parametrize("policy", ["selective", "full", "every-2"])
def test_every_policy_gives_the_same_gradients(policy):
    model, tokens = stir(small(dropout=0.3)), ids(small())
    found = []
    for each in ("none", policy):
        model.activation_checkpointing = each
        torch.manual_seed(3)
        model(tokens, tokens).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_mixed_precision_gives_the_gradients_of_autocast():
    model, tokens = stir(small()), ids(small(), 4)
    found = []
    for cast in (torch.autocast("cpu", torch.bfloat16), MixedPrecision(model)):
        with cast:
            model(tokens, tokens).backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for x, y in zip(*found, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


def test_a_frozen_output_layer_costs_no_gradient_of_its_weight():
    # The gradient is computed beside the loss, so it would be among what is kept.
    hidden, target, kept = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 7, []
    for trained in (False, True):
        weight = torch.randn(7, 5, requires_grad=trained)
        given = [hidden, weight, target]
        kept.append(saved_bytes(lambda w=weight: linear_cross_entropy(hidden, w, target), given))
    assert kept[1] - kept[0] == 4 * 7 * 5


def test_flops_are_those_of_the_products(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_mkl_is_slow", lambda: False)  # whose products are not counted
    model, tokens = small(rank=3), ids(small())
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(tokens).sum().backward()
    # Nothing below the first projections has a gradient, so neither have their inputs.
    packed = model.blocks[0].attention.query_key_value
    first = packed.weight.numel() + sum(x.A.weight.numel() for x in packed.adapters.values())
    counted = flops_per_token(CONFIG) + lora.flops_added(model) - 2 * first
    assert counter.get_total_flops() == counted * tokens.numel()
    assert lora.flops_added(Transformer(CONFIG)) == 0


def test_the_memory_of_a_step_is_predicted():
    def make(config):
        model = Transformer(config)
        lora.adapt(model, 2)
        return model

    config = replace(CONFIG, n_layers=4)
    memory = Memory(make, config, OptimizerConfig(), torch.device("cpu"), torch.float32, 2)
    model = make(config)
    tokens, trained = ids(model), [p for p in model.parameters() if p.requires_grad]
    given = [tokens, *model.parameters(), model.cos_LK, model.sin_LK]
    step = memory.step("none", 2)
    assert saved_bytes(lambda: model(tokens, tokens), given) == pytest.approx(step.activations)
    assert step.gradients == sum(p.nbytes for p in trained)
    assert step.parameters == sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def test_generation_is_that_of_the_merged_model():
    model = stir(small()).double()
    tokens, rows = ids(model, 2, 3), []
    rows.append(model.generate(tokens, 8, temperature=0))
    lora.merge(model)
    rows.append(model.generate(tokens, 8, temperature=0))
    assert torch.equal(*rows)


def test_compiles_in_one_graph():
    model = Transformer(replace(CONFIG, n_layers=1))
    lora.adapt(model, 2)
    tokens, trained = ids(model), [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = compiled(tokens, tokens), model(tokens, tokens)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, trained) for loss in losses))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, (0,), r"whole number in \[1, 8\], the smaller side of key \[8, 16\], got 0"),
        ({}, (9,), "got 9"), ({}, (2.0,), "got 2.0"), ({}, (True,), "got True"),
        ({}, (2, 0.0), "alpha must be above 0, got 0.0; the rank is usual"),
        ({}, (2, float("nan")), "alpha must be above 0, got nan"),
        ({}, (2, None, ["query", "head"]), "layers must be among query, key, value, output,"),
        (dict(activation="gelu"), (2, None, ["gate"]), "which this model has, got 'gate'"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_be_adapted(changes, arguments, message):
    model = Transformer(replace(CONFIG, **changes))
    with pytest.raises(ValueError, match=f"lora: .*{message}"):
        lora.adapt(model, *arguments)
    assert lora.adapters_of(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_what_would_get_no_adapter_or_freeze_a_head():
    model = small()
    lora.merge(model)
    with pytest.raises(ValueError, match=r"got a Classifier, whose head .*; adapt its transformer"):
        lora.adapt(Classifier(model, 3), 2)
    model.blocks[1].feed_forward.down = torch.nn.Linear(CONFIG.d_ff, CONFIG.d_model)
    with pytest.raises(ValueError, match=r"blocks\.1\.feed_forward\.down must be .* got a Linear"):
        lora.adapt(model, 2)
    assert lora.adapters_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    lora.adapt(model, 2, layers=["query"])


def test_refuses_a_second_time_and_other_models():
    model = small()
    with pytest.raises(ValueError, match="has adapters already; merge them first"):
        lora.adapt(model, 2)
    with pytest.raises(ValueError, match="the model must have layers named query_key_value, "):
        lora.adapt(torch.nn.Linear(3, 4), 2)
    lora.merge(model)
    lora.merge(model)
    lora.adapt(model, 2, layers="down")
    assert lora.adapters_of(model) == lora.Adapters(2, 2.0, ("down",))
