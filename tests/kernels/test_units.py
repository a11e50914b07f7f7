"""Prove that numbers are shown with three digits, a prefix, and a noun that agrees with them."""

import pytest

from tritium.kernels.units import counted, duration, quantity


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0.00 B"), (999, "999 B"), (1530, "1.53 kB"), (4.3e12, "4.30 TB")]
)
def test_quantities(number, text):
    assert quantity(number, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.50 s"), (0.0125, "12.5 ms"), (3e-6, "3.00 us")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "thing", "text"),
    [
        (1, "thread", "1 thread"),
        (2, "thread", "2 threads"),
        (0, "step", "0 steps"),
        (1024, "micro-batch", "1,024 micro-batches"),
        (1.0, "minute", "1 minute"),
        (0.5, "minute", "0.5 minutes"),
        (3, "process", "3 processes"),
    ],
)
def test_nouns_agree_with_their_number(number, thing, text):
    assert counted(number, thing) == text
