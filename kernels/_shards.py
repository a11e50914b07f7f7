"""Distributed tensors by their local shards.

A DTensor is updated where it lies: each rank its own shard, which may have no elements. Only the
gradient norm is of all ranks. Each adds the squares of its shards, those that R ranks hold divided
by R, and the sum over all ranks is the square of the norm.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def are_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether some of `tensors` are DTensors."""
    return any(hasattr(kind, "to_local") for kind in {*map(type, tensors)})


def local(x: Any) -> Any:
    """The shard of `x` on this rank, if it is a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def mesh_of(op: str, tensors: Iterable[Tensor]) -> "DeviceMesh":
    """The mesh of all DTensors among `tensors`.

    Raises:
        ValueError: there are two.
    """
    meshes = {x.device_mesh for x in tensors if hasattr(x, "to_local")}
    if len(meshes) > 1:
        raise ValueError(
            f"{op}: distributed tensors must share one device mesh, got {len(meshes)}; "
            "make an optimizer for each"
        )
    return meshes.pop()


def replicas(op: str, x: Tensor, mesh: "DeviceMesh") -> int:
    """How many ranks of `mesh` hold the elements that this rank holds of `x`.

    Raises:
        ValueError: `x` is a sum that the ranks have not made yet.
    """
    if not hasattr(x, "to_local"):
        return mesh.size()
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            f"{op}: distributed tensors must be sharded or replicated, got {x.placements}; "
            "redistribute the gradient first"
        )
    count = 1
    for dim, placement in enumerate(x.placements):
        count *= mesh.size(dim) if placement.is_replicate() else 1
    return count


def sum_over_ranks(x: Tensor, mesh: "DeviceMesh") -> None:
    """Add `x` over all ranks of `mesh`, in place."""
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(x, group=mesh.get_group(dim))
