"""The picture of a run's losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def plot_losses(entries: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss against steps, in nats and in bits.

    Args:
        entries: of the log, in order; at least one with `val_loss`.
        path: of the PNG, which appears whole or not at all.
        title: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    smooth = list(moving_average(losses))
    measured = [entry for entry in entries if "val_loss" in entry]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    axes.plot(
        [entry["step"] for entry in measured], [entry["val_loss"] for entry in measured],
        "o-", color="tab:orange", markersize=4, label="validation",
    )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    to_bits = measured[-1]["val_bits_per_byte"] / measured[-1]["val_loss"]
    bits = axes.secondary_yaxis("right", functions=(lambda y: y * to_bits, lambda y: y / to_bits))
    bits.set_ylabel("loss (bits per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=130, format="png")
    plt.close(figure)
    draft.rename(path)


def moving_average(values: list[float]) -> Iterator[float]:
    """Smooth exponentially, over about a twentieth of the values, without a bias at the start."""
    decay = 1 - 1 / max(1, len(values) / 20)
    mean = weight = 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        yield mean / weight
