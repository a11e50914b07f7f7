"""A reversible residual stack: activations are recomputed from what comes out of it.

There are two streams, both the embedding at first, and every block advances one after the other:

    y₁ = x₁ + F(x₂)    F: attention of the normalised stream        x₂ = y₂ - G(y₁)
    y₂ = x₂ + G(y₁)    G: feed-forward layer of the same            x₁ = y₁ - F(x₂)

Their sum leaves. As the inputs follow from the outputs, the forward pass keeps the last two streams
alone, whatever the depth; the backward pass subtracts its way down, and takes the gradients of each
F and G on the way. That costs what checkpointing every block costs, one more forward pass. What is
reconstructed is what was, to rounding. A mask of dropout is drawn again from its seed, the same;
what modules of others draw is too.

Gomez et al., "The Reversible Residual Network", 2017. https://arxiv.org/abs/1707.04585
Kitaev et al., "Reformer", 2020, section 3. https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tritium.kernels import dropout_add
from tritium.kernels.runtime import once_differentiable
from tritium.model.cpu_linear import Linear, sees_through
from tritium.model.kv_cache import Cache
from tritium.model.redrawing import may_draw, redrawing


class HalfBlock:
    """F or G of one block: what it adds to a stream, as a function of the other stream.

    Args:
        norm: of its input.
        layer: attention or feed-forward layer.
        more: arguments of the layer behind the normalised stream.
        dropout: probability with which an element of the result is left out.
        seed: of the dropout, or None.
    """

    def __init__(
        self, norm: nn.Module, layer: nn.Module, more: tuple, dropout: float, seed: Tensor | None
    ):
        self._modules, self._more = (norm, layer), more
        self._dropout, self._seed = dropout, seed

    def __call__(self, x_BLD: Tensor) -> Tensor:
        """Return what is added, in the dtype of the streams."""
        norm, layer = self._modules
        added_BLD = layer(norm(x_BLD), *self._more)
        if self._seed is not None:
            zeros_BLD = torch.zeros_like(x_BLD)
            added_BLD = dropout_add(added_BLD, zeros_BLD, self._dropout, seed=self._seed)
        return added_BLD.to(x_BLD.dtype)

    def replay(self, x_BLD: Tensor) -> Callable[[], AbstractContextManager]:
        """Return what is entered where it is called on `x_BLD` again, to draw the same numbers."""
        return redrawing(x_BLD) if may_draw(*self._modules) else nullcontext

    def weights(self) -> list[Tensor]:
        """Return the tensors that it reads and that get a gradient."""
        found: list[Tensor | None] = []
        for module in (each for part in self._modules for each in part.modules()):
            found += module.parameters(recurse=False)
            if isinstance(module, Linear):
                found.append(module.narrow)
        return [w for w in found if w is not None and w.requires_grad]


def residual_stack(
    blocks: Iterable[Any], x_BLD: Tensor, places: tuple, cache: Cache | None, dropout: float
) -> Tensor:
    """Return the sum of both streams behind all blocks, `[B, L, D]`.

    Where no gradient is asked for, in a compiler or torch.jit.trace, under torch.func and with a
    cache, which a recomputation would read into again, it is computed without recomputation.

    Args:
        blocks: of `model.block`.
        x_BLD: the embedding; its dtype is that of the streams.
        places: cos, sin and mask of the attention.
        cache: of keys and values, or None.
        dropout: probability with which an element of what is added is left out.
    """
    halves = list(half_blocks(blocks, x_BLD, places, cache, dropout))
    recomputes = (
        cache is None
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not sees_through()
    )
    trail = _Trail(len(halves), _autocast(x_BLD)) if recomputes else None
    a_BLD = b_BLD = x_BLD
    for i, half in enumerate(halves):
        if trail is None:
            c_BLD = a_BLD + half(b_BLD)
        else:
            c_BLD = _HalfStep.apply(half, trail, i, a_BLD, b_BLD, *half.weights())
        a_BLD, b_BLD = b_BLD, c_BLD
    return a_BLD + b_BLD


def half_blocks(
    blocks: Iterable[Any], x_BLD: Tensor, places: tuple, cache: Cache | None, dropout: float
) -> Iterator[HalfBlock]:
    """Yield F and G of each block, in their order; arguments as `residual_stack`."""
    for i, block in enumerate(blocks):
        seeds = (None, None)
        if dropout:  # on the device, where a CUDA graph draws others at each replay
            seeds = torch.randint(-(2**63), 2**63 - 1, (2,), device=x_BLD.device).unbind()
        more = places, None if cache is None else cache.layer(i)
        yield HalfBlock(block.attention_norm, block.attention, more, dropout, seeds[0])
        yield HalfBlock(block.feed_forward_norm, block.feed_forward, (), dropout, seeds[1])


class _Trail:
    """The streams where a backward pass has come to; each half-block hands them to the one below.

    Args:
        length: half-blocks of the stack.
        cast: enters the autocast of the forward pass.
    """

    def __init__(self, length: int, cast: Callable[[], AbstractContextManager]):
        self.length, self.cast = length, cast
        self.streams: tuple[Tensor, Tensor] | None = None


class _HalfStep(torch.autograd.Function):
    """c = a + f(b), which keeps nothing, except for the last of a stack: that keeps b and c."""

    @staticmethod
    def forward(
        ctx, half: HalfBlock, trail: _Trail, i: int, a_BLD: Tensor, b_BLD: Tensor,
        *weights: Tensor,
    ):  # fmt: skip
        ctx.half, ctx.trail, ctx.i, ctx.weights = half, trail, i, weights
        ctx.replay = half.replay(b_BLD)
        with trail.cast():
            c_BLD = a_BLD + half(b_BLD)
        # Of the weights autograd only notices whether they have changed.
        last = (b_BLD, c_BLD) if i == trail.length - 1 else ()
        ctx.save_for_backward(*last, *weights)
        return c_BLD

    @staticmethod
    @once_differentiable(made_in_forward=True)
    def backward(ctx, dc_BLD: Tensor):
        half, trail, weights = ctx.half, ctx.trail, ctx.weights
        saved = ctx.saved_tensors  # read once, as checkpoints around the stack demand
        kept = saved[: len(saved) - len(weights)]
        b_BLD, c_BLD = kept or trail.streams
        if any(x is not y for x, y in zip(half.weights(), weights, strict=True)):
            raise RuntimeError(
                "reversible: the backward pass must find the weights that the forward pass read; "
                "run it where functional_call or MixedPrecision still has them in the model"
            )
        with torch.enable_grad():
            b_BLD = b_BLD.detach().requires_grad_()
            with trail.cast(), ctx.replay():
                added_BLD = half(b_BLD)
        a_BLD = c_BLD - added_BLD.detach()
        db_BLD, *dweights = torch.autograd.grad(
            added_BLD, (b_BLD, *weights), dc_BLD, allow_unused=True
        )
        trail.streams = (a_BLD, b_BLD.detach()) if ctx.i else None
        return None, None, None, dc_BLD, db_BLD, *dweights


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager]:
    """Return what enters the present autocast again; it keeps no converted weight for later."""
    device = x.device.type
    if device == "meta":
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)
