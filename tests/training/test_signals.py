"""Prove that a signal is noted and answered at once, and that its words do not tear the panel."""

import io
import os
import signal
import sys
import time

import pytest
from rich.console import Console

from tritium.training.monitor.display import Display
from tritium.training.schedule import Budget
from tritium.training.signals import StopRequest

WORDS = "SIGTERM: finishing the step and saving; once more stops at once"


def wait_for(found):
    end = time.monotonic() + 10
    while not found() and time.monotonic() < end:
        time.sleep(0.01)
    assert found()


def test_a_signal_is_noted_and_answered(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: WORDS in said.getvalue())
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one kills


@pytest.mark.parametrize("stream", [None, "closed"])
def test_nobody_has_to_hear_it(stream, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", stream and closed)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.name == "SIGINT")
        time.sleep(0.05)  # in which a thread would end in a traceback, an error in this suite


def test_the_words_stand_above_the_panel():
    to = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with StopRequest(), Display(Budget(steps=8), 0, 0.0, "run", to=to):
        wait_for(lambda: "first step" in to.file.getvalue())
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: WORDS in to.file.getvalue())
        wait_for(lambda: "first step" in to.file.getvalue().partition(WORDS)[2])
    before = to.file.getvalue().partition(WORDS)[0]
    assert before.endswith("\x1b[1A\x1b[2K")  # the panel is wiped first
