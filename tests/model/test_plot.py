"""Prove that the picture of a run leaves out what is not finite."""

import math

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from model.plot import plot_losses


def test_losses_that_are_not_finite_are_left_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    entries = [{"step": i, "loss": 4.0 + i} for i in range(1, 60)]
    entries[30]["loss"], entries[40]["loss"] = math.nan, math.inf
    entries[20] |= {"val_loss": 5.0, "val_bits_per_byte": 2.0}
    entries[-1] |= {"val_loss": math.nan, "val_bits_per_byte": math.nan}
    plot_losses(entries, tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert isinstance(figure, Figure)
    training, smooth, validation = (line.get_ydata() for line in figure.axes[0].lines)
    assert [len(line) for line in (training, smooth, validation)] == [57, 57, 1]
    assert all(map(math.isfinite, [*training, *smooth, *validation]))
