"""Prove that runs with both residual streams are comparable, and that the verdict is theirs."""

import sys
from dataclasses import replace
from functools import partial
from statistics import mean, stdev

import pytest
import torch

from tritium.bench.__main__ import main
from tritium.bench.runs import residual
from tritium.model import Transformer


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)  # as the command runs
    monkeypatch.setattr(residual, "CONFIG", replace(residual.CONFIG, n_layers=1, max_seq_len=32))
    generator = torch.Generator().manual_seed(0)
    length = residual.CONFIG.max_seq_len + 1
    tokens = torch.randint(residual.CONFIG.vocab_size, (4000,), generator=generator)
    return tokens, tokens[: 2 * length].view(2, length)


def made(name):
    return partial(Transformer, residual.CONFIG, residual_dtype=residual.DTYPES[name])


@pytest.mark.parametrize(
    ("off", "agree", "paired"), [(0.0, True, True), (0.01, True, False), (1.0, False, False)]
)
def test_means_are_compared_by_their_standard_errors(off, agree, paired):
    wide = [2.0, 2.1, 2.2]
    narrow = [x + off + jitter for x, jitter in zip(wide, (-1e-4, 0, 1e-4), strict=True)]
    said = residual.verdict({"float32": wide, "bfloat16": narrow})
    assert f"{mean(narrow) - mean(wide):+.5f} nats" in said
    assert ("The means agree" in said) == agree
    assert said.endswith("agree." if paired else "DO NOT AGREE.")
    error = ((stdev(narrow) ** 2 + stdev(wide) ** 2) / 3) ** 0.5
    assert f"({error:.5f})" in said


def test_the_sign_of_a_difference_does_not_matter():
    wide = [2.0, 2.1, 2.2]
    assert "The means DO NOT AGREE" in residual.verdict(
        {"one": wide, "other": [x - 1 for x in wide]}
    )


def test_only_the_dtype_of_the_stream_differs(data, monkeypatch):
    weights, batches, loss_of = [], [], residual.loss_of

    def watched(model, tokens):
        if torch.is_grad_enabled():
            weights.append(model.blocks[0].feed_forward.down.weight.detach().clone())
            batches.append(tokens)
        return loss_of(model, tokens)

    monkeypatch.setattr(residual, "loss_of", watched)
    losses = [residual.train(made(name), 3, 2, data) for name in ("float32", "bfloat16")]
    assert torch.equal(weights[0], weights[2])
    assert all(map(torch.equal, batches[:2], batches[2:]))
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05


def test_a_seed_repeats_its_run_and_another_does_not(data):
    first, again, other = (residual.train(made("bfloat16"), seed, 2, data) for seed in (1, 1, 2))
    assert first == again != other


def test_tabulates_every_seed_of_both(monkeypatch, capsys):
    monkeypatch.setattr(residual.low_precision, "sequences", lambda: (torch.ones(9), torch.ones(9)))
    monkeypatch.setattr(
        residual, "train",
        lambda make, seed, steps, data: seed + (make.keywords["residual_dtype"] is None) / 1000,
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench", "residual", "--seeds", "2", "--steps", "7"])
    main()
    shown = capsys.readouterr().out
    for word in ("0.00000", "1.00000", "0.00100", "1.00100", "0.50100", "+0.00100 nats", "7 steps"):
        assert word in shown, word


def test_the_default_of_a_gpu_is_the_stream_in_bfloat16():
    model = Transformer(residual.CONFIG, residual_dtype=residual.DTYPES["bfloat16"])
    assert model.residual_dtype is None
    assert residual.DTYPES["float32"] == torch.float32
