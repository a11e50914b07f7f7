"""Prove that a run begins with the weights, shape and tokenizer that it is given."""

import json

import pytest
import torch
from safetensors.torch import load_file
from train_runs import CrashError, crash
from transformers import AutoModelForCausalLM

import train
from tritium.bench.runs import resume
from tritium.data import Tokenizer
from tritium.model import ModelConfig, Transformer
from tritium.model.lora import adapters_of
from tritium.model.saved import best, read_model
from tritium.training.run import checkpoint

FEW = "--max-steps", "2", "--learning-rate", "1e-12", "--warmup-steps", "0", "--weight-decay", "0"


@pytest.fixture
def source(run, tmp_path):
    assert run(tmp_path / "source", "--max-steps", "4", "--model.n-layers", "1") == 0
    run.output()
    return tmp_path / "source"


def close(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_begins_where_a_run_ended(source, run, tmp_path):
    assert run(tmp_path / "tuned", "--init-from", str(source), *FEW) == 0
    assert f"Weights of {source}, with a context of 64 of its 64 tokens." in run.output()
    before, after = Transformer.load(source), Transformer.load(tmp_path / "tuned")
    assert before.config == after.config
    assert close(before, after)
    texts = [(folder / "tokenizer.json").read_text() for folder in (source, tmp_path / "tuned")]
    assert texts[0] == texts[1]


def test_is_resumed_without_the_source(source, run, tmp_path):
    arguments = "--init-from", str(source), "--max-steps", "4", "--save-every", "2"
    assert run(tmp_path / "whole", *arguments) == 0

    assert run(tmp_path / "part", *arguments[:2], "--max-steps", "2", "--save-every", "2") == 0
    source.rename(tmp_path / "gone")
    resume = ["train.py", "--resume", str(tmp_path / "part"), "--max-steps", "4"]
    run.monkeypatch.setattr("sys.argv", resume)
    threads = torch.get_num_threads()
    train.main()
    torch.set_num_threads(threads)
    run.output()
    whole, part = (
        read_model(checkpoint.newest(tmp_path / name), Transformer).state_dict()
        for name in ("whole", "part")
    )
    assert all(torch.equal(x, part[name]) for name, x in whole.items())


def test_a_tokenizer_that_was_given_is_needed_once(source, run, tmp_path):
    """Whatever has become of its file: a run has a copy, which counts unless another is named."""
    file = tmp_path / "tokenizer.json"
    Tokenizer.load(source).save(file)
    folder, more = tmp_path / "run", ("--max-steps", "2", "--tokenizer", str(file))
    assert run(folder, *more) == 0
    file.write_text("no tokenizer")
    assert run(folder, "--max-steps", "3", "--resume") == 0
    assert run(folder, "--max-steps", "4", "--resume", *more[2:]) == 2
    assert "tokenizer.json" in run.output()


def test_a_run_that_ended_before_its_settings_takes_its_shape_from_the_source(
    source, run, tmp_path
):
    """As torchrun starts it again: with --resume, and nothing to resume."""
    assert run(tmp_path / "tuned", "--init-from", str(source), *FEW, "--resume") == 0
    assert Transformer.load(tmp_path / "tuned").config == Transformer.load(source).config


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_begins_with_a_model_in_hugging_faces_layout(family, source, run, tmp_path):
    tokenizer = Tokenizer.load(source)
    changes = dict(positions="learned", norm="layer", activation="gelu", bias=True)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 7, n_layers=1, d_model=16, n_heads=2, max_seq_len=100,
        qk_norm=False, **(changes if family == "gpt2" else {}),
    )  # fmt: skip
    model = Transformer(config)
    model.save_pretrained(tmp_path / "native", tokenizer)
    given = "--init-from", str(tmp_path / "native"), "--model.max-seq-len", "32"
    assert run(tmp_path / "tuned", *given, *FEW) == 0
    assert "with a context of 32 of its 100 tokens" in run.output()
    after = Transformer.load(tmp_path / "tuned")
    assert (after.config.vocab_size, after.config.max_seq_len) == (config.vocab_size, 32)
    tokens = torch.randint(config.vocab_size, (2, 32))
    torch.testing.assert_close(after(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    after.save_pretrained(tmp_path / "again", tokenizer)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == family


def test_what_cannot_be_begun_with_is_refused_in_a_sentence(source, run, tmp_path):
    begin = "--init-from", str(source)
    broken = best(source) / "model.safetensors"
    for arguments, message in (
        (("--init-from", str(tmp_path / "nowhere")), "nowhere holds no checkpoint"),
        ((*begin, "--model.d-model", "32"), "--model.d-model is that of the model which --init"),
        ((*begin, "--tokenizer", "x.json"), "--tokenizer is that of the model which --init-from"),
    ):  # fmt: skip
        assert run(tmp_path / "tuned", *arguments) == 2
        assert message in run.output()
    broken.write_bytes(broken.read_bytes()[:-1])
    assert run(tmp_path / "tuned", *begin) == 2
    assert "the checkpoint is damaged" in run.output()
    assert not (tmp_path / "tuned").exists()


def test_a_shape_that_cannot_be_exported_is_named_at_the_start(run, tmp_path):
    assert run(tmp_path / "plain", "--max-steps", "1") == 0
    assert "not exported" not in run.output()
    assert run(tmp_path / "capped", "--max-steps", "1", "--model.softcap", "20") == 0
    said = " ".join(run.output().split())
    assert "not exported: none of transformers' GPT2LMHeadModel, LlamaForCausalLM," in said
    assert "except for softcap=20.0" in said


LORA = "--lora-rank", "3", "--lora-layers", "query", "value", "down"


def tuned_weights(run):
    return load_file(checkpoint.newest(run) / checkpoint.FILES[0])


def test_lora_trains_adapters_alone_and_is_merged_where_it_is_read(source, run, tmp_path):
    given = "--init-from", str(source), *LORA, "--max-steps", "6", "--learning-rate", "1e-2"
    assert run(tmp_path / "tuned", *given, "--lora-alpha", "6") == 0
    said = " ".join(run.output().split())
    assert "adapters of rank 3, alpha 6, on query, value, down." in said
    before, after = Transformer.load(source), tuned_weights(tmp_path / "tuned")
    for name, p in before.named_parameters():
        assert torch.equal(p, after.pop(name)), name
    layers = ("attention.query_key_value", "query"), ("attention.query_key_value", "value")
    assert {*after} == {
        f"blocks.0.{layer}.adapters.{part}.{x}.weight"
        for layer, part in (*layers, ("feed_forward.down", "down")) for x in "AB"
    }  # fmt: skip
    moments = load_file(checkpoint.newest(tmp_path / "tuned") / checkpoint.FILES[1])
    assert {name.rpartition(".")[0] for name in moments} == {*after}
    assert moments

    merged = Transformer.load(tmp_path / "tuned", checkpoint="newest")
    assert adapters_of(merged) is None
    down = "blocks.0.feed_forward.down"
    a, b = (after[f"{down}.adapters.down.{x}.weight"] for x in "AB")
    given, own = before.get_parameter(f"{down}.weight"), merged.get_parameter(f"{down}.weight")
    torch.testing.assert_close(own, given + 2 * b @ a)
    tokenizer = Tokenizer.load(tmp_path / "tuned")
    merged.save_pretrained(tmp_path / "native", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    tokens = torch.tensor([tokenizer.encode("def load(")])
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens), rtol=1e-4, atol=1e-4)
    written = theirs.generate(tokens, max_new_tokens=12, do_sample=False)
    own = merged.generate(tokens, 12, temperature=0, stop_tokens=[tokenizer.eot])
    assert torch.equal(written, own)
    # And a run may begin with what a run with adapters has learned.
    assert run(tmp_path / "again", "--init-from", str(tmp_path / "tuned"), *FEW) == 0
    assert close(Transformer.load(tmp_path / "again"), merged)


@pytest.mark.parametrize(
    "more",
    [
        ("--optimizer", "muon", "--row-beta2", "0.9", "--dropout", "0.2"),
        ("--state-dtype", "uint8", "--precision", "bfloat16", "--micro-batch-size", "3"),
        ("--precision", "bfloat16-true", "--activation-checkpointing", "full"),
    ],
    ids=lambda more: more[0],
)  # fmt: skip
def test_lora_is_resumed_in_the_same_bytes_without_its_source(more, source, run, tmp_path):
    steps = "--init-from", str(source), *LORA, *more, "--max-steps", "6", "--save-every", "2"
    assert run(tmp_path / "whole", *steps) == 0
    run.at_step(5, crash)
    with pytest.raises(CrashError):
        run(tmp_path / "part", *steps)
    source.rename(tmp_path / "gone")
    run.monkeypatch.setattr("sys.argv", ["train.py", "--resume", str(tmp_path / "part")])
    threads = torch.get_num_threads()
    train.main()
    torch.set_num_threads(threads)
    assert resume.final_state(tmp_path / "part", set()) == resume.final_state(
        tmp_path / "whole", set()
    )


def test_adapters_that_do_not_fit_are_refused_before_anything_is_made(source, run, tmp_path):
    begin = "--init-from", str(source)
    for arguments, message in (
        (("--lora-rank", "2"), "trains adapters of weights that exist; add --init-from"),
        ((*begin, "--lora-alpha", "2"), "--lora-alpha and --lora-layers are about adapters; add"),
        ((*begin, "--lora-layers", "key"), "are about adapters; add --lora-rank, or drop them"),
        ((*begin, "--lora-rank", "33"), "rank must be a whole number in [1, 32], the smaller side"),
        ((*begin, "--lora-rank", "0"), "lora_rank must be at least 1, got 0"),
        ((*begin, "--lora-rank", "2", "--lora-layers", "head"), "be among query, key, value"),
    ):  # fmt: skip
        assert run(tmp_path / "tuned", *arguments) == 2
        assert message in " ".join(run.output().split()), arguments
        assert not (tmp_path / "tuned").exists()
