"""Random numbers of a recomputation: the same as of what it repeats.

The modules of a Tritium model draw none, except for dropout, of which callers know. What others
have put into a block, such as an adapter with dropout or a hook that adds noise, may draw some.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from tritium.model.modules import is_hooked

DRAW_NONE = (
    "tritium.model.",
    *(f"torch.nn.modules.{name}" for name in ("container", "linear", "normalization", "sparse")),
)
"""Modules whose classes draw no random numbers of their own accord."""


def may_draw(*modules: Callable) -> bool:
    """Whether calling modules may draw random numbers; unknown ones may."""
    return any(
        not isinstance(module, nn.Module)
        or any(not _draws_none(type(part)) or is_hooked(part) for part in module.modules())
        for module in modules
    )


@functools.cache
def _draws_none(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(DRAW_NONE)


def redrawing(x: Tensor) -> Callable[[], AbstractContextManager]:
    """Return what enters the present state of the generators again, of the CPU's and of x's device.

    Behind it they are where they were before.
    """
    return partial(_entered, torch.get_rng_state(), *get_device_states(x))


@contextmanager
def _entered(state: Tensor, devices: list[int], states: list[Tensor]) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state)
        set_device_states(devices, states)
        yield
