"""The states of all random number generators, as JSON."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed(value: int) -> None:
    """Seed the generators of PyTorch (on every device), of Python and of NumPy."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % (1 << 32))


def capture(device: torch.device) -> dict:
    """Return the states of the generators that `seed` seeds, on the host and on `device`."""
    version, words, gauss = random.getstate()
    name, keys, *rest = tuple(np.random.get_state(legacy=True))
    states = {
        "cpu": _encode(torch.get_rng_state()),
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }
    if device.type == "cuda":
        states["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return states


def restore(states: dict, device: torch.device) -> None:
    """Restore the states that `capture` returned, except those of a device not in use."""
    torch.set_rng_state(_decode(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_decode(states["cuda"]), device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Leave the generators after the block as they were before it, whatever it draws."""
    states = capture(device)
    try:
        yield
    finally:
        restore(states, device)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
