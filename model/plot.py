"""The pictures of a run: its losses, and the norms of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, isfinite, nan
from pathlib import Path

import numpy as np

COLUMNS = 400  # of a heat map
ROWS = 26  # of a heat map that names every layer


def plot_losses(entries: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss against steps, in nats and in bits.

    Args:
        entries: of the log, in order; at least one with a finite `val_loss`. Losses that are not
            finite are left out.
        path: of the PNG, which appears whole or not at all.
        title: of the picture.
    """
    plt = _pyplot()
    finite = [entry for entry in entries if isfinite(entry["loss"])]
    steps = [entry["step"] for entry in finite]
    losses = [entry["loss"] for entry in finite]
    smooth = list(moving_average(losses))
    measured = [entry for entry in entries if isfinite(entry.get("val_loss", nan))]
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
    _save(figure, path)


def plot_layers(entries: list[dict], path: Path, title: str) -> None:
    """Draw, over depth and steps, each layer's gradient norm and how far its weights move.

    What is zero or not finite is left grey. Where there are more entries than columns, a column
    shows the geometric mean of its entries.

    Args:
        entries: of layers.jsonl; at least one. Of a step that was done twice, the last one counts.
        path: of the PNG, which appears whole or not at all.
        title: of the picture.
    """
    plt = _pyplot()
    latest = {entry["step"]: entry for entry in entries}
    entries = [latest[step] for step in sorted(latest)]
    names = list(dict.fromkeys(name for entry in entries for name in entry["layers"]))
    absent = [float("nan")] * 3
    norms_SN3 = np.array([[x["layers"].get(name, absent) for name in names] for x in entries])
    steps_S = np.array([entry["step"] for entry in entries])
    gradient_SN, update_SN, weight_SN = np.moveaxis(norms_SN3, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_SN = update_SN / weight_SN
    height = min(2.2 + 0.22 * 2 * len(names), 14)
    figure, axes = plt.subplots(2, figsize=(9, height), sharex=True, layout="constrained")
    for panel, values_SN, label in (
        (axes[0], gradient_SN, "gradient norm\n(nats per unit of weight)"),
        (axes[1], ratio_SN, "norm of the update\n/ norm of the weights"),
    ):
        log_SN = np.log(np.where(np.isfinite(values_SN) & (values_SN > 0), values_SN, np.nan))
        edges, columns = _columns(steps_S, log_SN)
        image = panel.pcolormesh(
            edges, np.arange(len(names) + 1), np.ma.masked_invalid(np.exp(columns)).T,
            norm=_colours(columns), cmap="viridis",
        )  # fmt: skip
        panel.set_facecolor("0.8")
        every = ceil(len(names) / ROWS)
        rows = range(0, len(names), every)
        panel.set_yticks([row + 0.5 for row in rows], [names[row] for row in rows])
        figure.colorbar(image, ax=panel, label=label, extend="both")
    axes[1].set_xlabel("optimizer step")
    figure.suptitle(title)
    _save(figure, path)


def _columns(steps: np.ndarray, logs_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join rows of `logs_SN` to at most COLUMNS; return the edges of their steps, and them."""
    parts = np.array_split(np.arange(len(steps)), min(COLUMNS, len(steps)))
    last = np.array([steps[part[-1]] for part in parts])
    first = max(0, 2 * last[0] - last[1]) if len(last) > 1 else 0
    known_CN = np.array([np.isfinite(logs_SN[part]).sum(0) for part in parts])
    sums_CN = np.array([np.nansum(logs_SN[part], 0) for part in parts])
    means_CN = np.where(known_CN > 0, sums_CN / np.maximum(known_CN, 1), np.nan)
    return np.concatenate([[first], last]), means_CN


def _colours(logs_CN: np.ndarray):
    """Return a logarithmic scale that a few odd values do not stretch."""
    from matplotlib.colors import LogNorm

    known = logs_CN[np.isfinite(logs_CN)]
    if not known.size:
        return LogNorm(0.1, 10)
    low, high = np.exp(np.percentile(known, (1, 99)))
    return LogNorm(low / 1.05, high * 1.05)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=130, format="png")
    _pyplot().close(figure)
    draft.rename(path)


def moving_average(values: list[float]) -> Iterator[float]:
    """Smooth exponentially, over about a twentieth of the values, without a bias at the start."""
    decay = 1 - 1 / max(1, len(values) / 20)
    mean = weight = 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        yield mean / weight
