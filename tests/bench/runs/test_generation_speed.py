"""Prove that speeds of generation are compared on the same tokens, and of each round."""

import sys
from dataclasses import replace

import pytest
import torch

from tritium.bench import tables
from tritium.bench.__main__ import main
from tritium.bench.runs import generation


def test_all_write_the_same_tokens_and_each_round_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)  # as the command runs
    small = replace(generation.MODEL, vocab_size=64, n_layers=1, d_model=36, max_seq_len=16)
    monkeypatch.setattr(generation, "MODEL", small)
    monkeypatch.setattr(tables, "results", lambda: tmp_path)
    words = ["--rounds", "2", "--prompt", "3", "--tokens", "4", "--uncached", "--write"]
    monkeypatch.setattr(sys, "argv", ["bench", "generation", *words])
    main()
    said = (tmp_path / "generation.md").read_text()
    assert "--rounds 2 --uncached --write" in said
    rows = [line for line in said.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3
    assert all(line.count(",") >= 1 for line in rows)
    assert rows[-1].rstrip(" |").endswith("1.00")
    capsys.readouterr()


def test_models_that_write_other_tokens_are_not_compared():
    calls = {"one": lambda: torch.zeros(1, 4), "two": lambda: torch.ones(1, 4)}
    with pytest.raises(RuntimeError, match="all must write the same tokens"):
        generation._measured(calls, 1, 4)
