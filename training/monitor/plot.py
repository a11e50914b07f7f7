"""Plots of a run: its losses, and the norms of its layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from math import ceil, isfinite, log, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tritium.training.monitor.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 400  # of a heat map
ROWS = 26  # of a heat map that names every layer
TITLE = 90  # characters
FIRST = 20.0  # seconds into a run, before which no picture is drawn
SHARE = 0.02  # of the run's time, for pictures before its end


def plot_losses(entries: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss against steps, in nats and in bits.

    Also, once a run reads its text again, that of training text measured as validation is.

    Args:
        entries: entries of the log, in order; at least one with a finite `val_loss`. Losses that
            are not finite are left out.
        path: the PNG, written atomically.
        title: title of the picture.
    """
    finite = [entry for entry in entries if isfinite(entry["loss"])]
    steps = [entry["step"] for entry in finite]
    losses = [entry["loss"] for entry in finite]
    smooth = list(moving_average(losses))
    measured = [entry for entry in entries if isfinite(entry.get("val_loss", nan))]
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    axes.plot(
        [entry["step"] for entry in measured], [entry["val_loss"] for entry in measured],
        "o-", color="tab:orange", markersize=4, label="validation",
    )  # fmt: skip
    again = [entry for entry in measured if isfinite(entry.get("train_loss", nan))]
    if again:
        axes.plot(
            [entry["step"] for entry in again], [entry["train_loss"] for entry in again],
            "o--", color="tab:green", markersize=4,
            label=f"training text, measured alike: gap {again[-1]['gap']:.3f} at the end",
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title(_title(title), parse_math=False)
    last = measured[-1]
    to_bits = last["val_bits_per_byte"] / last["val_loss"] if last["val_loss"] else 1 / log(2)
    scale = (lambda y: np.multiply(y, to_bits), lambda y: np.divide(y, to_bits))
    bits = axes.secondary_yaxis("right", functions=scale)
    bits.set_ylabel("loss (bits per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_layers(entries: list[dict], path: Path, title: str) -> None:
    """Draw, over depth and steps, each layer's gradient norm and how far its weights move.

    What is zero or not finite is left grey. Where there are more entries than columns, a column
    shows the geometric mean of its entries.

    Args:
        entries: entries of layers.jsonl; at least one. Of a repeated step, the last one counts.
        path: the PNG, written atomically.
        title: title of the picture.
    """
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
    figure = _figure(9, height)
    axes = figure.subplots(2, sharex=True)
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
    figure.suptitle(_title(title)).set_parse_math(False)
    _save(figure, path)


def _columns(steps: np.ndarray, logs_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average rows of `logs_SN` to at most COLUMNS; return the edges of their steps, and them."""
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


def _figure(width: float, height: float) -> Figure:
    """Make a figure, independent of windows and of the user's matplotlib settings."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _title(text: str) -> str:
    """Return a title on one line: a folder's name may hold anything."""
    text = printable(text)
    return text if len(text) <= TITLE else f"{text[: TITLE // 2]}…{text[-TITLE // 2 :]}"


def _save(figure: Figure, path: Path) -> None:
    draft = path.with_name(f".{path.name}")
    try:
        figure.savefig(draft, dpi=130, format="png")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def draw(log: Callable[[str], None], picture: Callable[..., None], *arguments) -> None:
    """Draw a picture of a run; if that fails, log the error instead of raising it.

    Args:
        log: called with one line if it fails.
        picture: the function that draws, such as `plot_losses`.
        arguments: its arguments, the second being the path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of letters that the font lacks
            from matplotlib import style

            with style.context("default"):  # not that of a user's matplotlibrc, such as LaTeX
                picture(*arguments)
    except Exception as error:
        why = str(error).strip().splitlines() or [""]
        log(f"Could not draw {arguments[1]} ({type(error).__name__}: {why[-1]}).")


class LossPicture:
    """loss.png of a run: drawn at its end, and before, for at most a fiftieth of its time.

    Args:
        path: the PNG.
        title: title of the picture.
        log: called with one line if drawing fails; once for the pictures before the end.
    """

    def __init__(self, path: Path, title: str, log: Callable[[str], None]):
        self._path, self._title, self._log = path, title, log
        self._next = time.perf_counter() + FIRST
        self._failed = False

    def refresh(self, entries: list[dict]) -> None:
        """Draw it, if it is due."""
        began = time.perf_counter()
        if began >= self._next and not self._failed:
            self.draw(entries)
            self._next = began + (time.perf_counter() - began) / SHARE

    def draw(self, entries: list[dict]) -> None:
        """Draw it, if there is a finite validation loss in the log."""
        if any(isfinite(entry.get("val_loss", nan)) for entry in entries):
            draw(self._say, plot_losses, entries, self._path, self._title)

    def _say(self, failure: str) -> None:
        if not self._failed:
            self._log(failure)
        self._failed = True


def moving_average(values: list[float]) -> Iterator[float]:
    """Smooth over about a tenth of the values, each in the middle of those that make its mean.

    So the curve does not lag behind one that falls, as a mean of earlier values alone would: a
    straight line stays as it is. Near both ends, where one side is short of values, a line is
    fitted to those there are.
    """
    n = len(values)
    half = n // 20
    y = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    for i in range(n):
        first, last = max(0, i - half), min(n - 1, i + half)
        if first + last == 2 * i:
            yield float((sums[last + 1] - sums[first]) / (last - first + 1))
        else:
            x = np.arange(first, last + 1) - i
            slope = ((x - x.mean()) * y[first : last + 1]).sum() / ((x - x.mean()) ** 2).sum()
            yield float(y[first : last + 1].mean() - slope * x.mean())
