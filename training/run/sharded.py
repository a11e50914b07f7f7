"""Checkpoints of a model that is sharded over ranks, by torch.distributed.checkpoint.

Each rank writes its own part, and reads what belongs to it, whatever the number of ranks that
wrote: `tritium.model.saved` reads them in one process. The index of the parts, `shards/.metadata`,
is a pickle, as torch writes it: read checkpoints only from those whom you trust.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritium.kernels.optimizers import distributed_rows
from tritium.model.saved import SHARDS, check_files, prefix_of, read_shards, read_tensors
from tritium.training.tensor_parallel import in_model_order, in_rank_order, packed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_distributed(x: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is sharded over ranks."""
    return hasattr(x, "to_local")


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters of a model are sharded over ranks."""
    return any(map(is_distributed, model.parameters()))


def local(x: Any) -> Any:
    """Return this rank's part of a tensor, all of it if it is not sharded."""
    return x.to_local() if is_distributed(x) else x


def on_host(x: Tensor) -> Tensor:
    """Return a copy in the memory of the host, sharded as the tensor is."""
    if not is_distributed(x):
        return x.to("cpu", copy=True)
    from torch.distributed.tensor import DTensor

    part = x.to_local().to("cpu", copy=True)
    return DTensor.from_local(
        part, _mesh_on_host(x.device_mesh), x.placements, run_check=False, shape=x.shape,
        stride=x.stride(),
    )  # fmt: skip


@cache  # a mesh makes process groups
def _mesh_on_host(mesh: DeviceMesh) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    if mesh.device_type == "cpu":
        return mesh
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def as_in_one_process(
    model: nn.Module, tensors: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return a model's tensors, by file and name, with their rows in the order of a whole model.

    Every rank calls it.
    """
    return {file: _reordered(model, named, in_model_order) for file, named in tensors.items()}


def _reordered(
    model: nn.Module, tensors: dict[str, Tensor], order: Callable[..., DTensor]
) -> dict[str, Tensor]:
    layers = packed(model)
    return {
        name: order(x, *layers[key])
        if (key := _owner(name, layers)) is not None and is_distributed(x)
        else x
        for name, x in tensors.items()
    }


def _owner(name: str, parameters: Container[str]) -> str | None:
    """Return the parameter that a tensor is, or is a state of, if it is among `parameters`."""
    own = name if name in parameters else name.rpartition(".")[0]
    return own if own in parameters else None


def write(draft: Path, tensors: dict[str, dict[str, Tensor]], group: Any) -> None:
    """Write a checkpoint's tensors, by file and name; every rank of the process group calls it.

    Raises:
        OSError: some rank could not write its part.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = {f"{prefix_of(file)}{k}": x for file, named in tensors.items() for k, x in named.items()}
    writer = FileSystemWriter(draft / SHARDS, sync_files=True)
    try:
        save(flat, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise OSError(f"{draft}: {causes}") from None


def read(checkpoint: Path, name: str, record: dict, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of one of `FILES`, each sharded as the parameter that it belongs to.

    Every rank calls it. The first one compares the checksums of what the ranks have written.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    parameters = dict(model.named_parameters())

    def of(key: str) -> nn.Parameter | None:
        own = _owner(key, parameters)
        return None if own is None else parameters[own]

    def like(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        p = of(key)
        if p is not None and size == (len(p), 1) != p.shape:  # moments of rows
            return distributed_rows(p, torch.empty(size, dtype=dtype, device=p.device))
        if p is None or p.shape != size:  # a step count, or of another model
            return torch.empty(size, dtype=dtype)
        return torch.empty_like(p, dtype=dtype, requires_grad=False)

    if name not in record["files"]:
        if dist.get_rank() == 0:
            check_files(checkpoint, record)
        return _reordered(model, read_shards(checkpoint, name, like), in_rank_order)
    from torch.distributed.tensor import distribute_tensor

    tensors = read_tensors(checkpoint, name, record)
    for key, x in tensors.items():
        p = of(key)
        if p is not None and p.shape == x.shape and is_distributed(p):
            x = x.to(p.device)
            tensors[key] = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
        elif p is not None and x.shape == (len(p), 1):
            tensors[key] = distributed_rows(p, x.to(p.device))
    return _reordered(model, tensors, in_rank_order)
