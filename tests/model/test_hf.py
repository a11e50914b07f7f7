"""Prove that a patched model of transformers computes what it did, by Tritium's operations."""

import copy

import hypothesis
import pytest
import torch
from families import few
from hypothesis import strategies as st
from torch import nn
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    Qwen3Config,
)

from tritium.model import ModelConfig, Transformer, hf
from tritium.model.hf import patch

HEADS = dict(
    vocab_size=37, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=20,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**HEADS, num_key_value_heads=2),
    "llama, biases": LlamaConfig(**HEADS, attention_bias=True, mlp_bias=True, head_dim=10),
    "llama, geglu": LlamaConfig(**HEADS, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "llama, relu": LlamaConfig(**HEADS, hidden_act="relu"),
    "llama, yarn": LlamaConfig(
        **HEADS, rope_parameters=dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=8, rope_theta=1e4
        ),
    ),
    "mistral": MistralConfig(**HEADS, head_dim=6, num_key_value_heads=2, sliding_window=3),
    "qwen3": Qwen3Config(**HEADS, head_dim=6, num_key_value_heads=1),
    "arcee": ArceeConfig(**HEADS, num_key_value_heads=2),
    "apertus": ApertusConfig(**HEADS, num_key_value_heads=1, hidden_act="relu2"),
    "gpt2": GPT2Config(vocab_size=37, n_positions=32, n_embd=12, n_layer=2, n_head=3),
}  # fmt: skip
SWITCHES = "norm", "activation", "rotary", "loss"


def build(kind):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def assert_same(found, expected, model, other):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(x.square().sum(), list(m.parameters()), allow_unused=True)
        for x, m in ((found, model), (expected, other))
    ]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * max(1, y.abs().max().item()))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("switch", [*SWITCHES, None])
def test_logits_loss_and_gradients_are_the_same(kind, switch):
    plain, tokens = build(kind), torch.randint(37, (3, 11))
    switches = {name: name == switch for name in SWITCHES} if switch else {}
    patched = patch(copy.deepcopy(plain), **switches)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # padding in front, which moves the row's positions
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = tokens.masked_fill(mask == 0, -100)
    for given in (
        {}, dict(attention_mask=mask, position_ids=places), dict(logits_to_keep=2),
    ):  # fmt: skip
        expected = plain(tokens, **given).logits
        assert_same(patched(tokens, **given).logits, expected, patched, plain)
    for given in (
        {},
        dict(num_items_in_batch=torch.tensor(7)),
        dict(shift_labels=labels.roll(-1, 1)),
    ):
        expected = plain(tokens, attention_mask=mask, labels=labels, **given)
        found = patched(tokens, attention_mask=mask, labels=labels, **given)
        assert_same(found.loss, expected.loss, patched, plain)
        assert (found.logits is None) == switches.get("loss", True)
    found, expected = (m.eval()(tokens, labels=labels) for m in (patched, plain))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    with torch.no_grad():
        found, expected = (
            m.generate(
                tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            for m in (patched, plain)
        )
    assert torch.equal(found, expected)
    assert patched.state_dict().keys() == plain.state_dict().keys()


@st.composite
def models(draw):
    """A random model of transformers, with its loss of one batch and the gradients."""
    heads = draw(st.sampled_from([2, 4, 6]))
    kind = draw(st.sampled_from(["llama", "qwen3", "gpt2"]))
    layers, width = draw(st.integers(1, 2)), 2 * heads * draw(st.integers(2, 3))
    common = dict(vocab_size=37, tie_word_embeddings=draw(st.booleans()), use_cache=False)
    ends = dict(bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config = GPT2Config(
            **common, **ends, n_positions=32, n_embd=width, n_layer=layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind](
            **common, **ends, hidden_size=width, num_attention_heads=heads,
            num_hidden_layers=layers, num_key_value_heads=draw(st.sampled_from([1, 2, heads])),
            head_dim=draw(st.sampled_from([2, 4, 10])), intermediate_size=draw(st.integers(1, 20)),
            hidden_act=draw(st.sampled_from(["silu", "gelu_pytorch_tanh", "relu"])),
            attention_bias=draw(st.booleans()),
        )  # fmt: skip
    config._attn_implementation = draw(st.sampled_from(["eager", "sdpa"]))
    torch.manual_seed(draw(st.integers(0, 9)))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.train()


def loss_and_gradients(model, **given):
    loss = model(**given).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.double(), [x.double() for x in gradients]


@hypothesis.given(models(), st.data())
@few
def test_every_combination_of_switches_computes_the_same(model, data):
    switches = {name: data.draw(st.booleans()) for name in SWITCHES}
    exact, patched = copy.deepcopy(model).double(), patch(copy.deepcopy(model), **switches)
    tokens = torch.randint(37, (2, data.draw(st.integers(2, 9))))
    labels = torch.where(torch.rand(tokens.shape) < 0.2, -100, tokens)
    labels[:, -1] = 1
    given = dict(input_ids=tokens, labels=labels)
    if data.draw(st.booleans()):
        for each in (model, patched):
            each.activation_checkpointing_enable()
    precision = data.draw(st.sampled_from(["float32", "bfloat16", "autocast"]))
    low = precision != "float32"
    if precision == "bfloat16":
        model.bfloat16(), patched.bfloat16()
    with torch.autocast("cpu", enabled=precision == "autocast"):
        theirs, found = (loss_and_gradients(each, **given) for each in (model, patched))
    wanted = loss_and_gradients(exact, **given)
    if low:  # all gradients as one: of a small one alone the rounding is luck
        theirs, found, wanted = (
            (loss, [torch.cat([x.flatten() for x in gradients])])
            for loss, gradients in (theirs, found, wanted)
        )
    # As exact as the unpatched, twice its error; a loss of few tokens may have none by luck.
    least = 2e-3 if low else 1e-5
    for x, y, z in zip(
        [found[0], *found[1]], [theirs[0], *theirs[1]], [wanted[0], *wanted[1]], strict=True
    ):
        error, usual = ((each - z).norm().item() for each in (x, y))
        assert error <= 2 * usual + least * z.norm().item() + 2e-6, (error, usual)


class Adapted(nn.Linear):
    """A head with an adapter, whose weight is not all of it."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("how", ["class", "hook", "forward"])
def test_a_head_that_is_more_than_linear_computes_its_logits(how):
    plain, tokens = build("llama"), torch.randint(37, (2, 9))
    patched = patch(copy.deepcopy(plain))
    for model in (plain, patched):
        head = model.lm_head
        if how == "class":
            model.lm_head = Adapted(24, 37, bias=False)
            model.lm_head.load_state_dict(head.state_dict())
        elif how == "hook":
            head.register_forward_hook(lambda module, given, found: found * 2)
        else:
            head.forward = lambda x, w=head.weight: x @ w.mT * 2
    expected = plain.train()(tokens, labels=tokens)
    found = patched.train()(tokens, labels=tokens)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def recording(name, call, called):
    def recorded(*args, **kwargs):
        called.add(name)
        return call(*args, **kwargs)

    return recorded


@pytest.mark.parametrize("kind", ["llama", "qwen3", "apertus", "gpt2"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_brings_its_operation_alone(kind, switch, monkeypatch):
    called = set()
    norms, activations = ("rms_norm", "layer_norm"), ("swiglu", "relu_squared")
    for name in (*norms, *activations, "rope", "linear_cross_entropy"):
        monkeypatch.setattr(hf, name, recording(name, getattr(hf, name), called))
    monkeypatch.setitem(hf.ACTIVATIONS, "swiglu", hf.swiglu)
    untouched = build(kind).train()
    model = patch(build(kind), **{name: name == switch for name in SWITCHES}).train()
    tokens = torch.randint(37, (1, 5))
    assert untouched(tokens, labels=tokens).logits is not None
    assert not called  # in a model beside it, of the same class
    model(tokens, labels=tokens)
    has = {
        "norm": "layer_norm" if kind == "gpt2" else "rms_norm",
        "activation": "relu_squared" if kind == "apertus" else "swiglu",
        "rotary": "rope", "loss": "linear_cross_entropy",
    }  # fmt: skip
    none = kind == "gpt2" and switch in ("activation", "rotary")
    assert called == (set() if none else {has[switch]})


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_compiles_in_one_graph(kind):
    torch.compiler.reset()
    model, tokens = patch(build(kind)), torch.randint(37, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(tokens, labels=tokens, use_cache=False).loss
    found = compiled(tokens, labels=tokens, use_cache=False).loss
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, list(model.parameters())) for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


def test_once_more_changes_nothing_and_copies_stay_patched(tmp_path):
    model, tokens = patch(patch(build("qwen3"))), torch.randint(37, (2, 9))
    expected = build("qwen3")(tokens, labels=tokens)
    for other in (model, copy.deepcopy(model)):
        found = other.train()(tokens, labels=tokens)
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.logits is None
    assert isinstance(model(tokens, labels=tokens, return_dict=False), tuple)
    other, before = copy.deepcopy(model).eval(), model.eval()(tokens).logits
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(tokens).logits.any()  # its own weights, not those of the first
    assert torch.equal(model(tokens).logits, before)
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens), expected.logits, rtol=1e-4, atol=1e-4)


def test_refuses_what_it_does_not_know():
    own = Transformer(ModelConfig(vocab_size=7, n_layers=1, d_model=8, n_heads=2))
    with pytest.raises(TypeError, match="must be one of gpt2, llama, mistral, qwen3, arcee, "):
        patch(own)
    model = GPT2LMHeadModel(CONFIGS["gpt2"])
    model.loss_function = lambda *_, **__: 0
    with pytest.raises(TypeError, match="must have the usual loss, got its own; pass loss=False"):
        patch(model)
    patch(model, loss=False)
    body = patch(LlamaModel(CONFIGS["llama"]))  # without a head
    assert body(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 24)
