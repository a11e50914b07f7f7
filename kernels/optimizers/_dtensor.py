"""Distributed tensors by their local shards.

Each rank updates its own shard of a DTensor, which may have no elements. Only the gradient norm is
that of all ranks: each rank adds the squares of its shards, divided by R if R ranks have a copy,
and the sum over all ranks is the square of the norm.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def are_distributed(tensors: Iterable[Tensor]) -> bool:
    """Return whether some of `tensors` are DTensors."""
    return any(hasattr(kind, "to_local") for kind in {*map(type, tensors)})


def _is_distributed(x: Any) -> "TypeGuard[DTensor]":
    return hasattr(x, "to_local")


def local(x: Any) -> Any:
    """Return the shard of `x` on this rank, if it is a DTensor, once it has arrived."""
    if not _is_distributed(x):
        return x
    shard = x.to_local()
    return getattr(shard, "wait", lambda: shard)()


def mesh_of(op: str, tensors: Iterable[Tensor]) -> "DeviceMesh":
    """Return the mesh of all DTensors among `tensors`.

    Raises:
        ValueError: there are two.
    """
    meshes = {x.device_mesh for x in tensors if _is_distributed(x)}
    if len(meshes) > 1:
        raise ValueError(
            f"{op}: distributed tensors must share one device mesh, got {len(meshes)}; "
            "make an optimizer for each"
        )
    return meshes.pop()


def replicas(op: str, x: Tensor, mesh: "DeviceMesh") -> int:
    """Return how many ranks of `mesh` have the same elements of `x` as this rank.

    Raises:
        ValueError: `x` is a partial sum, not reduced yet.
    """
    if not _is_distributed(x):
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


def shard_index(x: Tensor) -> int:
    """Return a number for this rank's shard of `x`, the same on ranks with the same elements."""
    index = 0
    if _is_distributed(x):
        for dim, placement in enumerate(x.placements):
            if not placement.is_replicate():
                index = index * x.device_mesh.size(dim) + x.device_mesh.get_local_rank(dim)
    return index


def check_alike(op: str, params: Iterable[Tensor], grads: Iterable[Tensor]) -> None:
    """Raise unless every gradient is distributed as its parameter is.

    Raises:
        ValueError: it is not, or is a partial sum.
    """
    for p, g in zip(params, grads, strict=True):
        if (wanted := _layout(p)) != (got := _layout(g)):
            raise ValueError(
                f"{op}: a gradient must be sharded or replicated as its parameter is, {wanted}, "
                f"got {got}; redistribute the gradient first"
            )


def _layout(x: Tensor) -> tuple | None:
    return (x.placements, x.device_mesh) if _is_distributed(x) else None


def sum_over_ranks(x: Tensor, mesh: "DeviceMesh") -> None:
    """Add `x` over all ranks of `mesh`, in place: at once where they are all that there are."""
    if mesh.size() == torch.distributed.get_world_size():
        torch.distributed.all_reduce(x)
        return
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(x, group=mesh.get_group(dim))
