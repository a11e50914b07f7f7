"""Prove that plans fit, that their times add up, and that what cannot be is said in a sentence."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritium.bench import tables
from tritium.bench.__main__ import main
from tritium.bench.scale.compute import MEASURED, reached
from tritium.bench.scale.links import find_links
from tritium.bench.scale.parts import MODES, mesh_of
from tritium.bench.scale.predict import Job, Plan
from tritium.bench.scale.scale import Cluster, choose
from tritium.kernels.roofline import MATRIX_SHARE
from tritium.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=512, n_layers=3, d_model=64, n_heads=8, n_kv_heads=8, d_ff=128, max_seq_len=32
)
JOB = Job(CONFIG, 64)
DEVICE, LINKS = find_links("h200")
CLUSTER = Cluster(DEVICE, LINKS, 8)


def test_a_measured_step_reaches_what_rooflines_allow():
    assert 0.6 < reached() < 0.9
    root = Path(__file__).parents[3]
    kept = (root / "bench/results/h100_step.md").read_text()
    first = next(x for x in kept.splitlines() if x.startswith("| two micro-batches"))
    assert f" {1e3 * MEASURED:.1f} |" in first
    page = (root / "docs/parallel.md").read_text()
    assert f"GPT-2 124M reached {100 * reached():.0f} % ({1e3 * MEASURED:.1f} ms" in page


@pytest.mark.parametrize("mode", MODES)
def test_times_of_a_step_add_up(mode):
    times = {}
    for network in (5e9, 50e9, 500e9):
        for policy in ("none", "full"):
            plan = Plan(JOB, mesh_of(mode, 16, 8, CONFIG), 2, policy)
            links = replace(LINKS, network=network)
            time = times[network, policy] = plan.time(DEVICE, links, reached())
            assert 0 < time.exposed <= time.communication
            assert time.total == time.arithmetic + time.exposed
            assert time.utilisation(JOB, DEVICE, 16) < MATRIX_SHARE * reached()
            assert time.tokens_per_second(JOB) * time.total == pytest.approx(64 * 32)
    assert times[5e9, "none"].exposed > times[50e9, "none"].exposed >= times[500e9, "none"].exposed
    assert times[5e9, "full"].arithmetic > times[5e9, "none"].arithmetic


def test_sharding_divides_what_is_kept_and_checkpointing_what_is_live():
    def memory(mode, gpus, policy="none"):
        return Plan(JOB, mesh_of(mode, gpus, 8, CONFIG), 4, policy).memory

    kept = [memory("fsdp", n).weights for n in (1, 2, 4, 8)]
    assert kept == [kept[0] >> i for i in range(4)]  # all rows are multiples of 8
    assert memory("hsdp", 16).weights == memory("fsdp", 8).weights
    assert memory("ddp", 16).weights == kept[0]
    assert kept[0] / 8 < memory("tp", 8).weights < kept[0] / 6  # norms are on every rank
    assert memory("ddp", 16, "full").activations < memory("ddp", 16).activations
    float32 = replace(JOB, dtype=torch.float32)
    wide = Plan(float32, mesh_of("ddp", 16, 8, CONFIG), 4, "none").memory
    assert wide.activations == pytest.approx(2 * memory("ddp", 16).activations, abs=1)


def test_the_fastest_plan_that_fits_is_chosen():
    roomy = choose(JOB, "ddp", 8, CLUSTER)
    assert roomy.plan is not None
    assert roomy.plan.policy == "none"
    assert roomy.plan.passes * roomy.plan.micro_batch * 8 == 64
    need = roomy.plan.memory.total
    tight = Cluster(DEVICE, replace(LINKS, memory=need / 0.9 - 1000), 8)
    other = choose(JOB, "ddp", 8, tight)
    assert other.plan is not None
    assert other.plan.memory.total < need
    assert other.time(tight).total > roomy.time(CLUSTER).total
    none = choose(JOB, "ddp", 8, Cluster(DEVICE, replace(LINKS, memory=1000), 8))
    assert none.plan is None
    assert "of whose memory a step may take" in none.problem


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench", "scale", *words])
    main()


def test_the_command_prints_tables_draws_and_refuses(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    monkeypatch.setattr(ModelConfig, "named", classmethod(lambda cls, name: CONFIG))
    monkeypatch.setenv("COLUMNS", "200")
    small = ("--batch-size", "32", "--length", "32", "--network", "25", "--write")
    run_main(monkeypatch, "--gpus", "8,24,64", *small)
    said = capsys.readouterr().out
    assert "Predicted, not measured: llama-3.1-8b, 32 sequences of 32 tokens in a step" in said
    assert "8 GPUs, hsdp: hsdp on 8 GPUs of one node is fsdp." in said
    assert "64 GPUs, fsdp: a batch of 32 sequences cannot be shared out by 64 GPUs" in said
    assert "24 GPUs, ddp: a batch of 32 sequences cannot be shared out by 24 GPUs" in said
    text = (tmp_path / "scale.md").read_text()
    assert "8 GPUs: " in text
    assert " is the fastest: --parallel " in text
    assert "| 64   | tp   | 1 × 8 × 8" in text
    assert 5_000 < (tmp_path / "scale.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "llama-9"), "there is no shape 'llama-9'"),
        (("--device", "4090"), "links are known"),
        (("--gpus", "8,x"), "gpus must be numbers with commas between them, got '8,x'"),
        (("--gpus", "0"), "gpus, batch-size, length and node must be at least 1"),
    ],
)
def test_wrong_input_ends_in_a_sentence(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, *words)
    assert message in capsys.readouterr().err
