"""Autocast of a training step: each weight converted once, gradients summed in few launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tritium.model.cpu_linear import Linear
from tritium.model.modules import Embedding

_foreach: Any = torch  # its functions of lists are not exported


class MixedPrecision(AbstractContextManager):
    """Autocast to bfloat16 around the forward and backward passes of a step.

    Inside, the linear layers of the blocks multiply by bfloat16 copies of their weights, which are
    written on entry, all together. The gradient of a copy is added to that of its weight, in
    float32, as soon as it is made: autocast converts it first, and adds it in a second launch. The
    gradients of vectors, one of each pass, are added on leaving, pass by pass, all together. The
    sums and their order are those of autocast, bit for bit; but where kernels run, the gradients of
    embeddings are added to the rows of those of the table that they belong to, in a fixed order.

    After an exception the gradients are incomplete. It is entered again once it has been left.

    Args:
        model: the model, with float32 weights, on the device where it is trained.
    """

    def __init__(self, model: nn.Module):
        self._layers = [
            x for x in model.modules() if isinstance(x, Linear) and x.weight.dtype == torch.float32
        ]
        self._tables = [x for x in model.modules() if isinstance(x, Embedding)]
        self._vectors = [p for p in model.parameters() if p.ndim < 2 and p.requires_grad]
        self._device = next(model.parameters()).device
        self._copies: list[Tensor] | None = None
        self._passes: dict[nn.Parameter, list[Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        weights = [layer.weight for layer in self._layers]
        with torch.no_grad():
            if self._copies is None:
                self._copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
                for copy, weight in zip(self._copies, weights, strict=True):
                    if weight.requires_grad:
                        copy.requires_grad_().register_post_accumulate_grad_hook(_adder(weight))
            _foreach._foreach_copy_(self._copies, weights)
        for layer, copy in zip(self._layers, self._copies, strict=True):
            layer.narrow = copy
        for table in self._tables:
            table.into_grad = True
        with ExitStack() as stack:
            for p in self._vectors:
                stack.enter_context(_Handle(p.register_post_accumulate_grad_hook(self._keep)))
            stack.enter_context(torch.autocast(self._device.type, torch.bfloat16))
            self._stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for layer in self._layers:
            layer.narrow = None
        for table in self._tables:
            table.into_grad = False
        passes, self._passes = self._passes, {}
        if error[0] is not None:
            return
        with torch.no_grad():
            for i in range(1, max(map(len, passes.values()), default=0)):
                more = [grads for grads in passes.values() if len(grads) > i]
                _foreach._foreach_add_([grads[0] for grads in more], [grads[i] for grads in more])
        for p, (total, *_) in passes.items():
            p.grad = total

    def _keep(self, p: nn.Parameter) -> None:
        """Take the gradient of one pass, so that the next is not added to it yet."""
        if p.grad is not None:
            self._passes.setdefault(p, []).append(p.grad)
            p.grad = None


class _Handle(AbstractContextManager):
    """A hook, for as long as a block."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle):
        self._handle = handle

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _adder(weight: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that moves the gradient of a copy of `weight` into that of `weight`."""

    def add(copy: Tensor) -> None:
        narrow, copy.grad = copy.grad, None
        if narrow is None:
            return
        if weight.grad is None:
            weight.grad = narrow.to(weight.dtype)
        else:
            weight.grad.add_(narrow)  # in float32, which `narrow` is read into

    return add
