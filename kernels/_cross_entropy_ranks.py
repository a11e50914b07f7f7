"""The classes that belong to this rank, and an output layer of DTensors in plain tensors.

The ranks of a process group split the classes, or those of a mesh of DTensors. On each dimension of
a mesh the ranks either split them or have tokens of their own:

    classes   the weight is Shard(0) and every rank has all of the input: the loss is that of
              `group`, the gradient of the weight stays sharded
    tokens    the weight is gathered for the call; its gradient, of this rank's tokens, is averaged
              over the ranks and sharded again, as `fully_shard` does with gradients

A DTensor as input, which is replicated, says the first of every dimension that shards the weight; a
plain tensor says the second, except where `group` names a dimension.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Classes(NamedTuple):
    """The last three of `LossOptions`."""

    first: int = 0
    n: int = 0
    group: str = ""


def shard(group: ProcessGroup | Classes | None, V: int) -> Classes:
    """Return the classes of a group, of which this rank has V; known ones as they are."""
    if group is None or isinstance(group, Classes):
        return group or Classes()
    return Classes(dist.get_rank(group) * V, dist.get_world_size(group) * V, group.group_name)


class Layer(NamedTuple):
    """A linear layer and its input on this rank, in plain tensors."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    classes: Classes | None
    """The classes of the weight's rows; None: all of them."""


def is_distributed(x: Any) -> bool:
    """Return whether `x` is a DTensor."""
    return hasattr(x, "to_local")


def check_plain(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if one of `tensors`, by the names of arguments, is a DTensor."""
    for name, x in tensors.items():
        if is_distributed(x):
            raise ValueError(
                f"{op}: {name} must be a plain tensor, got a DTensor; pass its to_local(), of this "
                "rank's tokens, or its full_tensor(), of all classes"
            )


def local_layer(
    op: str, input: Tensor, weight: Any, bias: Tensor | None, group: ProcessGroup | None,
    weight_grad: Tensor | None,
) -> Layer:  # fmt: skip
    """Return a layer whose weight is a DTensor as this rank computes it.

    Raises:
        ValueError: a tensor is placed otherwise than the head of this file says.
    """
    if not is_distributed(weight):
        raise ValueError(
            f"{op}: linear_weight must be a DTensor where input or linear_bias is one, got a plain "
            "tensor; pass their to_local()"
        )
    if bias is not None and not is_distributed(bias):
        raise ValueError(
            f"{op}: linear_bias must be a DTensor, as linear_weight is, got a plain tensor; "
            "distribute_tensor makes it one"
        )
    if weight_grad is not None:
        raise ValueError(
            f"{op}: linear_weight_grad is for plain weights, got a DTensor as linear_weight, whose "
            "gradient is reduced over its ranks; leave it out"
        )
    mesh = weight.device_mesh
    if is_distributed(input):
        dim = _dim_of_input(op, input, weight, group)
        input, tokens = cast("DTensor", input).to_local(), []
    else:
        dim = None if group is None else _dim_of_group(op, weight, group)
        tokens = [d for d in range(mesh.ndim) if d != dim]
    parts = [None if x is None else _part(x, tokens) for x in (weight, bias)]
    assert parts[0] is not None
    return Layer(input, parts[0], parts[1], None if dim is None else _classes(op, weight, dim))


def _dim_of_input(op: str, input: Any, weight: "DTensor", group: ProcessGroup | None) -> int | None:
    """Return the dimension over which the classes are split, for an input that is replicated."""
    mesh = weight.device_mesh
    replicated = all(x.is_replicate() for x in input.placements)
    if input.device_mesh != mesh or not replicated or group is not None:
        also = "" if group is None else " and a group beside it"
        raise ValueError(
            f"{op}: a DTensor as input must be replicated over the mesh of linear_weight, {mesh}, "
            f"without a group, got {input.placements} over {input.device_mesh}{also}; pass "
            "input.to_local(), this rank's tokens"
        )
    split = [d for d, x in enumerate(weight.placements) if not x.is_replicate()]
    if len(split) > 1 or not all(weight.placements[d].is_shard(0) for d in split):
        raise ValueError(
            f"{op}: linear_weight must be Shard(0) on one dimension of its mesh and replicated on "
            f"the others, where input is a DTensor, got {weight.placements}; redistribute it"
        )
    return split[0] if split else None


def _dim_of_group(op: str, weight: "DTensor", group: ProcessGroup) -> int:
    mesh = weight.device_mesh
    for dim, placement in enumerate(weight.placements):
        if mesh.get_group(dim).group_name == group.group_name:
            if placement.is_shard(0):
                return dim
            raise ValueError(
                f"{op}: linear_weight must be Shard(0) on the dimension of group, got {placement}; "
                "redistribute it, or leave group out"
            )
    raise ValueError(
        f"{op}: group must be that of a dimension of linear_weight's mesh, {mesh}, got another; "
        "pass mesh.get_group(dimension)"
    )


def _part(x: "DTensor", tokens: list[int]) -> Tensor:
    """Return what this rank computes with: `x` gathered over the dimensions `tokens`."""
    if not tokens:
        return x.to_local()
    from torch.distributed.tensor import Partial, Replicate

    mesh, placed, returned = x.device_mesh, list(x.placements), list(x.placements)
    ranks = 1
    for dim in tokens:
        placed[dim], returned[dim] = Replicate(), Partial()
        ranks *= mesh.size(dim)
    part = x.redistribute(mesh, placed).to_local(grad_placements=returned)
    if part.requires_grad and ranks > 1:  # not by Partial("avg"), which gloo cannot reduce
        part.register_hook(partial(torch.mul, other=1 / ranks))
    return part


def _classes(op: str, weight: "DTensor", dim: int) -> Classes:
    mesh, V = weight.device_mesh, weight.shape[0]
    ranks = mesh.size(dim)
    rows = -(-V // ranks)  # as Shard cuts
    if rows * (ranks - 1) >= V:
        raise ValueError(
            f"{op}: every rank must have a class, got {V} classes over {ranks} ranks, {rows} on "
            "each but the last; use fewer ranks"
        )
    name = mesh.get_group(dim).group_name
    return Classes(mesh.get_local_rank(dim) * rows, V, name)
