"""Prove that every family computes what its config says, cached, packed, compiled and counted."""

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from families import LENGTH, configs, few, scalings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tritium.model import ModelConfig, RopeScaling, Transformer, cpu_linear
from tritium.model.modules import GEGLU, LayerNorm, LinearCrossEntropyLoss, RMSNorm, SwiGLU
from tritium.model.rotary import rotary_tables
from tritium.model.shapes import SHAPES, ShapeName, flops_per_token, main, num_parameters

WINDOWS = dict(window=5, full_every=2, n_layers=2)
NAMED = (  # Llama is Qwen3 without two norms
    ("gpt2", {}, "selective"), ("qwen3-0.6b", {}, "full"),
    ("qwen3-0.6b", WINDOWS | dict(attention="softmax"), "every-2"),
    ("smollm-135m", WINDOWS | dict(attention_softcap=1.0, parallel_blocks=True), "selective"),
    ("smollm-135m", dict(token_shift=True), "selective"),
)  # fmt: skip


def build(config, seed=1):
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.double()


def ids(config, *shape):
    return torch.randint(config.vocab_size, shape)


def plain(model, tokens):
    """The logits, by plain formulas in the order of the papers."""
    config, w = model.config, dict(model.named_parameters(remove_duplicate=False))
    H, G, K = config.n_heads, config.kv_heads, config.head_width
    L = tokens.shape[1]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name, kind=config.norm):
        if kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * w[f"{name}.weight"]
        return y + w.get(f"{name}.bias", 0)

    def turned(x):
        cos, sin = (table[:L, None].double() for table in (model.cos_LK, model.sin_LK))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["embedding.weight"][tokens]
    if config.positions == "learned":
        x = x + w["position_embedding.weight"][:L]
    ago = torch.arange(L)[:, None] - torch.arange(L)
    for i in range(config.n_layers):
        window = config.window_of(i) or L
        name = f"blocks.{i}.attention"
        heads = linear(norm(x, f"{name}_norm"), f"{name}.query_key_value").unflatten(-1, (-1, K))
        if config.token_shift:
            before = torch.cat([torch.zeros_like(heads[:, :1]), heads[:, :-1]], 1)
            share = w[f"{name}.token_shift.weight"].view(2 * G, K)
            heads = heads + torch.cat([share.new_zeros(H, K), share]) * before
        q, k, v = heads.split([H, G, G], 2)
        if config.qk_norm:
            q, k = norm(q, f"{name}.query_norm", "rms"), norm(k, f"{name}.key_norm", "rms")
        if config.positions == "rope":
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
        scores = torch.einsum("blhk,bshk->bhls", q, k) / K**0.5
        if (cap := config.attention_softcap) is not None:
            scores = cap * (scores / cap).tanh()
        p = scores.masked_fill((ago < 0) | (ago >= window), -torch.inf).softmax(-1)
        y = linear(torch.einsum("bhls,bshk->blhk", p, v).flatten(2), f"{name}.output")
        if not config.parallel_blocks:
            x, y = x + y, 0
        h = norm(x, f"blocks.{i}.{'attention' if config.parallel_blocks else 'feed_forward'}_norm")
        x, name = x + y, f"blocks.{i}.feed_forward"
        gelu = partial(F.gelu, approximate="tanh")
        if config.gated:
            gate, up = linear(h, f"{name}.gate_up").chunk(2, -1)
            y = {"swiglu": F.silu, "geglu": gelu}[config.activation](gate) * up
        else:
            act = {"gelu": gelu, "relu_squared": lambda t: t.relu().square()}[config.activation]
            y = act(linear(h, f"{name}.up"))
        x = x + linear(y, f"{name}.down")
    logits = norm(x, "norm") @ w["head.weight"].T
    return logits if config.softcap is None else config.softcap * (logits / config.softcap).tanh()


@given(configs(), st.integers(1, LENGTH))
@few
def test_logits_and_gradients_are_those_of_the_formulas(config, length):
    model, tokens = build(config), ids(config, 2, length)
    expected = plain(model, tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-9, atol=1e-10)
    targets = ids(config, 2, length)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = torch.autograd.grad(model(tokens, targets), parameters, allow_unused=True)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)


@given(configs(), st.data())
@few
@torch.no_grad()
def test_read_in_parts_behind_padding_and_in_one_pass_alike(config, data):
    model, tokens = build(config), ids(config, 2, LENGTH)
    begins = data.draw(st.lists(st.integers(0, LENGTH - 1), min_size=2, max_size=2))
    place = torch.arange(LENGTH).expand(2, -1) - torch.tensor(begins)[:, None]
    positions = place.clamp(min=0)
    cut = data.draw(st.integers(1, LENGTH - 1))
    held = model.new_cache()
    first = model.hidden(tokens[:, :cut], held, positions[:, :cut])
    later = model.hidden(tokens[:, cut:], held, positions[:, cut:])
    found = model.logits(torch.cat((first, later), 1))
    torch.testing.assert_close(found, model(tokens, positions=positions), rtol=1e-7, atol=1e-9)
    for row, begin in enumerate(begins):
        alone = model(tokens[row : row + 1, begin:])[0]  # at other angles, each of them a float32
        torch.testing.assert_close(found[row, begin:], alone, rtol=1e-4, atol=1e-5)


@given(configs())
@settings(max_examples=20)
def test_flops_are_those_of_the_products(config):
    # The one attention on a CPU whose products are counted; oneDNN's are not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_linear, "_mkl_is_slow", lambda: False)
        model, tokens = Transformer(config), ids(config, 2, LENGTH)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens).sum().backward()
    assert flops_per_token(config) * tokens.numel() == counter.get_total_flops()


@given(scalings(longest=9000), st.integers(1, 16), st.sampled_from([100.0, 10000.0, 5e5]))
def test_scaled_angles_are_those_of_transformers(scaling, pairs, theta):
    parameters = dict(
        rope_type=scaling.kind, rope_theta=theta, factor=scaling.factor,
        low_freq_factor=scaling.slow, high_freq_factor=scaling.fast, beta_slow=scaling.slow,
        beta_fast=scaling.fast, attention_factor=scaling.attention_factor,
    )  # fmt: skip
    parameters["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "none":
        frequency, scale = theta ** -(torch.arange(pairs) / pairs), 1.0
    else:
        config = LlamaConfig(head_dim=2 * pairs, max_position_embeddings=64)
        config.rope_parameters = parameters
        if scaling.kind == "ntk":  # dynamic's, at the length that it makes of this factor
            if pairs == 1:
                return
            length, parameters["factor"] = round(64 * scaling.factor), 1.0
            scaling = replace(scaling, factor=length / 64)
            frequency, scale = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
        else:
            frequency, scale = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    angles = torch.outer(torch.arange(20.0), frequency)
    cos, sin = rotary_tables(20, 2 * pairs, theta, scaling=scaling)
    torch.testing.assert_close(cos, angles.cos() * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "changes", "policy"), NAMED)
def test_every_family_compiles_in_one_graph_and_is_exported(name, changes, policy):
    """Forward and backward, with a policy of checkpointing and without; the same loss."""
    small = dict(
        n_layers=1, d_model=24, n_heads=4, n_kv_heads=2, d_head=6, d_ff=16, vocab_size=23,
        max_seq_len=16,
    )  # fmt: skip
    model = Transformer(ModelConfig(**SHAPES[name] | small | changes))
    tokens, targets = ids(model.config, 3, 9), ids(model.config, 3, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (policy, "none"):
        model.activation_checkpointing = each
        losses = [call(tokens, targets) for call in (compiled, model)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(x, list(model.parameters())) for x in losses]
        torch.testing.assert_close(*gradients)
    free = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("L", min=2, max=16)}
    exported = torch.export.export(
        model, (tokens, targets), dynamic_shapes=dict(tokens=free, targets=free)
    )
    given = ids(model.config, 5, 12), ids(model.config, 5, 12)
    torch.testing.assert_close(exported.module()(*given), model(*given))
    torch.compiler.reset()


PUBLISHED = {
    # Weights of the models of these names: the sizes that Hugging Face states of its files.
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200, "smollm-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920,
}  # fmt: skip
OWN = "qwen3-tiny", "qwen3-small", "qwen3-98m"  # of the presets


def test_named_shapes_have_the_published_sizes(capsys):
    assert get_args(ShapeName) == tuple(SHAPES) == (*PUBLISHED, *OWN)
    for name, size in PUBLISHED.items():
        assert num_parameters(ModelConfig.named(name)) == size
    # A training step of GPT-2 on 1,024 tokens: transformer_sizing.ipynb of nanoGPT.
    assert flops_per_token(ModelConfig.named("gpt2"), 1024) * 1024 == 874_944_921_600
    main(["llama-3.1-8b", "gpt2", "--length", "1024"])
    _, llama, gpt2, *_ = capsys.readouterr().out.splitlines()
    # total_size of model.safetensors.index.json of Llama-3.1-8B, in bytes of bfloat16.
    assert f"{16_060_522_496 / 1e9:.2f}" in llama
    for figure in ("124,439,808", f"{874.944921600 / 1024:.3f}", "0.25", "1.99", "36,864 B"):
        assert figure in gpt2
    with pytest.raises(ValueError, match=r"there is no shape 'gpt-2'; did you mean 'gpt2'\?"):
        ModelConfig.named("gpt-2")
    with pytest.raises(SystemExit):
        main(["gpt9"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="dynamic"), "kind must be one of none, linear, ntk, llama3, yarn, got 'dynamic"),
        (dict(factor=0.5), "factor must be at least 1, got 0.5"),
        (dict(kind="yarn"), "original_length must be given for yarn"),
        (dict(slow=4.0, fast=4.0), "slow must be below fast"),
        (dict(original_length=0), "original_length must be at least 1"),
        (dict(attention_factor=-1.0), "attention_factor must be above 0"),
    ],
)
def test_refuses_scalings_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**changes)


def test_modules_are_those_of_torch():
    x, targets = torch.randn(4, 12), torch.randint(9, (4,))
    for tritium_model, theirs in (
        (RMSNorm(12), torch.nn.RMSNorm(12)), (RMSNorm((12,), 1e-3), torch.nn.RMSNorm((12,), 1e-3)),
        (RMSNorm(12, elementwise_affine=False), torch.nn.RMSNorm(12, elementwise_affine=False)),
        (LayerNorm(12, bias=False), torch.nn.LayerNorm(12, bias=False)),
        (LayerNorm(12), torch.nn.LayerNorm(12)),
    ):  # fmt: skip
        theirs.load_state_dict(tritium_model.state_dict())
        torch.testing.assert_close(tritium_model(x), theirs(x))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(SwiGLU()(x), F.silu(gate) * up)
    torch.testing.assert_close(GEGLU("tanh")(x), F.gelu(gate, approximate="tanh") * up)
    weight = torch.rand(9)
    loss = LinearCrossEntropyLoss(12, 9, bias=True, weight=weight, label_smoothing=0.1)
    expected = F.cross_entropy(loss.linear(x), targets, weight, label_smoothing=0.1)
    torch.testing.assert_close(loss(x, targets), expected)
    assert {*loss.state_dict()} == {"linear.weight", "linear.bias", "weight"}


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(3).long(), torch.ones(1, 2) > 0])
def test_refuses_tokens_that_are_no_ids(tokens):
    model = Transformer(ModelConfig(vocab_size=7, n_layers=1, d_model=8, n_heads=2))
    with pytest.raises(ValueError, match=r"tokens must be \[B, L\] ids in int64 or int32, got"):
        model(tokens)
    assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 7)
    assert model(torch.zeros(2, 3, dtype=torch.int32)).shape == (2, 3, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_norm_without_eps_is_the_same_alone_and_fused(weighted, dtype, device):
    """The eps is that of the sum's dtype, or float32's where that is narrower."""
    norm = RMSNorm(64, elementwise_affine=weighted).to(device, dtype)
    x = (torch.randn(5, 64, device=device) * 1e-3).to(dtype)
    expected = norm(x)
    found, total = norm.add(x, torch.zeros_like(x))
    assert torch.equal(total, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(out_features=(2,)),
            ValueError,
            r"out_features must be \(\), got \(2,\); take torch.nn",
        ),
        (dict(label_smothing=0.1), TypeError, "unexpected keyword argument 'label_smothing'"),
        (dict(reduction="avg"), ValueError, 'reduction must be "none", "mean" or "sum", got'),
        (dict(softcap=-1.0), ValueError, "softcap must be above 0"),
    ],
)
def test_the_loss_refuses_options_as_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss(12, 9, **options)


def test_the_loss_is_made_with_every_option_that_its_function_takes():
    options = dict(
        reduction="sum", ignore_index=2, z_loss=0.1, softcap=4.0, logit_scale=0.5, out_features=(),
        chunk_bytes=100, linear_weight_grad=torch.zeros(9, 12),
    )  # fmt: skip
    loss = LinearCrossEntropyLoss(12, 9, **options)
    loss(torch.randn(3, 12), torch.arange(3)).backward()
    assert options["linear_weight_grad"].any()
