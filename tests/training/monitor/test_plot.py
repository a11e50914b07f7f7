"""Prove that pictures leave out what is not finite, do not lag, and end no run."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritium.training.monitor import plot
from tritium.training.monitor.plot import (
    LossPicture,
    draw,
    moving_average,
    plot_layers,
    plot_losses,
)

ENTRIES = [{"step": i, "loss": 4.0 + i} for i in range(1, 60)]
ENTRIES[20] |= {"val_loss": 5.0, "val_bits_per_byte": 2.0}
LAYERS = [{"step": i, "layers": {"a$x_": [1.0, 0.1, 2.0]}} for i in (1, 2)]


def test_losses_that_are_not_finite_are_left_out(tmp_path, monkeypatch):
    drawn, save = [], plot._save
    monkeypatch.setattr(
        plot, "_save", lambda figure, path: [drawn.append(figure), save(figure, path)]
    )
    entries = [dict(entry) for entry in ENTRIES]
    entries[30]["loss"], entries[40]["loss"] = math.nan, math.inf
    entries[-1] |= {"val_loss": math.nan, "val_bits_per_byte": math.nan}
    plot_losses(entries, tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    (figure,) = drawn
    training, smooth, validation = (line.get_ydata() for line in figure.axes[0].lines)
    assert [len(line) for line in (training, smooth, validation)] == [57, 57, 1]
    assert all(map(math.isfinite, [*training, *smooth, *validation]))


def test_the_gap_is_drawn_where_training_text_was_measured_too(tmp_path, monkeypatch):
    """A line of what was measured alike, and the last gap in the legend."""
    drawn = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: drawn.append(figure))
    entries = [dict(entry) for entry in ENTRIES]
    entries[40] |= {"val_loss": 4.5, "val_bits_per_byte": 2.0, "train_loss": 4.25, "gap": 0.25}
    plot_losses(entries, tmp_path / "loss.png", "run")
    axes = drawn[0].axes[0]
    assert [*axes.lines[3].get_xdata()] == [41]
    assert [*axes.lines[3].get_ydata()] == [4.25]
    assert "gap 0.250" in axes.get_legend().get_texts()[-1].get_text()


@given(st.integers(1, 400), st.floats(-9, 9), st.floats(-9, 9))
def test_a_straight_line_stays_as_it_is_when_smoothed(n, slope, start):
    line = start + slope * np.arange(n)
    np.testing.assert_allclose(list(moving_average(list(line))), line, atol=1e-9)


def test_smoothing_follows_a_loss_that_falls_fast():
    losses = [0.9 + 7.6 * math.exp(-i / 40) for i in range(1500)]
    smooth = list(moving_average(losses))
    assert smooth[200] - losses[200] < 0.3  # a mean of the values before is 1.4 above
    noise = np.random.default_rng(0).standard_normal(2000)
    assert np.std(list(moving_average(list(noise)))[100:-100]) < 0.12


@pytest.mark.parametrize("title", [
    "$\\frac{$", "a$b$c^", "[b]x[/b]", "лиса 狐", "\udce9", "a\nb\x1b[2J\x00", "x" * 300, "",
])  # fmt: skip
def test_no_title_keeps_a_picture_from_being_drawn(title, tmp_path):
    said = []
    for picture, entries in ((plot_losses, ENTRIES), (plot_layers, LAYERS)):
        path = tmp_path / f"{picture.__name__}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(said.append, picture, entries, path, title)
        assert path.exists()
    assert not said


def test_a_picture_that_cannot_be_drawn_is_reported_once(tmp_path, monkeypatch):
    said = []
    (tmp_path / "loss.png").mkdir()
    monkeypatch.setattr(plot, "FIRST", 0.0)
    picture = LossPicture(tmp_path / "loss.png", "run", said.append)
    for _ in range(2):
        picture.refresh(ENTRIES)
        picture.draw(ENTRIES)
    (line,) = said
    assert line.startswith(f"Could not draw {tmp_path / 'loss.png'} (IsADirectoryError")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_pictures_on_the_way_take_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def take_a_second(entries, path, title):
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(plot.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(plot, "plot_losses", take_a_second)
    picture = LossPicture(tmp_path / "loss.png", "run", pytest.fail)
    for _ in range(400):
        picture.refresh(ENTRIES)
        now[0] += 0.5
    assert drawn == [20.0, 70.0, 120.0, 170.0]
    picture.refresh(ENTRIES[:10])  # nothing is validated yet
    assert len(drawn) == 4
    picture.draw(ENTRIES)
    assert len(drawn) == 5
