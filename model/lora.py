"""Low-rank adapters: a few trained weights beside the frozen ones of a model.

    y = x · Wᵀ + α / r · (x · Aᵀ) · Bᵀ        W `[out, in]` frozen, A `[r, in]`, B `[out, r]`

B is zero at first, so that training begins with the model as it is; merging is W + α / r · B · A.
They are added to a `Transformer` from outside: `adapt`, train, `merge`. Projections that one
product makes, as queries, keys and values, have an adapter each, on their own rows: what is merged
is what adapters of three separate layers give.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tritium.model.block import Attention, FeedForward
from tritium.model.cpu_linear import Linear

Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "query_key_value": ("query", "key", "value"), "output": ("output",),
    "gate_up": ("gate", "up"), "up": ("up",), "down": ("down",),
}  # fmt: skip
"""Projections of each linear layer of a block, in the order of their rows."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model."""

    rank: int
    """r, the rows of A."""
    alpha: float
    """Numerator of the factor alpha / rank."""
    layers: tuple[str, ...]
    """Projections that have one, in every block."""


class Adapter(nn.Module):
    """The low-rank part of a projection to `out_features`, where and of what `weight` is."""

    def __init__(self, weight: Tensor, out_features: int, rank: int, alpha: float):
        super().__init__()
        in_features, like = weight.shape[1], {"device": weight.device, "dtype": weight.dtype}
        self.A = Linear(in_features, rank, **like)
        self.B = Linear(rank, out_features, **like)
        self.rank, self.alpha = rank, alpha
        nn.init.normal_(self.A.weight, std=in_features**-0.5)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the projection of `x`, `[..., out_features]`."""
        return self.B(self.A(x) * (self.alpha / self.rank))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return what is added to the weight, `[out_features, in_features]`, float32 or wider."""
        wide = torch.promote_types(self.A.weight.dtype, torch.float32)
        return self.B.weight.to(wide) @ self.A.weight.to(wide) * (self.alpha / self.rank)


class AdaptedLinear(Linear):
    """A linear layer with adapters; it takes over the weight and bias of the one it replaces."""

    def __init__(self, linear: Linear, adapters: dict[str, Adapter], parts: tuple[str, ...]):
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight, self.bias, self.splits = linear.weight, linear.bias, linear.splits
        self.adapters, self.parts = nn.ModuleDict(adapters), parts

    def forward(self, input: Tensor) -> Tensor:
        """Return the projections, each with its adapter's part added, `[..., out_features]`."""
        y = super().forward(input)
        parts = [
            part + self.adapters[name](input) if name in self.adapters else part
            for name, part in zip(self.parts, y.split(_rows(self), -1), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight with the adapters merged into it, in its dtype; a new tensor."""
        weight = self.weight.detach().clone()
        for name, rows in zip(self.parts, weight.split(_rows(self)), strict=True):
            if name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                delta = adapter.delta()
                rows.copy_(rows.to(delta.dtype) + delta)
        return weight


def adapt(
    model: nn.Module, rank: int, alpha: float | None = None, layers: Sequence[str] = ()
) -> None:
    """Freeze a `Transformer`, and give the named projections of every block an adapter.

    Only the adapters have gradients then, and an optimizer made now holds states for them alone.
    Logits are what they were, bit for bit, until the first step.

    Args:
        model: the model, changed in place.
        rank: r, at most the smaller side of each projection.
        alpha: numerator of the factor alpha / rank. None: the rank.
        layers: some of query, key, value, output, gate, up, down. None named: all that it has.

    Raises:
        ValueError: the model has adapters, or no such projection, or one that is another layer now,
            or the rank or alpha is out of range. Nothing was changed.
    """
    if adapters_of(model) is not None:
        raise ValueError("lora: the model has adapters already; merge them first")
    if isinstance(getattr(model, "transformer", None), nn.Module):
        raise ValueError(
            f"lora: the model must be a Transformer, got a {type(model).__name__}, whose head "
            "would be frozen too; adapt its transformer"
        )
    found = list(_linear_layers(model))
    sizes = {
        part: (rows, linear.in_features)
        for _, name, linear in found
        for part, rows in zip(PROJECTIONS[name], _rows(linear), strict=True)
    }
    spec = _checked(sizes, rank, alpha, layers)
    for name, layer in model.named_modules():
        place, _, last = name.rpartition(".")
        wanted = {*PROJECTIONS.get(last, ())} & {*spec.layers}
        inside = isinstance(model.get_submodule(place), (Attention, FeedForward))
        if wanted and inside and not isinstance(layer, Linear):
            raise ValueError(
                f"lora: {name} must be a layer as Tritium makes it to get an adapter, got a "
                f"{type(layer).__name__}; adapt the model before, or name other layers"
            )
    model.requires_grad_(False)
    for parent, name, linear in found:
        parts = PROJECTIONS[name]
        adapters = {
            part: Adapter(linear.weight, rows, spec.rank, spec.alpha)
            for part, rows in zip(parts, _rows(linear), strict=True)
            if part in spec.layers
        }
        if adapters:
            setattr(parent, name, AdaptedLinear(linear, adapters, parts))


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, in place; the model is an ordinary one again, all trained.

    A model without adapters stays as it is.
    """
    if adapters_of(model) is None:
        return
    for parent, name, layer in list(_linear_layers(model)):
        if isinstance(layer, AdaptedLinear):
            has_bias = layer.bias is not None
            plain = Linear(layer.in_features, layer.out_features, has_bias, device="meta")
            with torch.no_grad():
                layer.weight.copy_(layer.merged())
            plain.weight, plain.bias, plain.splits = layer.weight, layer.bias, layer.splits
            setattr(parent, name, plain)
    model.requires_grad_(True)


def adapters_of(model: nn.Module) -> Adapters | None:
    """Return the adapters that a model has, or None."""
    named: dict[str, Adapter] = {}
    for _, _, layer in _linear_layers(model):
        if isinstance(layer, AdaptedLinear):
            named |= {x: y for x, y in layer.adapters.items() if isinstance(y, Adapter)}
    if not named:
        return None
    any_one = next(iter(named.values()))
    layers = tuple(name for name in get_args(Projection) if name in named)
    return Adapters(any_one.rank, any_one.alpha, layers)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of the weights of a model as if its adapters were merged.

    One by one: a merged weight is a new tensor, every other the parameter.
    """
    adapted = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)
    }
    for name, p in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in adapted:
            yield name, adapted[layer].merged()
        elif not any(name.startswith(f"{x}.adapters.") for x in adapted):
            yield name, p


def flops_added(model: nn.Module) -> int:
    """Return what adapters add to the FLOPs of a training step per token: less than nothing.

    Six for each of their weights; but two fewer for every frozen weight of a product, which has no
    gradient. 0 without adapters.
    """
    if adapters_of(model) is None:
        return 0
    products = [x.weight for x in model.modules() if isinstance(x, nn.Linear)]
    return sum(6 * p.numel() if p.requires_grad else -2 * p.numel() for p in products)


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Linear]]:
    """Yield the layers that may be adapted, with the module that holds each, and their names."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if name in PROJECTIONS and isinstance(layer, Linear):
                yield parent, name, layer


def _rows(linear: Linear) -> tuple[int, ...]:
    return linear.splits or (linear.out_features,)


def _checked(
    sizes: dict[str, tuple[int, int]], rank: int, alpha: float | None, layers: Sequence[str]
) -> Adapters:
    """Return the adapters of projections of these sizes (out, in); see `adapt`."""
    if not sizes:
        raise ValueError(
            f"lora: the model must have layers named {', '.join(PROJECTIONS)}, as a Transformer "
            "has; it has none"
        )
    if isinstance(layers, str):
        layers = (layers,)
    if odd := [name for name in layers if name not in sizes]:
        raise ValueError(
            f"lora: layers must be among {', '.join(sizes)}, which this model has, got {odd[0]!r}"
        )
    chosen = tuple(name for name in sizes if name in layers or not layers)
    narrowest = min(chosen, key=lambda name: min(sizes[name]))
    most = min(sizes[narrowest])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(
            f"lora: rank must be a whole number in [1, {most}], the smaller side of {narrowest} "
            f"{list(sizes[narrowest])}, got {rank!r}"
        )
    alpha = rank if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise ValueError(f"lora: alpha must be above 0, got {alpha!r}; the rank is usual")
    return Adapters(rank, float(alpha), chosen)
