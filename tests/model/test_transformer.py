"""Prove that the model computes what it says: causal, cached, grouped, recomputed alike."""

import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from tritium.kernels import cross_entropy
from tritium.model import ModelConfig, Transformer
from tritium.model.sampling import sample

CONFIG = ModelConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=16)


def build(device, **changes):
    return Transformer(replace(CONFIG, **changes)).to(device)


def ids(device, *shape):
    return torch.randint(CONFIG.vocab_size, shape, device=device)


def test_loss_is_the_cross_entropy_of_the_logits(device):
    model, tokens, targets = build(device, softcap=5.0), ids(device, 2, 9), ids(device, 2, 9)
    targets[0, 3] = -100
    expected = cross_entropy(model(tokens).view(18, -1), targets.view(-1))
    torch.testing.assert_close(model(tokens, targets), expected)


def test_logits_do_not_see_the_future(device):
    model, tokens = build(device), ids(device, 1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_logits_depend_on_relative_positions_only(device):
    model = build(device, n_layers=1)
    tokens = ids(device, 1, 5)
    shift = 6
    model_shifted = build(device, n_layers=1)
    model_shifted.load_state_dict(model.state_dict())
    model_shifted._cos_LK = model.cos_LK.roll(-shift, 0)
    model_shifted._sin_LK = model.sin_LK.roll(-shift, 0)
    torch.testing.assert_close(model(tokens), model_shifted(tokens), rtol=1e-4, atol=1e-5)


def test_grouped_heads_share_keys_and_values(device):
    grouped, full = build(device), build(device, n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith("query_key_value.weight"):
            query, *shared = state[name].view(8, 8, -1).split([4, 2, 2])
            heads = [x.repeat_interleave(2, dim=0) for x in shared]
            state[name] = torch.cat([query, *heads]).flatten(0, 1)
    full.load_state_dict(state)
    tokens = ids(device, 2, 10)
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_recomputing_activations_changes_nothing(device):
    model, tokens, targets = build(device), ids(device, 2, 9), ids(device, 2, 9)
    gradients = []
    for policy in ("none", "full"):
        model.activation_checkpointing = policy
        model.zero_grad()
        model(tokens, targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


def test_generates_the_same_with_its_cache_as_without(device):
    model, tokens = build(device), ids(device, 2, 3)
    expected = tokens
    for _ in range(10):
        best = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, best), dim=1)
    assert torch.equal(model.generate(tokens, 10, temperature=0), expected)
    assert torch.equal(model.generate(tokens, 10, top_k=1), expected)
    assert torch.equal(model.generate(tokens, 10, top_p=1e-6), expected)


def test_generates_beyond_its_context(device):
    model, tokens = build(device), ids(device, 1, 20)
    out = model.generate(tokens, 30, temperature=0)
    assert out.shape == (1, 50)
    # The first new token sees the last 16; after the context was full, the last 8 were read again.
    assert out[0, 20] == model(tokens[:, -16:])[0, -1].argmax()
    assert out[0, 21] == model(out[:, 13:21])[0, -1].argmax()


def test_samples_by_probability(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, -9.0]], device=device).repeat(20000, 1)
    drawn = torch.bincount(sample(logits, temperature=0.5)[:, 0], minlength=4) / 20000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(-1), atol=0.015, rtol=0)
    drawn = torch.bincount(sample(logits, top_k=2)[:, 0], minlength=4) / 20000
    expected = torch.tensor([0.0, 0.2689, 0.7311, 0.0], device=device)
    torch.testing.assert_close(drawn, expected, atol=0.015, rtol=0)
    assert sample(logits, top_p=0.6).unique().tolist() == [2]  # p = 0.665 alone reaches 0.6
    assert sample(logits, top_p=0.7).unique().tolist() == [1, 2]


def test_initialises_residual_projections_by_depth(device):
    shallow, deep = (build(device, n_layers=n).blocks[0].feed_forward.down for n in (1, 4))
    ratio = shallow.weight.std() / deep.weight.std()
    assert ratio.item() == pytest.approx(2.0, rel=0.1)


def test_ties_the_embedding_only_if_asked(device):
    tied, untied = build(device), build(device, tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    untied.to_empty(device=device).load_state_dict(untied.state_dict(), assign=True)
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize("assign", [False, True])
def test_one_weight_takes_one_value(assign, device, tmp_path):
    model, other = build(device), build(device, tie_embeddings=False)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)  # equal, from files that have both
    assert model.head.weight is model.embedding.weight
    before = model.embedding.weight.clone()
    with pytest.raises(RuntimeError, match=r"differ, and are one weight here; load into a model"):
        model.load_state_dict(other.state_dict(), assign=assign)
    for part, of_two in ((model, False), (other, True)):
        nested = torch.nn.ModuleDict({"a": part})
        state = {f"a.{name}": x.clone() for name, x in other.state_dict().items()}
        if of_two:
            nested.load_state_dict(state, assign=assign)
        else:
            with pytest.raises(RuntimeError, match=r"a\.embedding\.weight and a\.head\.weight"):
                nested.load_state_dict(state, assign=assign)
    model.head.weight = torch.nn.Parameter(before)
    with pytest.raises(ValueError, match="output layer is not the embedding any more"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smooths_labels_in_training_only(device):
    model = Transformer(CONFIG, label_smoothing=0.1, z_loss=0.01).to(device)
    tokens, targets = ids(device, 2, 9), ids(device, 2, 9)
    logits = model(tokens).view(18, -1)
    expected = cross_entropy(logits, targets.view(-1), label_smoothing=0.1, z_loss=0.01)
    torch.testing.assert_close(model(tokens, targets), expected)
    plain = cross_entropy(logits, targets.view(-1))
    torch.testing.assert_close(model.eval()(tokens, targets), plain)
    assert plain.item() != pytest.approx(expected.item(), abs=1e-3)


def test_drops_out_in_training_only(device):
    model, tokens = Transformer(CONFIG, dropout=0.5).to(device), ids(device, 2, 9)
    first, second = model(tokens), model(tokens)
    assert not torch.allclose(first, second, atol=1e-3)
    same = build(device)
    same.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens), same(tokens))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_blocks_give_the_same_gradients(device, dropout):
    tokens, gradients = ids(device, 2, 9), []
    for policy in ("none", "full"):
        torch.manual_seed(1)
        model = Transformer(CONFIG, activation_checkpointing=policy, dropout=dropout).to(device)
        model(tokens, tokens).backward()
        gradients.append([p.grad for p in model.parameters()])
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_heads=5), "n_heads must divide d_model, got 5 heads for width 32; try n_heads=4"),
        (dict(n_kv_heads=3), "n_kv_heads must divide n_heads, got 3 for 4 heads"),
        (dict(n_kv_heads=0), "n_kv_heads must divide n_heads, got 0"),
        (dict(d_model=4), "must be even for rotary positions, got 1"),
        (dict(n_layers=0), "n_layers must be at least 1, got 0"),
        (dict(d_ff=0), "d_ff must be at least 1, got 0"),
        (dict(softcap=-1.0), "softcap must be above 0"),
        (dict(full_every=2), "full_every must be None without a window, got 2; set window too"),
    ],
)
def test_refuses_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


NO_NUMBERS = [
    "64",
    None,
    [1],
    {},
    object(),
    torch.zeros(2),
    1j,
    math.nan,
    math.inf,
    -math.inf,
    True,
]
WHOLE = (
    "vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "max_seq_len",
    "window", "full_every",
)  # fmt: skip
REAL = "rope_theta", "qk_gain", "norm_eps", "softcap", "attention_softcap"
WORDS = "positions", "norm", "activation", "attention", "initialisation"


@pytest.mark.parametrize("name", [f.name for f in fields(ModelConfig)])
def test_refuses_settings_that_are_none_of_their_kind(name):
    nothing_wrong = {
        "n_kv_heads", "d_head", "d_ff", "softcap", "window", "full_every", "attention_softcap"
    }  # fmt: skip
    if name in WHOLE:
        wrong = [*NO_NUMBERS, 4.0, 0.5, -4, 0, "", b"4"]
    elif name in REAL:
        wrong = [*NO_NUMBERS, -1, -1e-9, "1e-6", *([] if name == "norm_eps" else [0, 0.0])]
    elif name in WORDS:
        wrong = [*NO_NUMBERS, 0, "", "none", "RMS"]
    elif name == "rope_scaling":
        wrong = [*(x for x in NO_NUMBERS if x != {}), 0, "llama3"]
    else:
        wrong = [x for x in NO_NUMBERS if x is not True] + [0, 1, "false", "True"]
    for value in wrong:
        if not (value is None and name in nothing_wrong):
            with pytest.raises(ValueError, match=f"{name} must "):
                replace(CONFIG, **{name: value})


def test_settings_of_numpy_are_kept_as_plain_numbers():
    config = replace(CONFIG, n_layers=np.int64(3), norm_eps=np.float32(0.25), rope_theta=100)
    assert config == replace(CONFIG, n_layers=3, norm_eps=0.25, rope_theta=100.0)
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


@pytest.mark.parametrize("policy", ["foo", "every-0", "every-3", "", None, 2, True])
def test_refuses_a_policy_whenever_it_is_set(policy, device):
    model = build(device)
    with pytest.raises(ValueError, match="activation_checkpointing must"):
        model.activation_checkpointing = policy
    with pytest.raises(ValueError, match="activation_checkpointing must"):
        Transformer(CONFIG, activation_checkpointing=policy)
    assert model.activation_checkpointing == "none"
    model.activation_checkpointing = "every-2"


@pytest.mark.parametrize("wrong", [-0.1, 1.0, math.nan, "0.1", True, None])
def test_refuses_a_share_that_is_none(wrong, device):
    for name in ("dropout", "label_smoothing"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\)"):
            Transformer(CONFIG, **{name: wrong})
    with pytest.raises(ValueError, match="z_loss must be at least 0"):
        Transformer(CONFIG, z_loss=-1.0)
    model = build(device)
    with pytest.raises(ValueError, match="dropout must be in"):
        model.dropout = wrong
    assert model.dropout == 0


def test_dropout_set_later_is_that_of_every_block(device):
    torch.manual_seed(1)
    later = build(device)
    later.dropout = 0.5
    torch.manual_seed(1)
    first, tokens = Transformer(CONFIG, dropout=0.5).to(device), ids(device, 2, 9)
    outputs = []
    for model in (first, later):
        torch.manual_seed(2)
        outputs.append(model(tokens))
    assert torch.equal(*outputs)
    later.dropout = 0.0
    assert torch.equal(later(tokens), later.eval()(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(temperature=-1), "temperature must be at least 0"),
        (dict(top_k=0), "top_k must be at least 1"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 0"),
    ],
)
def test_refuses_wrong_sampling(arguments, message, device):
    with pytest.raises(ValueError, match=message):
        build(device).generate(ids(device, 1, 3), **{"max_new_tokens": 2} | arguments)


def test_refuses_what_does_not_fit_the_context(device):
    with pytest.raises(ValueError, match="tokens reach position 17, but max_seq_len is 16"):
        build(device)(ids(device, 1, 17))
    with pytest.raises(ValueError, match="tokens must be"):
        build(device).generate(ids(device, 1, 0), 1)
    with pytest.raises(ValueError, match="activation_checkpointing must be"):
        Transformer(CONFIG, activation_checkpointing="half")


def test_is_a_module_like_any_other(device):
    model = build(device)
    assert isinstance(model, nn.Module)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = ids(device, 1, 8)
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))
