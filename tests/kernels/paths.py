"""Kernel or reference path for checks on ranks, processes without the fixtures of conftest.py."""

from contextlib import contextmanager

import pytest
from strict_interpreter import allow
from triton import knobs

from tritium.kernels import runtime
from tritium.kernels.optimizers import (
    _base,
    _pointer_table,
    _step_kernels,
    clip_grad_norm,
    grad_norm,
)


@contextmanager
def path(reference):
    """Go through kernels or references; the interpreter may follow the tables of addresses."""
    step, clip = _base.MultiTensorOptimizer._step_kernels, clip_grad_norm._launch_clip

    def allowed_step(self, found):
        kept = [x for item in found.items for x in (*item.tensors(), item.step) if x is not None]
        with allow(*found.grads, *kept):
            step(self, found)

    def allowed_clip(grads, *args):
        with allow(*grads):
            return clip(grads, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "REFERENCE", reference)
        patch.setattr(runtime, "CPU_KERNELS", knobs.runtime.interpret)
        patch.setattr(_pointer_table, "CHUNK", 4096)
        patch.setattr(_step_kernels, "BLOCK", 2048)
        patch.setattr(grad_norm, "BLOCK", 2048)
        patch.setattr(grad_norm, "P", 4)
        patch.setattr(_base.MultiTensorOptimizer, "_step_kernels", allowed_step)
        patch.setattr(clip_grad_norm, "_launch_clip", allowed_clip)
        yield
