"""Prove that a run on several ranks is the run of one process, and that it resumes exactly.

Two processes on gloo take one run after another; the test's own process takes the same runs alone.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_runs import RankRuns
from torch.distributed.fsdp import FSDPModule
from train_runs import log, losses

import train
from tritium.model import Transformer
from tritium.model.saved import FILES, read_record, read_tensors
from tritium.model.shapes import num_parameters
from tritium.training.optim import OptimizerConfig
from tritium.training.parallel import Parallel, arguments, auto_mode, group_size_of, mode_of
from tritium.training.precision import Arithmetic
from tritium.training.run import checkpoint
from tritium.training.run.ranks import SINGLE, Ranks
from tritium.training.settings import PRESETS
from tritium.training.validation import ConfigError

ROOT = Path(__file__).parents[2]
STEPS = 6
BASE = (
    "--max-steps",
    str(STEPS),
    "--save-every",
    "2",
    "--eval-every",
    "4",
    "--packing",
    "documents",
    "--optimizer",
    "muon",
    "--row-beta2",
    "0.9",
)
DROPOUT = (*BASE, "--dropout", "0.2")
ALONE = ("--parallel", "auto", "--micro-batch-size", "4", "--activation-checkpointing", "none")
NARROW = ("--max-steps", "4", "--precision", "bfloat16")
KINDS = {
    "ddp": ("--micro-batch-size", "1"),
    "fsdp": ("--parallel", "fsdp", "--micro-batch-size", "1", "--activation-checkpointing", "full"),
    "tp": ("--parallel=tp", "--micro-batch-size=2", "--activation-checkpointing", "selective"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder, corpus, home):
    """Exit status and output of every rank, by name of the run."""
    runs = RankRuns(folder, corpus, home)
    for kind, flags in KINDS.items():
        runs.add(kind, *BASE, *flags)
        runs.add(f"{kind} bfloat16", *NARROW, *flags)
        asynchronous = (*DROPOUT, *flags, *["--save-async"] * (kind != "ddp"))
        runs.add(f"{kind} whole", *DROPOUT, *flags)
        runs.add(f"{kind} crash", *asynchronous, out=f"{kind} cut", crash=5)
        runs.add(f"{kind} signal", *asynchronous, "--resume", out=f"{kind} cut", signal=[1, 1])
        runs.add(f"{kind} end", *DROPOUT, *flags, "--resume", out=f"{kind} cut")
    runs.add("odd", "--batch-size", "3")
    return runs()


def tensors(run):
    """All tensors of the last checkpoint of a run, by file and name."""
    last = checkpoint.checkpoints(run / "checkpoints")[-1]
    record = read_record(last)
    return {(file, k): x for file in FILES for k, x in read_tensors(last, file, record).items()}


def assert_near(run, alone):
    """Assert that losses and weights are those of a run in one process, except for rounding."""
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)
    # Of which neither AdamW nor Muon sees a constant factor, and clipping hides one.
    norms, expected = ([x["grad_norm"] for x in log(r)] for r in (run, alone))
    assert norms == pytest.approx(expected, rel=1e-4)
    val, expected = ([x["val_loss"] for x in log(r) if "val_loss" in x] for r in (run, alone))
    assert val == pytest.approx(expected, abs=1e-5)
    got, wanted = tensors(run), tensors(alone)
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        if name[0] == FILES[0]:
            assert (got[name] - x).norm() <= 1e-4 * x.norm(), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--parallel", "fsdp", "--state-dtype", "uint8"), "could not be resharded"),
        (("--micro-batch-size", "auto"), "auto plans the memory of one process"),
        (("--activation-checkpointing", "auto"), "auto plans the memory of one process"),
    ],
)
def test_what_does_not_combine_is_refused_at_the_start(flags, message, run, tmp_path, monkeypatch):
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "-"}
    for name, value in (environment | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert run(tmp_path / "run", *flags) == 2
    output = run.output()
    assert output.startswith("train.py: rank 1: ")
    assert message in output
    assert not (tmp_path / "run").exists()


SHAPE = PRESETS["tiny"].model


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (2, {"parallel": "hsdp"}, "needs two groups or more, got one of 2 processes"),
        (2, {"group_size": 2}, "--group-size is of --parallel hsdp and tp, got ddp"),
        (4, {"parallel": "tp", "group_size": 3}, "--group-size must divide the 4 processes, got 3"),
        (2, {"parallel": "tp", "group_size": 1}, "a group of two processes or more, got 1"),
        (4, {"parallel": "tp"}, "with --parallel tp n_kv_heads must be divisible by the 4"),
        (2, {"parallel": "tp", "lora_rank": 2}, "adapters .* are not split by --parallel tp"),
        (4, {"parallel": "hsdp", "group_size": 2, "batch_size": 6}, "by the 4 processes, got 6"),
        (4, {"parallel": "tp", "group_size": 2, "batch_size": 3}, "by the 2 groups of processes"),
        (2, {"parallel": "fsdp", "model": replace(SHAPE, reversible=True)}, "halves of blocks"),
        (
            6, {"parallel": "tp", "group_size": 2, "batch_size": 6},
            "d_model must be divisible by the 3 groups of --parallel tp, got 64",
        ),
    ],
)  # fmt: skip
def test_modes_and_groups_that_cannot_be_are_refused(size, changes, message, monkeypatch):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "-"}
    for name, value in (environment | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        mode_of(replace(PRESETS["tiny"], **changes))


def test_a_group_is_a_machine_where_no_size_is_given(monkeypatch):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "-"}
    for name, value in (environment | {"MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    tiny = PRESETS["tiny"]
    for mode in ("hsdp", "tp"):
        assert mode_of(replace(tiny, parallel=mode)) == mode
    assert group_size_of(tiny, 4) == 2
    in_groups = replace(tiny, group_size=4)
    assert group_size_of(in_groups, 4) == 4
    assert mode_of(replace(in_groups, resume=True)) == "ddp"  # of a run that another mode began


@pytest.mark.parametrize(
    ("free", "changes", "chosen", "reason"),
    [
        (40, {}, "ddp", "fit in half of the free memory"),
        (20, {}, "fsdp", "exceed half of the free memory)"),
        (20, {"optimizer": OptimizerConfig(name="muon")}, "fsdp", "exceed half"),
        (20, {"optimizer": OptimizerConfig(state_dtype="uint8")}, "ddp", "but state_dtype must be"),
    ],
)
def test_auto_takes_ddp_where_it_fits_and_says_why(free, changes, chosen, reason, monkeypatch):
    config = replace(PRESETS["tiny"], **changes)
    per_rank = free * num_parameters(config.model)
    monkeypatch.setattr("tritium.training.parallel.free_memory", lambda _: 2 * per_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    mode, said = auto_mode(config, SINGLE, torch.device("cpu"))
    assert mode == chosen
    assert reason in said
    assert reason in str(Parallel(Ranks(0, 2), mode, reason=said))


def test_the_first_rank_alone_tracks_and_a_model_in_parts_draws_no_sample():
    tiny = PRESETS["tiny"]
    asked = replace(tiny.observing, sample_tokens=9, track=("tensorboard",))
    config = replace(tiny, observing=asked)
    first, second = Ranks(0, 2), Ranks(1, 2)
    assert Parallel(first, "ddp").observing(config) == asked
    assert Parallel(first, "fsdp").observing(config) == replace(asked, sample_tokens=0)
    assert Parallel(second, "ddp").observing(config) == replace(asked, sample_tokens=0, track=())


def test_a_restart_needs_a_folder_and_resumes_the_run_in_it(monkeypatch):
    assert arguments(["--out", "a"]) == ["--out", "a"]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "-"}
    for name, value in (environment | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="must know; add --out DIR"):
        mode_of(PRESETS["tiny"])
    named = replace(PRESETS["tiny"], out="a")
    assert mode_of(named) == "ddp"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert mode_of(named) == "ddp"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        mode_of(named)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert arguments(["--out", "a"]) == ["--out", "a", "--resume"]
    assert arguments(["--resume=a"]) == ["--resume=a"]


def test_one_process_needs_torchrun_to_be_several(run, tmp_path):
    assert run(tmp_path / "run", "--parallel", "fsdp") == 2
    assert "--parallel fsdp needs torchrun: torchrun" in run.output()


def mean_of_one(bucket):
    """Return the bucket as reduced over one rank, which no thread of gloo sees.

    Such a thread would drop a future of Python's, for which it needs the interpreter's lock, while
    the group's end waits for the thread with that lock held.
    """
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_per_batch(mode, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        config = PRESETS["tiny"].model
        model, parallel = Transformer(config), Parallel(SINGLE, mode)
        parallel.wrap(model, Arithmetic(torch.float32, nullcontext()))
        reduced, batch = [], torch.randint(config.vocab_size, (2, 4, 8))
        if mode == "ddp":
            parallel._wrapped.register_comm_hook(
                None, lambda _, bucket: reduced.append(bucket.index()) or mean_of_one(bucket)
            )
        else:
            monkeypatch.setattr(
                FSDPModule, "set_requires_gradient_sync", lambda _, syncs: reduced.append(syncs)
            )
        loss = train.accumulate_gradients(model, tuple(batch), 1, nullcontext(), parallel)
        assert loss.isfinite()
        assert reduced == ([0] if mode == "ddp" else [False, False, False, True])
    finally:
        dist.destroy_process_group()


def test_buckets_are_in_the_same_order_in_every_step():
    # Sums over three ranks or more are rounded by an element's place in its bucket.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, parallel = Transformer(PRESETS["tiny"].model), Parallel(SINGLE, "ddp")
        parallel.wrap(model, Arithmetic(torch.float32, nullcontext()))
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        names, orders = {p: name for name, p in model.named_parameters()}, []

        def note(_, bucket):
            orders.append([names[p] for p in bucket.parameters()])
            return mean_of_one(bucket)

        parallel._wrapped.register_comm_hook(None, note)
        batch = torch.randint(PRESETS["tiny"].model.vocab_size, (2, 1, 8))
        for _ in range(3):
            train.accumulate_gradients(model, tuple(batch), 1, nullcontext(), parallel)
        first, *later = orders
        assert later == [first, first]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process(kind, results, folder, run, tmp_path):
    assert [x["status"] for x in results[kind]] == [0, 0], results[kind]
    assert run(tmp_path / "alone", *BASE) == 0
    assert_near(folder / kind, tmp_path / "alone")
    # What two ranks saved, one process resumes.
    checkpoint.remove(folder / kind / "checkpoints" / f"step-{STEPS:08d}")
    assert run(folder / kind, *BASE, *ALONE, "--resume", "--resume-anyway") == 0
    assert [entry["step"] for entry in log(folder / kind)] == [*range(1, STEPS + 1)]
    assert_near(folder / kind, tmp_path / "alone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_communicates_no_more_than_it_must(kind, results):
    # The number of targets, the loss, a signal; of parts, one sum of squares for the clip. Each of
    # two micro-batches gathers the root and two blocks, and in its backward pass the blocks again.
    # Muon sends its matrices to their owners and back.
    wanted = {
        "ddp": {"reduce": 3},  # torch reduces the gradients in C++
        "fsdp": {"reduce": 4, "gather": 2 * (3 + 2), "scatter": 3, "exchange": 2},
        # A signal, the clip; of each micro-batch two for the loss, one for its gradient. What the
        # blocks add up torch reduces by functions of its own.
        "tp": {"reduce": 2 + 2 * 3, "exchange": 2},
    }
    assert [x["calls"] for x in results[kind]] == [wanted[kind]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_two_ranks_train_as_one_process(kind, results, folder, run, tmp_path):
    assert [x["status"] for x in results[f"{kind} bfloat16"]] == [0, 0]
    assert run(tmp_path / "alone", *NARROW) == 0
    narrow = losses(folder / f"{kind} bfloat16")
    assert narrow == pytest.approx(losses(tmp_path / "alone"), abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_by_a_crash_and_a_signal_ends_in_the_same_bits(kind, results, folder):
    statuses = {
        x: [r["status"] for r in results[f"{kind} {x}"]] for x in ("crash", "signal", "end")
    }
    assert statuses == {"crash": [-9, -9], "signal": [75, 75], "end": [0, 0]}
    first, second = results[f"{kind} signal"]
    assert "Stopped by SIGTERM after step 5, which is saved" in first["out"]
    assert "torchrun --nproc-per-node 2 train.py --resume" in first["out"]
    assert second["out"] == ""
    cut, whole = tensors(folder / f"{kind} cut"), tensors(folder / f"{kind} whole")
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], x) for name, x in whole.items())
    assert losses(folder / f"{kind} cut") == losses(folder / f"{kind} whole")


def test_both_kinds_draw_the_same_dropout(results, folder, run, tmp_path):
    assert losses(folder / "ddp whole") == pytest.approx(losses(folder / "fsdp whole"), abs=1e-5)
    assert losses(folder / "ddp whole") != pytest.approx(losses(folder / "ddp"), abs=1e-3)
    # All ranks of tp have all sequences, and leave out what one process would.
    assert run(tmp_path / "alone", *DROPOUT, *KINDS["tp"][1:]) == 0
    assert losses(folder / "tp whole") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_rank_prints_and_writes(kind, results, folder):
    first, second = results[kind]
    assert first["out"].count(f"step {STEPS}/{STEPS}") == 1
    assert f"Parallel: {kind} on 2 ranks" in first["out"]
    taken = {"ddp": "Each takes 2", "fsdp": "Each takes 2", "tp": "Each group takes 4"}[kind]
    several = 2 if kind == "tp" else 1
    assert f"{taken} of the 4 sequences of a batch, {several} at a time; speed" in first["out"]
    assert (second["out"], second["err"]) == ("", "")
    assert not list(folder.glob("tritium-rank-*"))


def test_the_ranks_that_refuse_say_who_they_are(results):
    for rank, result in enumerate(results["odd"]):
        assert result["status"] == 2
        assert result["err"] == (
            f"train.py: rank {rank}: batch_size must be divisible by the 2 processes, got 3; "
            "change --batch-size or torchrun's --nproc-per-node\n"
        )


# Train; in the second step rank 0 asks torchrun to stop, or rank 1 dies, once.
SECOND = """
import itertools, os, signal, time, train
steps, accumulate = itertools.count(1), train.accumulate_gradients
rank, restarted = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
def second(*arguments):
    step = next(steps)
    if EVENT == "stop" and step >= 2:
        if step == 2 and rank == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)  # for torchrun to hear it before the run is at its end
    if EVENT == "kill" and step == 2 and rank == "1" and not restarted:
        os.kill(os.getpid(), signal.SIGKILL)
    return accumulate(*arguments)
train.accumulate_gradients = second
train.main()
"""


def torchrun(script, *arguments, home, restarts=0):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITIUM_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    return subprocess.Popen(
        [sys.executable, *launcher, "--max-restarts", str(restarts), str(script), *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_torchrun_stops_a_run_by_a_signal_and_restarts_it_after_a_kill(
    results, folder, corpus, home, tmp_path
):
    cut = tmp_path / "cut"
    stop, kill = tmp_path / "stop.py", tmp_path / "kill.py"
    for script in (stop, kill):
        script.write_text(f"EVENT = {script.stem!r}\n{SECOND}")
    flags = ("tiny", "--data", str(corpus), "--out", str(cut), "--sample-tokens", "0")
    flags = (*flags, *DROPOUT, *KINDS["ddp"])
    out, _ = torchrun(stop, *flags, home=home).communicate(timeout=300)
    stopped = checkpoint.step_of(checkpoint.checkpoints(cut / "checkpoints")[-1])
    assert f"Stopped by SIGTERM after step {stopped}, which is saved" in out
    assert 2 <= stopped < STEPS
    process = torchrun(kill, *flags, "--resume", home=home, restarts=1)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "failed (exitcode: -9) local_rank: 1" in errors
    whole, ended = tensors(folder / "ddp whole"), tensors(cut)
    assert all(torch.equal(ended[name], x) for name, x in whole.items())
    assert losses(cut) == losses(folder / "ddp whole")
