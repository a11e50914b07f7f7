"""Prove the learning rate of every schedule at its corners, and how long a run lasts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.training.schedule import Budget, Length, Schedule

SHAPES = ("linear", "cosine", "constant", "trapezoid", "inverse-sqrt")
shapes = st.sampled_from(SHAPES)


@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        ("linear", 0, 0.1), ("linear", 9, 1.0), ("linear", 10, 1.0), ("linear", 60, 0.6),
        ("linear", 110, 0.2), ("linear", 999, 0.2),
        ("cosine", 10, 1.0), ("cosine", 60, 0.6), ("cosine", 35, 0.8828), ("cosine", 110, 0.2),
        ("constant", 4, 0.5), ("constant", 109, 1.0),
        ("trapezoid", 84, 1.0), ("trapezoid", 85, 1.0), ("trapezoid", 97, 0.616),
        ("trapezoid", 110, 0.2),
        ("inverse-sqrt", 9, 1.0), ("inverse-sqrt", 39, 0.6), ("inverse-sqrt", 999, 0.28),
    ],
)  # fmt: skip
def test_learning_rate(shape, step, expected):
    schedule = Schedule(
        shape, learning_rate=1.0, warmup_steps=10, final_lr=0.2, decay_fraction=0.25
    )
    assert schedule.rate(step, Budget(110)) == pytest.approx(expected, abs=1e-4)


@given(shapes, st.integers(0, 50), st.integers(1, 300), st.floats(0, 1), st.floats(0.01, 1))
def test_rises_once_then_never(shape, warmup, steps, final, decay):
    schedule = Schedule(shape, 2.0, warmup, final, decay)
    rates = [schedule.rate(step, Budget(steps)) for step in range(steps)]
    top = min(warmup, steps) - 1 if warmup else 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 <= rate <= 2.0 for rate in rates)
    if warmup <= steps:
        assert rates[top] == pytest.approx(2.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decay_is_fitted_to_the_clock(shape):
    schedule, budget = Schedule(shape, 1.0, warmup_steps=4, final_lr=0.1), Budget(seconds=60)
    assert schedule.rate(1, budget, 59) == 0.5  # warm-up is by steps
    rates = [schedule.rate(100, budget, seconds) for seconds in (30, 48, 60)]
    expected = {
        "linear": [0.55, 0.28, 0.1],
        "cosine": [0.55, 0.1 + 0.9 * (1 + math.cos(0.8 * math.pi)) / 2, 0.1],
        "constant": [1, 1, 1],
        "trapezoid": [1, 1, 0.1],
        "inverse-sqrt": [0.1 + 0.9 * (4 / 101) ** 0.5] * 3,
    }[shape]
    assert rates == pytest.approx(expected)


def test_a_budget_ends():
    assert not Budget(5).spent(4, 1e9)
    assert Budget(5).spent(5, 0.0)
    assert not Budget(seconds=60).spent(10**9, 59.9)
    assert Budget(seconds=60).spent(0, 60.0)
    assert Budget(seconds=60).used(7, 15.0) == 0.25
    assert Budget(10).used(5, 1e9) == 0.5


def test_a_length_ends_at_the_first_of_steps_epochs_and_tokens():
    assert Length(max_steps=7).budget(100, 5) == Budget(steps=7)
    assert Length(max_steps=7, max_tokens=501).budget(100, 5) == Budget(steps=6)
    assert Length(max_steps=7, max_epochs=1.5).budget(100, 4.1) == Budget(steps=7)
    assert Length(max_steps=8, max_epochs=1.5).budget(100, 4.1) == Budget(steps=7)
    assert Length(max_epochs=0.001).budget(100, 4.1) == Budget(steps=1)
    assert Length(max_minutes=1.5).budget(100, 5) == Budget(seconds=90)
    with pytest.raises(ValueError, match="max_steps and max_minutes exclude each other"):
        Length(max_steps=1, max_minutes=1).check()
    with pytest.raises(ValueError, match="a run needs an end"):
        Length().check()
