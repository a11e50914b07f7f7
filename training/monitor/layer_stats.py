"""Gradient, update and weight norms of every layer, and warnings about them.

They come with the optimizer's own pass over the parameters (`record_norms`), and stay on the device
until the losses are read. A layer is the embedding, the attention or the feed-forward part of a
block with the norm before it, the last norm, or the head.
"""

from __future__ import annotations

from collections import deque
from math import isfinite, sqrt
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritium.training.optim import Optimizer

GRADIENT, UPDATE, WEIGHT = range(3)

MAX_RATIO = 100.0  # a default run stays within 3.6 of either median
HISTORY = 20
MIN_HISTORY = 5
CONSECUTIVE = 3
ADVICE = {
    "vanishes": "look for a layer that is detached, scaled to almost nothing or saturated",
    "explodes": "lower the learning rate, warm up longer, or look for a layer scaled too far up",
}


class _Reading(NamedTuple):
    step: int
    names: list[str]
    """Layer of each parameter."""
    norms: Tensor
    """Norms of gradient, update and weight, `[3, N]`."""


class LayerStats:
    """Gradient, update and weight norms per layer, read together with the losses.

    Args:
        model: whose parameters the optimizer updates.
    """

    def __init__(self, model: nn.Module):
        self._layer = {id(p): layer_of(name) for name, p in model.named_parameters()}
        self._unread: list[_Reading] = []

    def record(self, step: int, optimizer: Optimizer) -> None:
        """Keep the norms of the step just taken, on the device."""
        norms = optimizer.norms()
        if norms is not None:
            names = [self._layer[id(p)] for p in norms.params]
            self._unread.append(_Reading(step, names, torch.stack(norms[1:])))

    def read(self) -> list[dict]:
        """Return the norms since the last call, one entry per step, and wait for the device.

        An entry holds its `step`, and in `layers` the norms of gradient, update and weight by name,
        in that order, over all parameters of the layer that had a gradient.
        """
        entries = []
        for step, names, norms_3N in self._unread:
            present = set(names)
            squares = {name: [0.0] * 3 for name in self._layer.values() if name in present}
            for name, *norms in zip(names, *norms_3N.tolist(), strict=True):
                for kind, norm in enumerate(norms):
                    squares[name][kind] += norm * norm
            layers = {
                name: [float(f"{sqrt(x):.5g}") for x in sums] for name, sums in squares.items()
            }
            entries.append({"step": step, "layers": layers})
        self._unread = []
        return entries


class LayerWatch:
    """Warns when the gradient of a layer vanishes or explodes.

    Measured is the root mean square of a layer's gradient. It explodes if it is not finite, or more
    than MAX_RATIO times the median of all layers at the same step, or of the layer's last HISTORY
    readings if there are MIN_HISTORY; it vanishes if it is zero or missing, or less than
    1 / MAX_RATIO of either median. Warn after CONSECUTIVE such readings; warn again only after a
    normal one.

    Args:
        model: the model to watch.
        before: entries of an earlier part of the run, which count as history.
    """

    def __init__(self, model: nn.Module, before: list[dict]):
        self._sizes: dict[str, int] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                layer = layer_of(name)
                self._sizes[layer] = self._sizes.get(layer, 0) + p.numel()
        self._history = {name: deque[float](maxlen=HISTORY) for name in self._sizes}
        self._bad = dict.fromkeys(self._sizes, 0)
        for entry in before[-HISTORY:]:
            self.judge(entry)

    def judge(self, entry: dict) -> list[str]:
        """Return the warnings that this entry completes, one per kind of trouble."""
        scales = {
            name: entry["layers"].get(name, (0.0,))[GRADIENT] / sqrt(size)
            for name, size in self._sizes.items()
        }
        middle = median([x for x in scales.values() if isfinite(x)] or [0.0])
        found: dict[str, list[str]] = {}
        for name, scale in scales.items():
            trouble = self._trouble(name, scale, middle)
            self._bad[name] = self._bad[name] + 1 if trouble else 0
            if not trouble:
                self._history[name].append(scale)
            elif self._bad[name] == CONSECUTIVE:
                found.setdefault(trouble, []).append(f"{name} ({scale:.1e})")
        return [
            f"Step {entry['step']:,}: the gradient {trouble} in {', '.join(layers)}; its root mean "
            f"square in the median layer is {middle:.1e}. Hint: {ADVICE[trouble]}."
            for trouble, layers in found.items()
        ]

    def _trouble(self, name: str, scale: float, middle: float) -> str:
        own = self._history[name]
        usual = [middle, median(own)] if len(own) >= MIN_HISTORY else [middle]
        if not isfinite(scale) or any(scale > MAX_RATIO * x for x in usual):
            return "explodes"
        return "vanishes" if not scale or any(scale < x / MAX_RATIO for x in usual) else ""


def layer_of(parameter: str) -> str:
    """Return the layer that a parameter belongs to, such as `blocks.0.attention`, by its name."""
    parts = parameter.split(".")
    return ".".join(parts[:3]).removesuffix("_norm") if parts[0] == "blocks" else parts[0]
