"""`torch.optim.Optimizer` without the import of torch._dynamo.

PyTorch keeps its compiler out of four methods of an optimizer, and for that imports it at the first
call of one: 1.2 s of processor time in each process. While it is not imported nothing is compiled,
and there is nothing to keep out; the methods run as they are behind PyTorch's decorator.
"""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch._compile import _disable_dynamo

_DECORATED = _disable_dynamo(lambda: None).__code__  # that of every function it returns


class TorchOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does."""
        _plain(super().add_param_group)(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.Optimizer.state_dict` returns."""
        return _plain(super().state_dict)()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `torch.optim.Optimizer.load_state_dict` does."""
        _plain(super().load_state_dict)(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as `torch.optim.Optimizer.zero_grad` does."""
        _plain(super().zero_grad)(set_to_none)


def _plain(method: Any) -> Callable[..., Any]:
    """Return a method without PyTorch's decorator, but with those that others put around it."""
    if "torch._dynamo" in sys.modules or method.__code__ is not _DECORATED:
        return method
    return MethodType(method.__wrapped__, method.__self__)
