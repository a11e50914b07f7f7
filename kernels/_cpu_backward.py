"""Hand-written CPU backward passes: fewer saved tensors than autograd.

Autograd of a reference saves more tensors than the gradient needs and reads them more often; on a
CPU that is most of the time spent between two matrix products. Where operators run one by one on a
CPU and a gradient is wanted, the formulas of the kernels are computed instead. A second derivative
is that of the reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tritium.kernels import runtime


def uses_cpu_backward(*xs: Tensor) -> bool:
    """Return whether the hand-written backward applies: on a CPU, for a gradient of some `xs`."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs) and _runs_on_cpu(xs)


def needs_no_graph(*xs: Tensor) -> bool:
    """Return whether operators run one by one on a CPU where no gradient of `xs` is wanted."""
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    return not wants and _runs_on_cpu(xs)


def _runs_on_cpu(xs: tuple[Tensor, ...]) -> bool:
    return (
        not torch.compiler.is_compiling()  # before any size is asked for, which may be unknown
        and all(x.device.type == "cpu" and x.numel() > 0 for x in xs)
        # Transforms need a setup_context, which would cost every call 15 us.
        and not runtime.sees_through()
        and not runtime.REFERENCE
    )


def differentiate(
    definition: Callable[..., Tensor], xs: tuple[Tensor, ...], wanted: tuple[bool, ...], dy: Tensor
) -> list[Tensor | None]:
    """Return the gradients of `reference(*xs)`, None where not wanted, with a graph of their own.

    The gradient ends at views of `xs`, each its own: where one of `xs` was computed from another,
    or is the other, what reaches one by way of the other is left to autograd, which adds it.
    """
    ends = [None if x is None else x.view_as(x) for x in xs]
    inputs = [x for x, wants in zip(ends, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(definition(*ends), inputs, dy, create_graph=True))
    return [next(found) if wants else None for wants in wanted]
