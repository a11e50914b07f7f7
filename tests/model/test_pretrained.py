"""Prove that folders in Hugging Face's layout hold the model that transformers makes of them."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from families import LENGTH, few, gpt2s, llamas, others, plain, qwens
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tritium.data import Tokenizer
from tritium.model import ModelConfig, RopeScaling, Transformer
from tritium.model.native import FormatError, config_from_native, config_to_native, model_type
from tritium.model.pretrained import INDEX, native_weights

TINY = ModelConfig(vocab_size=40, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=12)
GPT2 = ModelConfig(
    vocab_size=40, n_layers=2, d_model=16, n_heads=4, max_seq_len=12, positions="learned",
    norm="layer", activation="gelu", bias=True, qk_norm=False,
)  # fmt: skip


def build(config, seed=1):
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():  # as after training: nothing is zero, one, or near the identity
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_equal_models(own, theirs, length=LENGTH):
    """Logits within 1e-5 of their largest, loss and every gradient within 1e-4."""
    tokens = torch.randint(own.config.vocab_size, (2, length))
    logits, expected = own(tokens), theirs(tokens).logits
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    if length == 1:
        return
    loss = own(tokens[:, :-1], tokens[:, 1:])
    wanted = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for model, x in ((own, loss), (theirs, wanted)):
        model.zero_grad()
        x.backward()
    gradients = copy.deepcopy(own)
    with torch.no_grad():
        for p, q in zip(gradients.parameters(), own.parameters(), strict=True):
            p.copy_(q.grad)
    found = dict(native_weights(gradients, own.config))
    own = {name: p for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys()
    largest = max(p.grad.abs().max().item() for p in own.values())
    for name, p in own.items():
        torch.testing.assert_close(
            found[name], p.grad, rtol=1e-4, atol=1e-4 * max(largest, 1e-3), msg=name
        )


@given(gpt2s() | llamas() | qwens() | plain(), st.integers(1, LENGTH))
@example(replace(TINY, activation="relu_squared"), LENGTH)
@example(ModelConfig(40, 2, 16, 4, max_seq_len=12, activation="relu_squared"), LENGTH)
@example(ModelConfig(40, 2, 16, 4, max_seq_len=12, window=3), LENGTH)
@example(replace(TINY, activation="relu_squared", qk_norm=False, bias=True), LENGTH)
@few
def test_transformers_computes_the_same_from_what_is_written(config, length):
    if not config.qk_norm and not config.window and config.d_model % config.n_heads:
        return
    model = build(config)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert (
            type(theirs).__name__
            == json.loads((folder / "config.json").read_text())["architectures"][0]
        )
        again = Transformer.from_pretrained(folder)
        assert {*parent_of(folder)} == {"out"}
        again.save_pretrained(Path(parent) / "again")
        for file in folder.iterdir():
            assert file.read_bytes() == (Path(parent) / "again" / file.name).read_bytes()
    assert same_weights(model, again)
    resolved = ("kv_heads", "head_width", "feed_forward_width", "gated")
    assert all(getattr(config, name) == getattr(again.config, name) for name in resolved)
    unset = [name for name, value in vars(config).items() if value is None]
    assert all(getattr(again.config, name) is None for name in unset), unset
    assert_equal_models(model, theirs, length)


def parent_of(folder):
    return [path.name for path in folder.parent.iterdir()]


def foreign_configs():
    small = dict(vocab_size=37, max_position_embeddings=16, bos_token_id=None, eos_token_id=None)
    heads = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, intermediate_size=20)
    yield GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    yield GPT2Config(
        vocab_size=37, n_positions=16, n_embd=12, n_layer=1, n_head=3, n_inner=7,
        tie_word_embeddings=False, activation_function="gelu_pytorch_tanh",
    )  # fmt: skip
    yield LlamaConfig(**small, **heads, num_key_value_heads=1, tie_word_embeddings=True)
    yield LlamaConfig(**small, **heads, head_dim=10, attention_bias=True, mlp_bias=True)
    for rope in (
        dict(rope_type="linear", factor=2.5, rope_theta=100.0),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8, rope_theta=5e5),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, rope_theta=1e4),
    ):  # fmt: skip
        yield LlamaConfig(**small, **heads, rope_parameters=rope)
    dynamic = dict(rope_type="dynamic", factor=4.0, rope_theta=100.0)
    yield MistralConfig(**small, **heads, num_key_value_heads=2, sliding_window=3)
    yield MistralConfig(
        **small, **heads, num_key_value_heads=1, head_dim=10, sliding_window=None,
        rope_parameters=dynamic,
    )  # fmt: skip
    yield Qwen3Config(**small, **heads, head_dim=6, num_key_value_heads=2, tie_word_embeddings=True)
    windows = dict(use_sliding_window=True, sliding_window=4, num_key_value_heads=4)
    yield Qwen3Config(**small, **heads, **windows, max_window_layers=0)
    types = ["sliding_attention", "full_attention"]
    yield Qwen3Config(**small, **heads, **windows, layer_types=types)
    yield ArceeConfig(**small, **heads, num_key_value_heads=2, head_dim=10)
    yield ArceeConfig(**small, **heads, attention_bias=True, mlp_bias=True, hidden_act="gelu_new")
    plain = dict(hidden_act="relu2", pad_token_id=None)  # whose embedding has no gradient
    yield ApertusConfig(**small, **heads, **plain, num_key_value_heads=1)
    rope = dict(rope_type="default", rope_theta=100.0)
    yield ApertusConfig(**small, **heads, **plain, rope_parameters=rope)


@pytest.mark.parametrize("config", [*foreign_configs()], ids=lambda c: c.model_type)
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_transformers_writes(config, shards, tmp_path):
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "6KB")
    assert (tmp_path / INDEX).exists() == (shards > 1)
    own = Transformer.from_pretrained(tmp_path)
    assert not own.training
    assert_equal_models(own, theirs)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "arcee", "apertus"])
def test_an_absent_entry_is_what_transformers_takes_for_it(kind):
    sizes = dict(vocab_size=37, hidden_size=64, num_attention_heads=32, num_hidden_layers=2)
    given = {"model_type": kind, "intermediate_size": 20, **sizes}
    if kind == "apertus":
        assert AutoConfig.for_model(**given).hidden_act == "xielu"
        given["hidden_act"] = "relu2"
    own, theirs = map(config_from_native, (given, AutoConfig.for_model(**given).to_dict()))
    assert own == replace(theirs, d_head=own.d_head)
    assert own.head_width == theirs.head_width


@pytest.mark.parametrize("config", [TINY, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_shards_hold_the_same_weights(config, shard_bytes, tmp_path):
    model = build(config)
    model.save_pretrained(tmp_path / "out", max_shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 or shard_bytes == 10**9
    held = [name for file in files for name in load_file(file)]
    assert sorted(held) == sorted(name for name, _ in native_weights(model, config))
    assert same_weights(Transformer.from_pretrained(tmp_path / "out"), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal_models(model, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back_as_it_went(dtype, tmp_path):
    model = build(TINY).to(dtype)
    model.save_pretrained(tmp_path / "out")
    again = Transformer.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    assert same_weights(model, again)
    assert Transformer.from_pretrained(tmp_path / "out", dtype=torch.float32).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype
    trained = Transformer.from_pretrained(tmp_path / "out", dropout=0.5)
    assert trained.dropout == 0.5


def test_a_tokenizer_goes_with_it_and_both_write_the_same_text(tmp_path):
    source = Path(json.__file__).read_text()
    tokenizer = Tokenizer.train([source], 300)
    model = build(ModelConfig(**{**vars(TINY), "vocab_size": tokenizer.vocab_size}))
    model.save_pretrained(tmp_path / "out", tokenizer)
    theirs, reader = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    for text in ("def loads(s):\n    return", "  café €\n"):
        ids = tokenizer.encode(text)
        assert reader(text, add_special_tokens=False).input_ids == ids
        assert reader.decode(ids) == text
    assert reader.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eot
    tokens = torch.tensor([tokenizer.encode("def l")])
    room = TINY.max_seq_len - tokens.shape[1]
    found = model.generate(tokens, room, temperature=0, stop_tokens=[tokenizer.eot])
    expected = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=room, do_sample=False,
        pad_token_id=tokenizer.eot,
    )  # fmt: skip
    assert torch.equal(found, expected)
    again = Tokenizer.load(tmp_path / "out")
    assert again.fingerprint == tokenizer.fingerprint


@given(others())
def test_what_no_architecture_holds_is_refused_before_anything_is_written(config):
    with TemporaryDirectory() as parent:
        try:
            config_to_native(config)
        except FormatError as error:
            reason = str(error)
        else:
            return
        with pytest.raises(FormatError, match="none of transformers' GPT2LMHeadModel, "):
            Transformer(config).save_pretrained(Path(parent) / "out")
        assert not any(Path(parent).iterdir())
    assert any(f" {name}=" in reason for name in vars(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(softcap=30.0), "Qwen3ForCausalLM comes nearest, except for softcap=30.0"),
        (dict(attention_softcap=50.0), r"attention_softcap=50.0 \(it has None\)"),
        (
            dict(parallel_blocks=True),
            r"Qwen3ForCausalLM comes nearest, except for parallel_blocks=True",
        ),
        (dict(token_shift=True), r"Qwen3ForCausalLM comes nearest, except for token_shift=True"),
        (
            dict(window=4, full_every=2, qk_norm=False),
            "MistralForCausalLM comes nearest, except for full_every=2",
        ),
        (
            dict(window=4, bias=True, qk_norm=False),
            "MistralForCausalLM comes nearest, except for bias=True",
        ),
        (dict(positions="learned", window=4), r"window=4 \(it has None\)"),
        (dict(norm="layer"), "norm='layer' .it has 'rms'"),
        (
            dict(activation="relu_squared", window=4),
            "ApertusForCausalLM comes nearest, except for window=4",
        ),
        (dict(activation="gelu", bias=True), "ApertusForCausalLM comes nearest, except for bias="),
        (
            dict(activation="relu_squared", qk_norm=False, window=4),
            "ArceeForCausalLM comes nearest, except for window=4",
        ),
        (dict(bias=True), "bias=True .it has False"),
        (dict(positions="learned"), "GPT2LMHeadModel comes nearest, except for norm='rms'"),
        (dict(d_head=6, qk_norm=False, d_model=18), r"d_model=18 \(it has a multiple of the 4"),
    ],
)
def test_the_reason_names_the_field(changes, reason):
    with pytest.raises(FormatError, match=reason):
        model_type(ModelConfig(**{**vars(TINY), **changes}))


def test_the_default_of_train_py_is_qwen3():
    assert model_type(ModelConfig()) == "qwen3"


def rewritten(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def reweighted(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


NORM, LAYER = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "must hold an object, got a list"),
    "other": (
        lambda f: rewritten(f, model_type="mamba"),
        "config.json: model_type must be one of gpt2, llama, mistral, qwen3, arcee, apertus, got",
    ),
    "no width": (lambda f: rewritten(f, hidden_size="absent"), "it has no hidden_size"),
    "a wrong size": (lambda f: rewritten(f, hidden_size="16"), "d_model must be a whole number"),
    "untied unless it says so": (
        lambda f: rewritten(f, tie_word_embeddings="absent"), "lacks lm_head.weight, and 0 others"
    ),
    "windows": (
        lambda f: rewritten(f, layer_types=["full_attention", "sliding_attention"]),
        "layer_types must be 'sliding_attention', with 'full_attention' every so many layers, or",
    ),
    "activation": (lambda f: rewritten(f, hidden_act="relu"), "hidden_act must be 'silu' or"),
    "xIELU": (
        lambda f: rewritten(f, model_type="apertus", hidden_act="absent"),
        "hidden_act must be 'relu2' or 'gelu_new' or 'gelu_pytorch_tanh' for this model, got 'xi",
    ),
    "rope": (
        lambda f: rewritten(f, rope_scaling={"rope_type": "longrope"}),
        "rope_type must be default, linear, dynamic, llama3 or yarn, got 'longrope'",
    ),
    "rope's options": (
        lambda f: rewritten(f, rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 0.7}),
        "rope_type yarn with mscale=0.7 is not supported",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "model.safetensors does not exist; pytorch_model.bin is a pickle, which is not read",
    ),
    "truncated": (
        lambda f: cut(f / "model.safetensors"),
        "model.safetensors is damaged or no safetensors file",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "a tensor less": (lambda f: reweighted(f, lambda w: w.pop(NORM)), f"lacks {NORM}, and 0"),
    "a tensor more": (
        lambda f: reweighted(f, lambda w: w.update(bonus=torch.ones(3))),
        "model.safetensors holds bonus, which no part of this model is, and 0 others",
    ),
    "another shape": (
        lambda f: reweighted(f, lambda w: w.update({LAYER: w[LAYER].T.contiguous()})),
        rf"{LAYER}, for blocks.1.feed_forward.gate_up.weight, must be \[64, 16\] by config.json, "
        r"got \[16, 64\]",
    ),
    "another depth": (lambda f: rewritten(f, num_hidden_layers=3), "lacks model.layers.2.inp"),
    "another head": (
        lambda f: reweighted(f, lambda w: w.update({"lm_head.weight": torch.ones(40, 16)})),
        "lm_head.weight differs from model.embed_tokens.weight, which it is by config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_unknown_files_are_refused_by_name(damage, tmp_path):
    build(TINY).save_pretrained(tmp_path / "out")
    harm, message = DAMAGES[damage]
    harm(tmp_path / "out")
    with pytest.raises(FormatError, match=message):
        Transformer.from_pretrained(tmp_path / "out")


def test_a_shard_that_is_gone_or_lacks_its_part_is_named(tmp_path):
    build(TINY).save_pretrained(tmp_path / "out", max_shard_bytes=3000)
    last = sorted((tmp_path / "out").glob("model-*"))[-1]
    save_file({"model.norm.weight": torch.ones(16)}, last)
    with pytest.raises(FormatError, match=rf"{last.name} lacks .*, which {INDEX} puts there"):
        Transformer.from_pretrained(tmp_path / "out")
    last.unlink()
    with pytest.raises(FormatError, match=f"{last.name} does not exist"):
        Transformer.from_pretrained(tmp_path / "out")


def test_files_of_the_bare_model_and_of_old_versions_are_read(tmp_path):
    model = build(GPT2)
    model.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    bare = {n.removeprefix("transformer."): x for n, x in load_file(path).items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}
    save_file(bare | {"lm_head.weight": bare["wte.weight"].clone()}, path)
    assert same_weights(Transformer.from_pretrained(tmp_path / "out"), model)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    model = build(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FormatError, match="must not exist yet, or be an empty folder"):
            model.save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    before = sorted(path.name for path in tmp_path.iterdir())

    class FullError(OSError):
        pass

    def fail(*_, **__):
        raise FullError

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(FullError):
        model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_name_needs_huggingface_hub_and_a_path_does_not(monkeypatch, tmp_path):
    for path in ("./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FormatError, match="is no folder; name one that holds"):
            Transformer.from_pretrained(path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FormatError, match="huggingface_hub, which would download the model"):
        Transformer.from_pretrained("gpt2")
    build(TINY).save_pretrained(tmp_path / "out")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            assert name == "someone/small"
            assert allow_patterns == ["*.json", "*.safetensors"]
            return str(tmp_path / "out")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert same_weights(Transformer.from_pretrained("someone/small"), build(TINY))


def test_angles_of_a_model_that_was_read_are_those_of_its_config(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 8, 1.0, 4.0)
    model = build(ModelConfig(**{**vars(TINY), "rope_scaling": scaling}))
    model.save_pretrained(tmp_path / "out")
    again = Transformer.from_pretrained(tmp_path / "out")
    assert again.config.rope_scaling == scaling
    assert torch.equal(again.cos_LK, model.cos_LK)
    assert again.head.weight is again.embedding.weight
    loss = F.cross_entropy(again(torch.ones(1, 3).long())[0], torch.ones(3).long())
    assert torch.isfinite(loss)
