"""Distributed tensors by their local shards.

Each rank updates its own shard of a DTensor, which may have no elements. Only the gradient norm is
that of all ranks: each rank adds the squares of its shards, divided by R if R ranks have a copy,
and the sum over all ranks is the square of the norm.
"""

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

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


# Matrices, whole.


class Sharing(NamedTuple):
    """Ranks that have the shards of a tensor."""

    group: Any
    """Their process group; None of a tensor that is whole on every rank."""
    places: tuple[tuple[int, ...], ...]
    """Coordinates on the mesh of each of its ranks."""
    rank: int
    """This rank's number in the group."""


def sharing(op: str, x: Tensor) -> Sharing:
    """Return the ranks that share `x`, a matrix, along each dimension of a mesh that shards it.

    Raises:
        ValueError: it is not sharded by rows or columns, each along one dimension of the mesh; or
            along several dimensions of a mesh that has not all ranks.
    """
    dims = _sharded_dims(op, x)
    if not _is_distributed(x) or not dims:
        return Sharing(None, ((),), 0)
    mesh, every = x.device_mesh, torch.distributed.get_world_size()
    if len(dims) > 1 and mesh.size() != every:
        raise ValueError(
            f"{op}: a mesh along whose dimensions {dims} a matrix is sharded must have all {every} "
            f"ranks, got {mesh.size()}; shard it along one"
        )
    own = mesh.get_coordinate()
    assert own is not None  # or this rank had no shard
    group = mesh.get_group(dims[0]) if len(dims) == 1 else torch.distributed.group.WORLD
    along = (range(mesh.size(d)) if d in dims else [own[d]] for d in range(mesh.ndim))
    ranks = {int(mesh.mesh[place]): place for place in product(*along)}
    places = [ranks[rank] for rank in torch.distributed.get_process_group_ranks(group)]
    return Sharing(group, tuple(places), torch.distributed.get_rank(group))


def _sharded_dims(op: str, x: Any) -> list[int]:
    """Return the dimensions of the mesh along which `x` is sharded."""
    if not _is_distributed(x):
        return []
    from torch.distributed.tensor import Shard

    found = {d: how for d, how in enumerate(x.placements) if not how.is_replicate()}
    dims = [how.dim if type(how) is Shard else None for how in found.values()]
    if not {*dims} <= {0, 1} or len(dims) > len({*dims}):
        raise ValueError(
            f"{op}: a matrix must be sharded by rows, columns or both, each along one dimension of "
            f"the mesh, got {x.placements}; shard it by Shard(0) or Shard(1), or replicate it"
        )
    return [*found]


def chunk_of(x: Tensor, dim: int, place: tuple[int, ...]) -> tuple[int, int]:
    """Return which chunk of dimension `dim` of `x` is at a place of its mesh, and of how many."""
    if _is_distributed(x):
        for d, placement in enumerate(x.placements):
            if placement.is_shard(dim):
                return place[d], x.device_mesh.size(d)
    return 0, 1


def distributed_rows(p: Tensor, x: Tensor) -> Tensor:
    """Return `x` `[R, 1]`, a number for each row of `p` `[R, C]`, distributed as the rows are.

    Args:
        p: a matrix, a DTensor or not.
        x: a DTensor, or whole and the same on every rank.
    """
    if not _is_distributed(p):
        return x
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    how = [placement if placement.is_shard(0) else Replicate() for placement in p.placements]
    if isinstance(x, DTensor):
        return x.redistribute(p.device_mesh, how)
    return distribute_tensor(x, p.device_mesh, how, src_data_rank=None)
