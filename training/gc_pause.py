"""Garbage collection between steps only, because a collection within one would stall the GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_on_request() -> Iterator[Callable[[], int]]:
    """Inside the block, collect only when the function that it gives is called.

    What exists at the beginning is never looked at again, so a call has only the garbage since then
    to go through. Reference counts free everything without cycles at once, as ever.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
