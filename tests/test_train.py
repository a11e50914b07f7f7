"""Prove that train.py does what the README promises: it runs, resumes bit for bit, refuses well."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import triton

import train
from data import Tokenizer

ROOT = Path(__file__).parents[1]
SHORT = ("tiny", "--max-steps", "12", "--save-every", "3", "--sample-tokens", "5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of a few small modules, quick to prepare."""
    folder = tmp_path_factory.mktemp("corpus")
    files = [*sorted(Path(json.__file__).parent.glob("*.py")), Path(os.__file__)]
    for file in files:
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


# Train, then name the kernels that ran.
RECORDER = """
import runpy, sys
from triton.runtime.interpreter import GridExecutor
launched, launch = set(), GridExecutor.__call__
def recording(self, *args, **kwargs):
    launched.add(self.fn.__name__)
    return launch(self, *args, **kwargs)
GridExecutor.__call__ = recording
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
print(*sorted(launched))
"""
KERNELS = (
    "_optimizer_prepare_kernel", "_optimizer_update_kernel", "_cross_entropy_kernel",
    "_grad_norm_partials_kernel", "_norm_forward_tile_kernel", "_norm_backward_tile_kernel",
    "_norm_partials_kernel", "_rope_kernel", "_softmax_forward_tile_kernel",
    "_activation_forward_kernel", "_activation_backward_kernel",
)  # fmt: skip


@pytest.fixture
def start(corpus, home):
    """Start train.py as a user would: a process of its own, its kernels on the references."""

    def start(*arguments: str, interpret: bool = False) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITIUM_HOME": str(home)} | (
            {"TRITON_INTERPRET": "1"} if interpret else {}
        )
        script = ["-c", RECORDER] if interpret else ["train.py"]
        return subprocess.Popen(
            [sys.executable, *script, *arguments, "--data", str(corpus)], cwd=ROOT,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in log(run)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


def test_a_run_leaves_everything_it_promises(start, whole_run):
    out = finish(start(*SHORT, "--out", str(whole_run)))
    assert "bits per byte" in out
    assert "def " in out  # the sample
    assert str(whole_run) in out
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole_run / "config.json").read_text())["config"]["max_steps"] == 12
    assert Tokenizer.load(whole_run).vocab_size == 512
    assert [entry["step"] for entry in log(whole_run)] == list(range(1, 13))
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= log(whole_run)[0].keys()
    assert {"val_loss", "val_bits_per_byte"} <= log(whole_run)[-1].keys()
    kept = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"]


def test_learns(whole_run):
    assert losses(whole_run)[-1] < losses(whole_run)[0] - 0.1


def test_a_killed_run_ends_in_the_same_bytes(start, whole_run, tmp_path):
    run = tmp_path / "killed"
    process = start(*SHORT, "--out", str(run))
    first = run / "checkpoints" / "step-00000003"
    while not first.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(log(run)) < 12
    out = finish(start(*SHORT, "--out", str(run), "--resume"))
    assert "going on from step" in out
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = Path("checkpoints", "step-00000012", name)
        assert (run / last).read_bytes() == (whole_run / last).read_bytes()
    assert losses(run) == losses(whole_run)


def test_resume_without_a_checkpoint_says_so_and_starts(start, whole_run, tmp_path):
    run = tmp_path / "early"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1, "loss": 0.0}\n{"st')  # killed at its second line
    out = finish(start(*SHORT, "--out", str(run), "--resume"))
    assert "starting from the beginning" in out
    assert losses(run) == losses(whole_run)


def test_micro_batches_change_nothing_but_rounding(start, whole_run, tmp_path):
    run = tmp_path / "parts"
    finish(start(*SHORT, "--out", str(run), "--micro-batch-size", "1"))
    assert losses(run) == pytest.approx(losses(whole_run), abs=2e-5)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 fails at range(tensor) with NumPy 2.4; 3.7 mended it",
)
def test_every_kernel_serves_training(start, tmp_path):
    small = ("tiny", "--max-steps", "3", "--batch-size", "2", "--model.max-seq-len", "32",
             "--eval-tokens", "64", "--sample-tokens", "2")  # fmt: skip
    interpreted = start(*small, "--out", str(tmp_path / "kernels"), interpret=True)
    out = finish(interpreted)
    finish(start(*small, "--out", str(tmp_path / "reference")))
    assert losses(tmp_path / "kernels") == pytest.approx(losses(tmp_path / "reference"), abs=1e-4)
    for kernel in KERNELS:
        assert kernel in out, f"{kernel} was not launched"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "there is no preset 'huge'; choose one of small, gpt2, tiny"),
        (["tiny", "--data", "missing.txt"], "missing.txt"),
        (["tiny", "--data", lambda p: write(p / "empty.txt", "")], "empty"),
        (["tiny", "--data", lambda p: write(p / "bad.txt", b"abc \xff def" * 99)], "UTF-8"),
        (["tiny", "--data", lambda p: write(p / "short.txt", "a b c\n\n" * 40)], "short.txt"),
        (["tiny", "--model.vocab-size", "100"], "257"),
        (["tiny", "--model.n-heads", "5"], "n_heads must divide d_model"),
        (["tiny", "--model.n-layers", "-1"], "n_layers must be at least 1, got -1"),
        (["tiny", "--batch-size", "4", "--micro-batch-size", "3"], "micro_batch_size must divide"),
        (["tiny", "--learning-rate", "nan"], "learning_rate must be above 0, got nan"),
        (["tiny", "--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["tiny", "--resume"], "--resume needs --out"),
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
    assert not run.exists()


def test_refuses_an_unknown_flag(home, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, home, "tiny", "--max-step", "3")
    assert stop.value.code == 2
    assert "--max-step" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["exists", "other model", "truncated", "other tokenizer"])
def test_refuses_to_touch_what_does_not_fit(
    case, start, whole_run, corpus, home, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole_run), str(run)], check=True)
    arguments = [*SHORT, "--data", corpus, "--out", run, "--resume"]
    message = {
        "exists": "is not empty; pass --resume",
        "other model": "another model: n_layers 2 (here 3)",
        "truncated": "is damaged; delete or move the folder step-00000012",
        "other tokenizer": "tokenizer",
    }[case]
    if case == "exists":
        arguments.remove("--resume")
    elif case == "other model":
        arguments += ["--model.n-layers", "3"]
    elif case == "truncated":
        weights = run / "checkpoints" / "step-00000012" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        monkeypatch.setattr(train, "prepare", lambda *_, **__: tmp_path / "shards")
        (prepared,) = (home / "prepared").glob("*/manifest.json")
        subprocess.run(["cp", "-r", str(prepared.parent), str(tmp_path / "shards")], check=True)
        Tokenizer.train(["other text " * 50], 300).save(tmp_path / "shards" / "tokenizer.json")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, home, *arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_lives_beside_the_libraries_of_the_same_field():
    command = "import transformers, datasets, kernels, model, data; print(kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
