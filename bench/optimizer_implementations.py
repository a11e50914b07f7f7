"""Implementations of an optimizer's step: Tritium, PyTorch and peers.

A loader imports its implementation; the result makes a Stepper of parameters whose gradients are
there already. `implementations` says why imports are left to loaders.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from tritium.bench.implementations import Loader, own
from tritium.kernels.optimizers.lion import lion_reference

LR, WEIGHT_DECAY, LION_BETAS = 1e-3, 0.1, (0.9, 0.99)
MAX_NORM = 1.0  # which the gradients exceed: clipping has something to do

Parameters = list[nn.Parameter]


def _nothing() -> Iterable[Tensor]:
    return ()


@dataclass(frozen=True)
class Stepper:
    """One implementation on given parameters."""

    step: Callable[[], object]
    """Returns the norm, where that is all it computes."""
    kept: Callable[[], Iterable[Tensor]] = _nothing
    """State from one step to the next: moments, scales, masters."""

    @property
    def state_bytes(self) -> int:
        """Memory of the state, each tensor counted once."""
        return sum(map(_bytes, {id(x): x for x in self.kept()}.values()))


def _bytes(x: Tensor) -> int:
    """The memory of a tensor, or of those that a quantized one of torchao consists of."""
    if flatten := getattr(x, "__tensor_flatten__", None):
        return sum(_bytes(getattr(x, name)) for name in flatten()[0])
    return x.numel() * x.element_size()


def _state(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state, and the masters that apex keeps beside it."""
    for state in optimizer.state.values():
        yield from (x for x in state.values() if isinstance(x, Tensor))
    for group in getattr(optimizer, "param_groups_master", ()):
        yield from (x for x in group["params"] if isinstance(x, Tensor))


def gradients(params: Parameters) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [p.grad for p in params if p.grad is not None]


def optimizer(load: Loader, **options) -> Loader:
    """Load an optimizer, to be made with `options`."""
    options = {"lr": LR, "weight_decay": WEIGHT_DECAY} | options

    def make(create: Callable[..., Optimizer], params: Parameters) -> Stepper:
        made = create(params, **options)
        return Stepper(made.step, lambda: _state(made))

    return lambda: partial(make, load())


def tritium_optimizer(name: str, **options) -> Loader:
    """Load an optimizer of kernels/."""
    return optimizer(own(name, "optimizers"), **options)


def torch_optimizer(name: str, **options) -> Loader:
    """Load an optimizer of PyTorch."""
    return optimizer(lambda: getattr(torch.optim, name), **options)


def apex_adamw(**options) -> Loader:
    """Load apex's AdamW, whose moments are float32."""
    return optimizer(lambda: import_module("apex.optimizers").FusedAdam, **options)


def torchao(name: str) -> Loader:
    """Load an AdamW of torchao, which rounds bfloat16 weights stochastically."""
    return optimizer(
        lambda: getattr(import_module("torchao.optim"), name), bf16_stochastic_round=True
    )


def bitsandbytes(name: str, **options) -> Loader:
    """Load an optimizer of bitsandbytes."""
    return optimizer(lambda: getattr(import_module("bitsandbytes.optim"), name), **options)


def torch_with_masters() -> Callable[[Parameters], Stepper]:
    """Load float32 masters as one writes them without a library: copies around fused AdamW."""

    def make(params: Parameters) -> Stepper:
        weights = [p.detach() for p in params]
        masters = [nn.Parameter(w.float()) for w in weights]
        grads = [torch.empty_like(m) for m in masters]
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
        copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        made = torch.optim.AdamW(masters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

        def step() -> None:
            copy(grads, gradients(params))
            made.step()
            copy(weights, [m.detach() for m in masters])

        return Stepper(step, lambda: [*_state(made), *masters, *grads])

    return make


def clipped(load: Loader) -> Loader:
    """Load a step after PyTorch's clip_grad_norm_, not folded into it."""

    def make(make_stepper: Callable[[Parameters], Stepper], params: Parameters) -> Stepper:
        stepper = make_stepper(params)

        def step() -> None:
            clip_grad_norm_(params, MAX_NORM)
            stepper.step()

        return Stepper(step, stepper.kept)

    return lambda: partial(make, load())


def tritium_norm() -> Callable[[Parameters], Stepper]:
    """Load Tritium's clip_grad_norm_, with a limit that no gradient exceeds."""
    clip = own("clip_grad_norm_", "optimizers", max_norm=inf)()
    return lambda params: Stepper(lambda: clip(params))


def torch_norm() -> Callable[[Parameters], Stepper]:
    """Load PyTorch's norm of all gradients."""
    return lambda params: Stepper(lambda: get_total_norm(gradients(params)))


def exact_norm() -> Callable[[Parameters], Stepper]:
    """Load the reference of the norm."""
    return lambda params: Stepper(
        lambda: torch.cat([g.flatten() for g in gradients(params)]).norm()
    )


def exact_lion() -> Callable[[Parameters], Stepper]:
    """Load the reference of Lion, which PyTorch does not have."""

    def make(params: Parameters) -> Stepper:
        moments = [torch.zeros_like(p) for p in params]

        @torch.no_grad()
        def step() -> None:
            for p, g, m in zip(params, gradients(params), moments, strict=True):
                move = lion_reference(g, m, lr=LR, betas=LION_BETAS)
                p.mul_(1 - LR * WEIGHT_DECAY)
                move.subtract_from(p)

        return Stepper(step, lambda: moments)

    return make
