"""Fixtures of kernels that find their tensors by address."""

import pytest
import torch

from tritium.kernels import runtime
from tritium.kernels.optimizers import (
    Muon,
    _base,
    _muon_launch,
    _pointer_table,
    _step_kernels,
    clip_grad_norm,
    grad_norm,
)

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


@pytest.fixture
def pointer_tables(monkeypatch):
    """Give a small model more chunks than programs, and let the interpreter follow pointers."""
    for module, name, value in SMALLER:
        monkeypatch.setattr(module, name, value)
    if torch.cuda.is_available():
        return
    import strict_interpreter

    step = _base.MultiTensorOptimizer._step_kernels

    def allowed_step(self, found):
        kept = [x for item in found.items for x in (*item.tensors(), item.step) if x is not None]
        rates = [group["lr"] for group in self.param_groups]
        kept += [x for own in self.state.values() for name, x in own.items() if name in self.rows]
        rates = [lr for lr in rates if isinstance(lr, torch.Tensor)]
        with strict_interpreter.allow(*found.grads, *kept, *rates):
            step(self, found)

    def allowed(clip):
        def allowed_clip(grads, *args):
            with strict_interpreter.allow(*grads):
                return clip(grads, *args)

        return allowed_clip

    finish = Muon._finish

    def allowed_finish(self, found, plan, *args):
        with strict_interpreter.allow(plan.x):
            finish(self, found, plan, *args)

    monkeypatch.setattr(Muon, "_finish", allowed_finish)
    monkeypatch.setattr(_base.MultiTensorOptimizer, "_step_kernels", allowed_step)
    for name in ("_launch_clip", "_launch_clip_layers"):
        monkeypatch.setattr(clip_grad_norm, name, allowed(getattr(clip_grad_norm, name)))


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Run a test twice: through the kernels, and through their references."""
    monkeypatch.setattr(runtime, "REFERENCE", request.param == "reference")
