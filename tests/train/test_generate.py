"""Prove that a trained model is read and sampled from as it was trained."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Foreign
from tokenizers import processors

from tritium.data import Tokenizer
from tritium.model import Transformer
from tritium.model.saved import read_model
from tritium.training.generate import _Rate, main
from tritium.training.run import checkpoint
from tritium.training.run.run_state import RunState
from tritium.training.trained import load_tokenizer

PROMPT = "def the quick brown fox"


@pytest.fixture
def folder(run, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "4", "--save-every", "2") == 0
    run.output()
    return tmp_path / "run"


def printed(run, *arguments, **options):
    main(*arguments, max_new_tokens=12, temperature=0, device="cpu", **options)
    said = run.capsys.readouterr()
    assert re.fullmatch(r"\d+ tokens?, [\d,]+ tokens/s\n", said.err)
    return said.out


def expected_text(model, tokenizer, prompt):
    ids = tokenizer.encode(prompt) or [tokenizer.eot]
    tokens = model.generate(torch.tensor([ids]), 12, temperature=0, stop_tokens=[tokenizer.eot])
    return tokenizer.decode([i for i in tokens[0].tolist() if i != tokenizer.eot])


def test_a_run_is_read_into_python(folder):
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder)
    assert not model.training
    assert model.config.vocab_size == tokenizer.vocab_size
    first, last = checkpoint.checkpoints(folder / "checkpoints")
    assert RunState(last).best == {"step": 4, "val_loss": pytest.approx(6, abs=1)}
    for path, expected in ((str(folder), last), (folder / "checkpoints", last), (first, first)):
        weights = Transformer.load(path, torch.device("cpu")).state_dict()
        saved = read_model(expected, Transformer).state_dict()
        assert all(torch.equal(x, saved[name]) for name, x in weights.items())
    assert not torch.equal(weights["norm.weight"], model.state_dict()["norm.weight"])
    with pytest.raises(ValueError, match="holds no checkpoint; name the folder of a run"):
        Transformer.load(folder / "nothing")


@pytest.mark.parametrize("kind", ["plain", "template", "truncation", "padding"])
def test_the_prompt_is_encoded_as_the_data_were(kind, folder, run):
    # A tokenizer.json may ask for what training leaves out of its texts.
    path = folder / "tokenizer.json"
    foreign = Foreign.from_file(str(path))
    end, eot = "<|endoftext|>", Tokenizer.load(folder).eot
    if kind == "template":
        foreign.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False),
             processors.TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, eot)])]
        )  # fmt: skip
    elif kind == "truncation":
        foreign.enable_truncation(2)
    elif kind == "padding":
        foreign.enable_padding(length=30, pad_id=eot, pad_token=end)
    foreign.save(str(path))
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder)
    for prompt in (PROMPT, ""):
        found = printed(run, folder, prompt=(prompt,))
        assert found == expected_text(model, tokenizer, prompt) + "\n"
        assert found.startswith(prompt)
        assert "<|endoftext|>" not in found


def test_prompts_and_samples_come_one_after_another(folder, run):
    first = checkpoint.checkpoints(folder / "checkpoints")[0]
    model, tokenizer = Transformer.load(first), load_tokenizer(first)
    texts = [expected_text(model, tokenizer, prompt) for prompt in ("a", "a", "", "")]
    found = printed(run, first, prompt=("a", ""), samples=2)
    assert found == "\n\n---\n".join(texts) + "\n"


def test_the_command_line_streams_and_refuses_in_a_sentence(folder):
    root = Path(__file__).parents[2]

    def command(*arguments, stdin=""):
        return subprocess.run(
            [
                sys.executable, "-m", "tritium.training.generate", *map(str, arguments),
                "--device", "cpu",
            ],
            cwd=root, capture_output=True, text=True, input=stdin,
        )  # fmt: skip

    done = command(folder, "--prompt", "x = ", "--prompt", "y", "--max-new-tokens", "3")
    assert done.returncode == 0
    assert re.fullmatch(r"\d+ tokens?, [\d,]+ tokens/s\n", done.stderr)
    assert done.stdout.startswith("x = ")
    assert "\n---\ny" in done.stdout
    done = command(folder, "--interactive", "--max-new-tokens", "2", stdin="a = \n\nb")
    assert done.returncode == 0
    assert [text[:1] for text in done.stdout.split("\n---\n")][::2] == ["a", "b"]
    wrong = command(folder / "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "holds no checkpoint" in wrong.stderr


def test_the_last_line_says_how_tokens_were_drawn():
    rate = _Rate()
    for line in ("Each token is", "Each token is", "No CUDA graph"):
        rate.note(line)
    assert str(rate) == "0 tokens, 0 tokens/s; Each token is; No CUDA graph"


def test_the_config_of_a_run_makes_its_shape_again(folder):
    saved = json.loads((folder / "config.json").read_text())["config"]["model"]
    assert asdict(Transformer.load(folder).config) == saved


def test_the_best_checkpoint_is_read_unless_the_newest_is_asked_for(run, tmp_path):
    corpus = "--eval-every", "2", "--save-every", "2", "--keep-last", "1"
    # So high a rate that the loss rises from the second step on.
    rising = "--learning-rate", "3", "--warmup-steps", "0", "--schedule", "constant"
    assert run(tmp_path / "run", "--max-steps", "8", *corpus, *rising) == 0
    run.output()
    *_, before, last = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    lowest = RunState(last).best["step"]
    assert checkpoint.step_of(before) == lowest < checkpoint.step_of(last) == 8
    for which, expected in (("best", before), ("newest", last)):
        weights = Transformer.load(tmp_path / "run", checkpoint=which).state_dict()
        saved = read_model(expected, Transformer).state_dict()
        assert all(torch.equal(x, saved[name]) for name, x in weights.items())
    with pytest.raises(ValueError, match='checkpoint must be "best" or "newest", got 3'):
        Transformer.load(tmp_path / "run", checkpoint=3)


def test_a_run_leaves_as_a_native_model_and_is_sampled_from_there(folder, run, tmp_path):
    model, tokenizer = Transformer.load(folder), Tokenizer.load(folder)
    model.save_pretrained(tmp_path / "native", tokenizer)
    found = printed(run, tmp_path / "native", prompt=("a",))
    assert found == printed(run, folder, prompt=("a",))
    (tmp_path / "native" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"native holds no tokenizer.json"):
        main(tmp_path / "native", device="cpu")
