"""Prove that ranks draw numbers of their own, and how one ends that fails or has lost another."""

import faulthandler
import json
import os
import signal
import socket
import sys

import pytest
import torch
import torch.distributed as dist

from tritium.training.run import ranks as ranks_module
from tritium.training.run.ranks import SINGLE, LostRankError, Ranks
from tritium.training.signals import StopRequest


def test_ranks_draw_by_step_and_number():
    drawn = set()
    for rank in range(3):
        for step in range(3):
            Ranks(rank, 3).seed_step(1, step)
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 9
    state = torch.get_rng_state()
    SINGLE.seed_step(1, 0)  # whose checkpoints hold the state
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def launched(monkeypatch):
    """Variables of torchrun, as on the only rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("batch_size must be even"), 2, "batch_size must be even"),
        (LostRankError(), 69, None),  # torchrun would take it for the cause: its times are seconds
        (None, 75, None),
        (None, 0, None),
    ],
)
def test_torchrun_is_told_why_a_rank_exits(error, status, told, launched, tmp_path, monkeypatch):
    def main():
        try:
            if error is not None:
                raise error
        except Exception:
            sys.exit(status)
        sys.exit(status)

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(faulthandler, "enable", lambda **_: None)  # pytest's stays
    cut = []  # statuses of ends without the interpreter's
    monkeypatch.setattr(os, "_exit", lambda status: cut.append(status) or sys.exit(status))
    try:
        ranks_module.recorded(main)()
        ended = 0  # torch returns where the status is 0
    except SystemExit as stop:
        ended = stop.code
    assert ended == status
    assert cut == [69] * isinstance(error, LostRankError)
    assert (json.loads(file.read_text())["message"] if file.exists() else None) == told


@pytest.mark.parametrize(
    ("sent", "waits"), [(None, True), ("SIGUSR1", True), ("SIGTERM", False), ("SIGINT", False)]
)
def test_a_rank_that_lost_another_waits_until_torchrun_has_seen_the_cause(
    sent, waits, launched, monkeypatch, capsys
):
    # Whoever waits for this rank meanwhile has to wait as long, and so on from rank to rank.
    slept = []
    monkeypatch.setattr(ranks_module.time, "sleep", slept.append)

    def lose():
        with ranks_module.joined(torch.device("cpu")) as ranks, StopRequest(ranks):
            if sent is not None:
                os.kill(os.getpid(), signal.Signals[sent])
            raise RuntimeError("Connection closed by peer [127.0.0.1]")

    try:
        with pytest.raises(LostRankError):
            lose()
    finally:
        dist.destroy_process_group()
    assert slept == [ranks_module.LINGER] * waits
    lost = "train.py: rank 0: the connection to another rank is lost (Connection closed by peer"
    assert lost in capsys.readouterr().err
