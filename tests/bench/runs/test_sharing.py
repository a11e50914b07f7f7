"""Prove that runs shared in different ways are compared in every loss and every weight."""

import json

import pytest
import torch

from tritium.bench.runs.parallel import RESUMED, SHARINGS, RunError, Sharing, apart
from tritium.model import ModelConfig, Transformer
from tritium.training.optim import OptimizerConfig
from tritium.training.parallel import SHARDED
from tritium.training.run import checkpoint

CONFIG = ModelConfig(vocab_size=8, n_layers=1, d_model=4, n_heads=1, max_seq_len=4)


def a_run(folder, losses, change=0.0, config=CONFIG):
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        model.norm.weight[0] += change
    taken = checkpoint.snapshot(2, model, OptimizerConfig().make(model), {}, copy=False)
    checkpoint.write(folder / "checkpoints", taken)
    (folder / "log.jsonl").write_text("".join(json.dumps({"loss": x}) + "\n" for x in losses))
    return folder


def test_the_largest_differences_are_found(tmp_path):
    alone = a_run(tmp_path / "alone", [3.0, 2.0, 1.0])
    assert apart(a_run(tmp_path / "same", [3.0, 2.0, 1.0]), alone) == (0.0, 0.0)
    far = apart(a_run(tmp_path / "far", [3.0, 2.5, 1.25], change=0.5), alone)
    assert far == pytest.approx((0.5, 0.25))  # of a norm's four ones
    with pytest.raises(ValueError, match="longer"):
        apart(a_run(tmp_path / "short", [3.0, 2.0]), alone)
    untied = ModelConfig(**vars(CONFIG) | {"tie_embeddings": False})
    with pytest.raises(RunError, match="other names"):
        apart(a_run(tmp_path / "other", [3.0, 2.0, 1.0], config=untied), alone)


def test_every_mode_is_run_and_what_is_resumed_was_run():
    assert {x.mode for x in SHARINGS} == {"ddp", *SHARDED}
    assert {by for by, _ in RESUMED} <= {x for x in SHARINGS if x.processes == 4}  # run first
    assert len({(x.mode, x.processes) for x in SHARINGS}) == len(SHARINGS)  # names of folders
    assert Sharing(4, "hsdp", 2).flags == ["--parallel", "hsdp", "--group-size", "2"]
    assert str(Sharing(4, "hsdp", 2)) == "4 processes, hsdp, groups of 2"
