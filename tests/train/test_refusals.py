"""Prove that a wrong input ends in one sentence and status 2, and changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tritium.data import Tokenizer


def main(monkeypatch, home, *arguments) -> None:
    """Run train.py in this process, where the kernels are interpreted (or on the GPU)."""
    monkeypatch.setenv("TRITIUM_HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        train.main()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "there is no preset 'huge'; choose one of small, characters, gpt2, gpu, tiny"),
        (["tiny", "--data", "missing.txt"], "missing.txt"),
        (["tiny", "--data", lambda p: write(p / "empty.txt", "")], "empty"),
        (["tiny", "--data", lambda p: write(p / "bad.txt", b"abc \xff def" * 99)], "UTF-8"),
        (["tiny", "--data", lambda p: write(p / "short.txt", "a b c\n\n" * 40)], "short.txt"),
        (["tiny", "--model.vocab-size", "100"], "257"),
        (["tiny", "--model.n-heads", "5"], "n_heads must divide d_model"),
        (["tiny", "--model.n-layers", "-1"], "n_layers must be at least 1, got -1"),
        (
            ["tiny", "--micro-batch-size", "0"],
            "micro_batch_size must be at least 1, or auto",
        ),
        (["tiny", "--activation-checkpointing", "every-3"], "'every-3'"),
        (["tiny", "--max-minutes", "1", "--max-tokens", "9"], "exclude each other"),
        (["tiny", "--optimizer", "sgd", "--beta1", "0.9"], "sgd has no beta1"),
        (["tiny", "--dropout", "1"], "dropout must be in [0, 1), got 1"),
        (["tiny", "--learning-rate", "nan"], "learning_rate must be above 0, got nan"),
        (["tiny", "--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["tiny", "--resume"], "--resume needs the folder of a run: "),
        (["tiny", "--resume", "missing"], "--resume missing: there is no run; "),
        (["tiny", "--learn-rate", "1"], "there is no --learn-rate; did you mean --learning-rate?"),
        (["tiny", "--bf16"], "there is no --bf16: say --precision bfloat16"),
        (["tiny", "--optimizer", "adan"], "optimizer must be one of adamw, adam, sgd"),
        (["tiny", "--max-steps"], "--max-steps takes one value, got none"),
        (["tiny", "--recovery", "1"], "say --recovery or --no-recovery"),
        (["tiny", "--tokenizer", "missing.json"], "missing.json"),
    ],
    ids=lambda x: " ".join(map(str, x[:2])) if isinstance(x, list) else "",
)
def test_refuses_wrong_input_in_one_sentence(
    arguments, message, corpus, tmp_path, home, monkeypatch, capsys
):
    resolved = [x(tmp_path) if callable(x) else x for x in arguments]
    run = tmp_path / "run"
    if "--data" not in resolved:
        resolved += ["--data", corpus]
    if "--resume" not in resolved:
        resolved += ["--out", run]
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, home, *resolved)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("train.py: ")
    assert err.count("train.py: ") == 1
    assert not run.exists()


def test_refuses_an_unknown_flag(home, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, home, "tiny", "--max-step", "3")
    assert stop.value.code == 2
    assert "--max-step" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["exists", "other model", "truncated", "other tokenizer"])
def test_refuses_to_touch_what_does_not_fit(case, corpus, home, tmp_path, monkeypatch, capsys, run):
    folder = tmp_path / "run"
    assert run(folder, "--max-steps", "2") == 0
    arguments = ["tiny", "--max-steps", "2", "--data", corpus, "--out", folder, "--resume"]
    message = {
        "exists": "is not empty; pass --resume",
        "other model": "config.model.n_layers: 2, now 3",
        "truncated": "is damaged; move the folder step-00000002 elsewhere",
        "other tokenizer": "tokenizer",
    }[case]
    if case == "exists":
        arguments.remove("--resume")
    elif case == "other model":
        arguments += ["--model.n-layers", "3"]
    elif case == "truncated":
        weights = folder / "checkpoints" / "step-00000002" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        monkeypatch.setattr(train, "prepare", lambda *_, **__: tmp_path / "shards")
        prepared = max((home / "prepared").glob("*/manifest.json"), key=lambda x: x.stat().st_mtime)
        subprocess.run(["cp", "-r", str(prepared.parent), str(tmp_path / "shards")], check=True)
        Tokenizer.train(["other text " * 50], 300).save(tmp_path / "shards" / "tokenizer.json")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, home, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert "Traceback" not in err
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
