"""Checkpoints of a model that is sharded over ranks, by torch.distributed.checkpoint.

Each rank writes its own part, and reads what belongs to it, whatever the number of ranks that
wrote: `tritium.model.saved` reads them in one process. The index of the parts, `shards/.metadata`,
is a pickle, as torch writes it: read checkpoints only from those whom you trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritium.model.saved import SHARDS, check_files, prefix_of, read_shards, read_tensors

if TYPE_CHECKING:
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
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    mesh = x.device_mesh
    if mesh.device_type != "cpu":
        mesh = DeviceMesh("cpu", mesh.mesh)
    part = x.to_local().to("cpu", copy=True)
    return DTensor.from_local(part, mesh, x.placements, shape=x.shape, stride=x.stride())


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


def read(
    checkpoint: Path, name: str, record: dict, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the tensors of one of `FILES`, each sharded as the parameter that it belongs to.

    Every rank calls it. The first one compares the checksums of what the ranks have written.

    Raises:
        CheckpointError: files are missing or damaged.
    """

    def owner(key: str) -> nn.Parameter | None:
        return parameters.get(key if key in parameters else key.rpartition(".")[0])

    def like(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        p = owner(key)
        if p is None or p.shape != size:  # a step count, or of another model
            return torch.empty(size, dtype=dtype)
        return torch.empty_like(p, dtype=dtype, requires_grad=False)

    if name not in record["files"]:
        if dist.get_rank() == 0:
            check_files(checkpoint, record)
        return read_shards(checkpoint, name, like)
    from torch.distributed.tensor import distribute_tensor

    tensors = read_tensors(checkpoint, name, record)
    for key, x in tensors.items():
        p = owner(key)
        if p is not None and p.shape == x.shape and is_distributed(p):
            x = x.to(p.device)
            tensors[key] = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
    return tensors
