"""Definitions with their gradients written out, for CPUs.

What autograd makes of a definition keeps more tensors than its gradient needs and reads them more
often, and on a CPU that is most of the time of everything between two matrix products. There, where
operators run one by one and a gradient is wanted, the formulas of the kernels are computed instead.
A second derivative is that of the definition.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import _runtime


def is_written_out(*xs: Tensor) -> bool:
    """Whether the gradient with respect to some of `xs` is computed as it is written out."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in xs)
        and all(x.device.type == "cpu" and x.numel() > 0 for x in xs)
        and not torch.compiler.is_compiling()
        # Its transforms need a setup_context, which would cost every call 15 us.
        and not torch._C._are_functorch_transforms_active()
        and not _runtime.REFERENCE
    )


def differentiate(
    definition: Callable[..., Tensor], xs: tuple[Tensor, ...], wanted: tuple[bool, ...], dy: Tensor
) -> list[Tensor | None]:
    """Return the gradients of `definition(*xs)`, None where not wanted, with a graph of theirs."""
    inputs = [x for x, wants in zip(xs, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(definition(*xs), inputs, dy, create_graph=True))
    return [next(found) if wants else None for wants in wanted]
