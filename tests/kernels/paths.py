"""Kernel or reference path, and sizes small enough for the interpreter, also without fixtures."""

from contextlib import contextmanager

import pytest
import torch
from triton import knobs

from tritium.kernels import runtime
from tritium.kernels.optimizers import (
    Muon,
    _base,
    _muon_launch,
    _pointer_table,
    _step_kernels,
    clip_grad_norm,
    grad_norm,
    muon,
)
from tritium.kernels.optimizers._dtensor import local

SMALLER = [
    (_pointer_table, "CHUNK", 4096),
    (_step_kernels, "BLOCK", 2048),
    (grad_norm, "BLOCK", 2048),
    (clip_grad_norm, "LAYER_BLOCK", 4),
    (grad_norm, "P", 4),
    (_muon_launch, "TILE", 16),
    (_muon_launch, "DEPTH", 16),
    (_muon_launch, "ROW_BLOCK", 16),
]


def follow_tables(patch: pytest.MonkeyPatch) -> None:
    """Give a small model more chunks than programs, and let the interpreter follow addresses."""
    for module, name, value in SMALLER:
        patch.setattr(module, name, value)
    if torch.cuda.is_available():
        return
    from strict_interpreter import allow

    step, finish = _base.MultiTensorOptimizer._step_kernels, Muon._finish
    orthogonalize = _muon_launch.launch_orthogonalization

    def allowed_step(self, found):
        kept = [x for item in found.items for x in (*item.tensors(), item.step) if x is not None]
        rates = [group["lr"] for group in self.param_groups]
        rows = [x for own in self.state.values() for name, x in own.items() if name in self.rows]
        kept += map(local, rows)
        rates = [lr for lr in rates if isinstance(lr, torch.Tensor)]
        with allow(*found.grads, *kept, *rates):
            step(self, found)

    def allowed_finish(self, found, plan, *args):
        with allow(plan.results):
            finish(self, found, plan, *args)

    def allowed_orthogonalization(plan, *args):
        with allow(*(plan.exchange.moments.values() if plan.exchange else ())):
            orthogonalize(plan, *args)

    def allowed(clip):
        def allowed_clip(grads, *args):
            with allow(*grads):
                return clip(grads, *args)

        return allowed_clip

    patch.setattr(Muon, "_finish", allowed_finish)
    patch.setattr(muon, "launch_orthogonalization", allowed_orthogonalization)
    patch.setattr(_base.MultiTensorOptimizer, "_step_kernels", allowed_step)
    for name in ("_launch_clip", "_launch_clip_layers"):
        patch.setattr(clip_grad_norm, name, allowed(getattr(clip_grad_norm, name)))


@contextmanager
def path(reference):
    """Go through kernels or references; the interpreter may follow the tables of addresses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "REFERENCE", reference)
        patch.setattr(runtime, "CPU_KERNELS", knobs.runtime.interpret)
        follow_tables(patch)
        yield
