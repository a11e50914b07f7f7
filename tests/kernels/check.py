"""Comparison of a kernel with its reference: outputs and gradients, in the dtype of training."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def check(
    kernel: Callable,
    reference: Callable,
    *inputs: Tensor,
    slack: float = 2.0,
    needs_grad: Sequence[int] | None = None,
    unit: float = 0.0,
) -> None:
    """Assert that `kernel` errs at most `slack` times as much as `reference` does.

    The error of each is its distance from `reference` run in float64 on the same inputs: the
    rounding that the dtype itself imposes is the measure, so no tolerance is chosen by hand. One
    unit of the dtype's rounding is allowed in addition, at the scale of the largest value, or of
    `unit` if that is larger: the size of the terms that a small result is the difference of.

    Both functions take the tensors `inputs` alone and return a tensor or a tuple of tensors.
    Gradients are compared for the inputs that `needs_grad` names by index (default: all).
    """
    wanted = range(len(inputs)) if needs_grad is None else needs_grad
    dys = [torch.randn_like(y) for y in _tuple(reference(*inputs))]
    exact = _outputs_and_gradients(
        reference, [x.double() for x in inputs], [dy.double() for dy in dys], wanted
    )
    rounded = _outputs_and_gradients(reference, inputs, dys, wanted)
    actual = _outputs_and_gradients(kernel, inputs, dys, wanted)
    for (name, e), (_, r), (_, o) in zip(exact, rounded, actual, strict=True):
        assert (o.shape, o.dtype) == (r.shape, r.dtype), f"{name}: {o.shape} {o.dtype}"
        assert o.isfinite().all(), f"{name}: not finite"
        if o.numel() == 0:
            continue
        floor = torch.finfo(o.dtype).eps * max(e.abs().max().item(), unit)
        allowed = slack * (r - e).abs().max() + floor
        error = (o - e).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _outputs_and_gradients(
    f: Callable, inputs: Sequence[Tensor], dys: Sequence[Tensor], wanted: Sequence[int]
) -> list[tuple[str, Tensor]]:
    leaves = [x.detach().clone() for x in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    ys = _tuple(f(*leaves))
    grads = torch.autograd.grad(ys, [leaves[i] for i in wanted], list(dys)) if wanted else ()
    return [
        *((f"output {i}", y.detach()) for i, y in enumerate(ys)),
        *((f"gradient of input {i}", dx) for i, dx in zip(wanted, grads, strict=True)),
    ]


def _tuple(ys: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ys if isinstance(ys, tuple) else (ys,)


def refuses_a_second_derivative(op: Callable, *leaves: Tensor, linear: bool = False) -> None:
    """Assert that `op` raises where its gradients are differentiated, however that is asked for.

    By `backward`, of everything that there is; and by `torch.autograd.grad`, which computes what
    leads to the inputs alone, as for the product of a Hessian and a vector.

    Args:
        op: takes the leaves, and returns one tensor.
        leaves: tensors that require a gradient.
        linear: its gradients depend on the incoming one alone. Else they must be refused where
            that is constant, too.
    """
    for behind in (torch.sin, *(() if linear else (torch.Tensor.double,))):
        for of in (None, *leaves):
            with pytest.raises(RuntimeError, match="first derivative only"):
                _differentiate_twice(op, behind, leaves, of)


def _differentiate_twice(
    op: Callable, behind: Callable, leaves: tuple[Tensor, ...], of: Tensor | None
) -> None:  # fmt: skip
    first = torch.autograd.grad(behind(op(*leaves)).sum(), leaves, create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    penalty.backward() if of is None else torch.autograd.grad(penalty, of)
