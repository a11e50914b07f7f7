"""Configs and weights of transformers' native architectures, and those of `Transformer`.

    GPT2LMHeadModel    learned positions, LayerNorm, GELU, biases
    LlamaForCausalLM   rotary positions, RMSNorm, SwiGLU or GEGLU, grouped queries, biases or none
    MistralForCausalLM the same with a sliding window in every layer, without biases
    Qwen3ForCausalLM   the same with normalised queries and keys, without biases; a window in all
                       layers, in all except every n-th, or in none
    ArceeForCausalLM   Llama with a feed-forward layer without a gate, of ReLU² or GELU
    ApertusForCausalLM the same with normalised queries and keys, without biases; that of xIELU,
                       as published, is refused

A config of another kind is refused in both directions, with the reason. Transformers has others
with parallel blocks (GPT-NeoX and Cohere, with LayerNorm and rotary positions): not written here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from tritium.model.config import Activation, ModelConfig, RopeScaling
from tritium.model.rotary import ntk_theta

GATES: dict[str, Activation] = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu",
}  # fmt: skip
GELUS = "gelu_new", "gelu_pytorch_tanh"
PLAIN: dict[str, Activation] = {"relu2": "relu_squared", **dict.fromkeys(GELUS, "gelu")}
"""Activations without a gate, of Arcee and Apertus."""
WRITTEN = {
    "swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_pytorch_tanh",
    "relu_squared": "relu2",
}  # fmt: skip
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "arcee": "ArceeForCausalLM", "apertus": "ApertusForCausalLM",
}  # fmt: skip
NORMALISES = "qwen3", "apertus"  # queries and keys
ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "arcee": {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "apertus": {
        "hidden_act": "xielu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip
"""Values that transformers takes for absent entries, where they are not Llama's."""
FULL, SLIDING = "full_attention", "sliding_attention"
IGNORED = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
"""Tensors of old files that are no weights."""


class FormatError(ValueError):
    """A model cannot be read from files, or written into them."""


class Part(NamedTuple):
    """Place of a parameter in a file."""

    names: tuple[str, ...]
    """Tensors whose rows, one after the other, are the parameter's."""
    rows: tuple[int, ...]
    """Rows of each; none where one tensor holds all."""
    transposed: bool = False
    """Whether the file has columns for rows."""


def model_type(config: ModelConfig) -> str:
    """Return the native architecture that holds a config, one of `ARCHITECTURES`.

    Raises:
        FormatError: there is none; the message names each field that is in the way.
    """
    windows = _windows(config)
    if config.positions == "learned":
        kind = "gpt2"
    elif config.gated:
        kind = "qwen3" if config.qk_norm else "mistral" if any(windows) else "llama"
    else:
        kind = "apertus" if config.qk_norm else "arcee"
    wanted = {
        "softcap": None, "attention_softcap": None, "parallel_blocks": False, "reversible": False,
        "token_shift": False, "norm": "layer" if kind == "gpt2" else "rms",
    }  # fmt: skip
    if kind in ("gpt2", "arcee", "apertus") and any(windows):
        wanted["window"] = None
    if kind == "mistral" and not all(windows):
        wanted["full_every"] = None
    if kind == "gpt2":
        wanted |= {
            "activation": "gelu", "bias": True, "qk_norm": False, "kv_heads": config.n_heads,
            "head_width": config.d_model // config.n_heads,
        }  # fmt: skip
        if config.d_model % config.n_heads:
            wanted["n_heads"] = math.gcd(config.d_model, config.n_heads)
    elif kind not in ("llama", "arcee"):
        wanted |= {"bias": False}
    fields = {"kv_heads": "n_kv_heads", "head_width": "d_head"}  # what a user sets
    wrong = [
        f"{fields.get(name, name)}={getattr(config, name)!r} (it has {value!r})"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if kind in ("llama", "arcee") and config.d_model % config.n_heads:
        wrong.append(f"d_model={config.d_model} (it has a multiple of the {config.n_heads} heads)")
    if wrong:
        raise FormatError(
            f"none of transformers' {', '.join(ARCHITECTURES.values())} holds this model; "
            f"{ARCHITECTURES[kind]} comes nearest, except for {', '.join(wrong)}"
        )
    return kind


def _windows(config: ModelConfig) -> list[bool]:
    """Return whether each layer has a window."""
    return [config.window_of(i) is not None for i in range(config.n_layers)]


def config_to_native(config: ModelConfig, dtype: str = "float32", eot: int | None = None) -> dict:
    """Return the content of config.json.

    Args:
        config: the shape.
        dtype: name of the dtype of the weights.
        eot: id of the end-of-text token, if there is one.

    Raises:
        FormatError: none of these architectures holds it.
    """
    kind = model_type(config)
    common = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "torch_dtype": dtype,
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot, "eos_token_id": eot,
    }  # fmt: skip
    if kind == "gpt2":
        return common | {
            "n_positions": config.max_seq_len, "n_embd": config.d_model,
            "n_layer": config.n_layers, "n_head": config.n_heads,
            "n_inner": config.feed_forward_width, "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }  # fmt: skip
    theta = ntk_theta(config.rope_theta, config.head_width, config.rope_scaling)
    return common | _own_to_native(config, kind, theta) | {
        "max_position_embeddings": config.max_seq_len, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
        "intermediate_size": config.feed_forward_width, "hidden_act": WRITTEN[config.activation],
        "rms_norm_eps": config.norm_eps, "rope_theta": theta,
        "rope_scaling": _scaling_to_native(config.rope_scaling), "attention_dropout": 0.0,
    }  # fmt: skip


def _own_to_native(config: ModelConfig, kind: str, theta: float) -> dict:
    """Return the entries in which Llama and its kin differ."""
    if kind == "mistral":
        return {"sliding_window": config.window}
    if kind in ("llama", "arcee"):
        return {"attention_bias": config.bias, "mlp_bias": config.bias}
    if kind == "apertus":  # which stretches positions, and never trains id 3, unless told
        rope = {"rope_type": "default", "rope_theta": theta}
        rope |= _scaling_to_native(config.rope_scaling) or {}
        return {"attention_bias": False, "pad_token_id": None, "rope_parameters": rope}
    windows = _windows(config)
    types = {"layer_types": [SLIDING if windowed else FULL for windowed in windows]}
    return {"attention_bias": False, "use_sliding_window": any(windows)} | (
        {"sliding_window": config.window} | types if any(windows) else {}
    )


def _scaling_to_native(scaling: RopeScaling) -> dict | None:
    if scaling.kind in ("none", "ntk"):  # ntk is another theta
        return None
    given = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return given
    given["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        return given | {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    if scaling.attention_factor is not None:
        given["attention_factor"] = scaling.attention_factor
    return given | {"beta_slow": scaling.slow, "beta_fast": scaling.fast}


def config_from_native(given: dict) -> ModelConfig:
    """Return the shape that the content of a config.json describes.

    A file names heads and widths that a shape may leave to others; where it names what None
    means, the field is None, so that a shape comes back from a file as it went.

    Raises:
        FormatError: it is of another architecture, or asks for what this model does not have.
        ValueError: its sizes do not fit each other.
    """
    kind = given.get("model_type")
    if kind not in ARCHITECTURES:
        raise FormatError(f"model_type must be one of {', '.join(ARCHITECTURES)}, got {kind!r}")
    entries = _Given(given, ABSENT.get(kind, {}))
    config = _gpt2(entries) if kind == "gpt2" else _llama(entries, kind)
    meant = {"d_ff": replace(config, d_ff=None).feed_forward_width, "n_kv_heads": config.n_heads}
    if config.d_model % config.n_heads == 0:
        meant["d_head"] = config.d_model // config.n_heads
    return replace(config, **{x: None for x, value in meant.items() if getattr(config, x) == value})


class _Given:
    """The content of a config.json, whose entries are read or refused."""

    def __init__(self, given: dict, absent: dict):
        self._given, self._absent = given, absent

    def __call__(self, name: str, *default: Any) -> Any:
        for value in (self._given.get(name), self._absent.get(name), *default):
            if value is not None:
                return value
        if not default:
            raise FormatError(f"it has no {name}")
        return None

    def is_null(self, name: str) -> bool:
        """Whether an entry is there and null."""
        return name in self._given and self._given[name] is None

    def must_be(self, name: str, *legal: object) -> None:
        """Refuse a value that this model cannot have; an absent one is the first."""
        value = self(name, legal[0])
        if value not in legal:
            raise FormatError(
                f"{name} must be {' or '.join(map(repr, legal))} for this model, got {value!r}"
            )


def _gpt2(given: _Given) -> ModelConfig:
    given.must_be("activation_function", *GELUS)
    given.must_be("scale_attn_weights", True)
    given.must_be("scale_attn_by_inverse_layer_idx", False)
    given.must_be("add_cross_attention", False)
    return ModelConfig(
        vocab_size=given("vocab_size", 50257), n_layers=given("n_layer", 12),
        d_model=given("n_embd", 768), n_heads=given("n_head", 12), d_ff=given("n_inner", None),
        max_seq_len=given("n_positions", 1024), positions="learned", norm="layer",
        norm_eps=given("layer_norm_epsilon", 1e-5), activation="gelu", bias=True, qk_norm=False,
        tie_embeddings=given("tie_word_embeddings", True),
    )  # fmt: skip


def _llama(given: _Given, kind: str) -> ModelConfig:
    acts = PLAIN if kind in ("arcee", "apertus") else GATES
    given.must_be("hidden_act", *acts)
    bias = given("attention_bias", False)
    if kind in ("llama", "arcee"):
        if given("mlp_bias", False) != bias:
            raise FormatError(f"attention_bias and mlp_bias must be alike, got {bias}, {not bias}")
    else:
        given.must_be("attention_bias", False)
    window, full_every = _window_from_native(given, kind)
    heads, act = given("num_attention_heads"), given("hidden_act", "silu")
    groups = None if given.is_null("num_key_value_heads") else given("num_key_value_heads", heads)
    theta, scaling = _scaling_from_native(given)
    return ModelConfig(
        vocab_size=given("vocab_size"), n_layers=given("num_hidden_layers"),
        d_model=given("hidden_size"), n_heads=heads,
        n_kv_heads=groups, d_head=given("head_dim", None),
        d_ff=given("intermediate_size"), max_seq_len=given("max_position_embeddings", 2048),
        rope_theta=theta, rope_scaling=scaling, norm_eps=given("rms_norm_eps", 1e-6),
        activation=acts[act], bias=bias, qk_norm=kind in NORMALISES,
        tie_embeddings=given("tie_word_embeddings", False), window=window, full_every=full_every,
    )  # fmt: skip


def _window_from_native(given: _Given, kind: str) -> tuple[int | None, int | None]:
    """Return the window, and every how many layers one has none."""
    n, size = given("num_hidden_layers"), given("sliding_window", 4096)
    if kind == "mistral":  # its null is no window, and absent is not
        types = [FULL if given.is_null("sliding_window") else SLIDING] * n
    elif kind == "qwen3" and given("use_sliding_window", False):
        first = given("max_window_layers", 28)
        types = [SLIDING if i >= first else FULL for i in range(n)]
    else:
        types = [FULL] * n
    types = [*given("layer_types", types)]
    if SLIDING not in types and {*types} <= {FULL}:
        return None, None
    every = types.index(FULL) + 1 if FULL in types else n + 1
    pattern = [SLIDING if (i + 1) % every else FULL for i in range(n)]
    if kind in ("mistral", "qwen3") and types == pattern:
        return size, None if every > n else every
    raise FormatError(
        f"layer_types must be {SLIDING!r}, with {FULL!r} every so many layers, or all {FULL!r}, "
        f"got {types}"
    )


def _scaling_from_native(given: _Given) -> tuple[float, RopeScaling]:
    """Return theta and scaling, of the form before or since transformers 5."""
    rope = dict(given("rope_scaling", given("rope_parameters", {})))
    theta = rope.pop("rope_theta", given("rope_theta", 10000.0))
    legacy = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy)
    if rope.pop("partial_rotary_factor", given("partial_rotary_factor", 1.0)) != 1:
        raise FormatError("partial_rotary_factor must be 1 for this model")
    if kind == "default":
        return theta, RopeScaling()
    names = {"factor": "factor", "original_max_position_embeddings": "original_length"}
    if kind == "llama3":
        names |= {"low_freq_factor": "slow", "high_freq_factor": "fast"}
    elif kind == "yarn":
        names |= {x: x.replace("beta_", "") for x in ("beta_slow", "beta_fast")}
        names["attention_factor"] = "attention_factor"
    elif kind not in ("linear", "dynamic"):
        raise FormatError(
            f"rope_type must be default, linear, dynamic, llama3 or yarn, got {kind!r}"
        )
    odd = [x for x in rope if x not in names and rope[x] is not None]
    if odd:
        raise FormatError(f"rope_type {kind} with {odd[0]}={rope[odd[0]]!r} is not supported")
    if kind == "dynamic":  # it changes angles only beyond max_position_embeddings
        return theta, RopeScaling()
    found = {names[x]: value for x, value in rope.items() if x in names and value is not None}
    if kind != "linear":
        found.setdefault("original_length", given("max_position_embeddings", 2048))
    return theta, RopeScaling(kind, **found)


def layout(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    """Yield each parameter's name, and where a native file stores it.

    Embedding and output layer that share their weights come once, as the embedding.

    Raises:
        FormatError: none of these architectures holds the config.
    """
    kind = model_type(config)
    if kind == "gpt2":
        yield from _gpt2_layout(config)
    else:
        yield from _llama_layout(config, kind)
    if not config.tie_embeddings:
        yield "head.weight", Part(("lm_head.weight",), ())


def _gpt2_layout(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    yield "embedding.weight", Part(("transformer.wte.weight",), ())
    yield "position_embedding.weight", Part(("transformer.wpe.weight",), ())
    layers = {
        "attention_norm": "ln_1", "attention.query_key_value": "attn.c_attn",
        "attention.output": "attn.c_proj", "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
    }  # fmt: skip
    for i in range(config.n_layers):
        for own, name in layers.items():
            for kind in ("weight", "bias"):
                stored = f"transformer.h.{i}.{name}.{kind}"
                transposed = kind == "weight" and "c_" in name
                yield f"blocks.{i}.{own}.{kind}", Part((stored,), (), transposed)
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", Part((f"transformer.ln_f.{kind}",), ())


def _llama_layout(config: ModelConfig, model: str) -> Iterator[tuple[str, Part]]:
    yield "embedding.weight", Part(("model.embed_tokens.weight",), ())
    H, G, K, F = config.n_heads, config.kv_heads, config.head_width, config.feed_forward_width
    layers = {
        "attention.query_key_value": (("q_proj", "k_proj", "v_proj"), (H * K, G * K, G * K)),
        "attention.output": (("o_proj",), ()),
        "feed_forward.gate_up": (("gate_proj", "up_proj"), (F, F)),
        "feed_forward.down": (("down_proj",), ()),
    }
    if not config.gated:
        layers["feed_forward.up"] = (("up_proj",), ())
        del layers["feed_forward.gate_up"]
    norms = {
        "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    }  # fmt: skip
    if model == "apertus":
        norms = {
            "attention_norm": "attention_layernorm", "feed_forward_norm": "feedforward_layernorm",
        }  # fmt: skip
    if model in NORMALISES:
        norms |= {
            "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
        }  # fmt: skip
    for i in range(config.n_layers):
        block, stored = f"blocks.{i}", f"model.layers.{i}"
        for own, (parts, rows) in layers.items():
            room = "self_attn" if own.startswith("attention") else "mlp"
            for kind in ("weight", "bias") if config.bias else ("weight",):
                names = tuple(f"{stored}.{room}.{part}.{kind}" for part in parts)
                yield f"{block}.{own}.{kind}", Part(names, rows)
        for own, name in norms.items():
            yield f"{block}.{own}.weight", Part((f"{stored}.{name}.weight",), ())
    yield "norm.weight", Part(("model.norm.weight",), ())
