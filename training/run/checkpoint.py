"""Checkpoints: folders written atomically, with checksums.

A checkpoint is a folder `step-00000060` of three files:

    model.safetensors      parameters, by name
    optimizer.safetensors  the optimizer's state, by name of the parameter
    state.json             step, health, the model's configuration, dtype and adapters, the rest of
                           the run (`run_state`: position in the data, random numbers, recovery,
                           time), and the sizes and SHA-256 of the other two and of itself

A model that is sharded over ranks is written by `tritium.training.run.sharded` instead: a folder
`shards` in place of the two files of tensors.

It is written under a temporary name, synced, and renamed: a process killed at any moment leaves the
last one valid. Of a whole model no pickle is written or read.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tritium.data.atomic import sync
from tritium.data.atomic import write as write_durably
from tritium.model.lora import adapters_of
from tritium.model.saved import (
    FILES,
    FORMAT,
    RECORD,
    CheckpointError,
    check_tensors,
    checkpoints,
    file_digest,
    newest,
    of_another,
    read_record,
    read_tensors,
    record_digest,
    step_of,
)
from tritium.model.transformer import ModelConfig, Transformer
from tritium.training.run import sharded
from tritium.training.run.fingerprint import differences
from tritium.training.run.ranks import SINGLE, Ranks

__all__ = [
    "FILES",
    "RECORD",
    "CheckpointError",
    "Snapshot",
    "checkpoints",
    "is_healthy",
    "load",
    "newest",
    "read_record",
    "remove",
    "snapshot",
    "step_of",
    "tidy",
    "write",
]


class Snapshot(NamedTuple):
    """Content of a checkpoint."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file and name."""
    record: dict
    """Entries of state.json, without the checksums."""
    sharded: bool = False
    """Whether each rank has a part of the tensors."""


def snapshot(
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: dict,
    healthy: bool = True,
    *,
    copy: bool,
) -> Snapshot:
    """Collect what `write` writes.

    Args:
        step: optimizer steps taken so far.
        model: its parameters are saved.
        optimizer: its state tensors are saved, by the names of the parameters.
        state: anything else, as JSON.
        healthy: whether recovery may roll back to it.
        copy: whether to copy the tensors to memory of the host, so that training may continue while
            they are written.
    """
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    parts = sharded.is_sharded(model)
    both = weights, _optimizer_tensors(model, optimizer)
    tensors: dict[str, dict[str, Tensor]] = dict(zip(FILES, both, strict=True))
    if parts:
        tensors = sharded.as_in_one_process(model, tensors)
    if copy:
        tensors = {
            file: {name: sharded.on_host(x) for name, x in named.items()}
            for file, named in tensors.items()
        }
    # Through JSON, because what `state` refers to may change before it is written.
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    record = {
        "format": FORMAT, "step": step, "healthy": healthy, "model": asdict(model.config),
        "dtype": dtype, "state": state,
    }  # fmt: skip
    if (adapters := adapters_of(model)) is not None:
        record["lora"] = asdict(adapters)
    return Snapshot(step, tensors, json.loads(json.dumps(record)), parts)


def write(folder: Path, snapshot: Snapshot, ranks: Ranks = SINGLE) -> Path:
    """Write a checkpoint into `folder`, which is made if absent; return the checkpoint's folder.

    Args:
        folder: folder of the checkpoints.
        snapshot: its content.
        ranks: of a sharded one, all the ranks, each of which calls this.

    Raises:
        OSError: it could not be written, and nothing of it stays.
    """
    final = folder / f"step-{snapshot.step:08d}"
    draft = folder / f".{final.name}.tmp"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()

    def finish() -> None:
        written = sorted(x for x in draft.rglob("*") if x.is_file())
        files = {x.relative_to(draft).as_posix(): file_digest(x) for x in written}
        record = snapshot.record | {"files": files}
        content = json.dumps(record | {"sha256": record_digest(record)}, indent=1)
        write_durably(draft / RECORD, content.encode())
        _publish(draft, final)

    try:
        ranks.on_first(begin)
        if snapshot.sharded:
            sharded.write(draft, snapshot.tensors, ranks.group)
        else:
            for name, tensors in snapshot.tensors.items():
                _write_tensors(draft / name, tensors)
        ranks.on_first(finish)
    except OSError:
        if ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def tidy(folder: Path) -> None:
    """Delete what a killed process left in `folder`; no other process may be writing there."""
    for replaced in folder.glob(".step-*.replaced"):
        final = folder / replaced.stem[1:]
        if not final.exists():  # killed between the two renames
            replaced.rename(final)
    for pattern in (".step-*.tmp", ".step-*.replaced", ".step-*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; if killed, it is still complete or no longer among `checkpoints`."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def is_healthy(checkpoint: Path) -> bool:
    """Whether a checkpoint says that it is, or says nothing; raises CheckpointError if damaged."""
    return read_record(checkpoint).get("healthy", True)


def load(
    checkpoint: Path,
    model: Transformer,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    same_model: bool = True,
) -> tuple[int, dict]:
    """Restore a model, and an optimizer if given, from a checkpoint.

    Args:
        checkpoint: its folder.
        model: receives the weights.
        optimizer: receives the states.
        same_model: refuse a model whose configuration differs, even if the shapes fit.

    Returns:
        The step, and the `state` that `snapshot` was given.

    Raises:
        CheckpointError: files are missing, damaged or of another model. Nothing was changed.
    """
    record = read_record(checkpoint)
    if same_model:
        _check_config(checkpoint, record["model"], model.config)
    parameters = dict(model.named_parameters())
    if sharded.is_sharded(model):
        weights, moments = (sharded.read(checkpoint, x, record, model) for x in FILES)
    else:
        weights, moments = (read_tensors(checkpoint, name, record) for name in FILES)
    shapes = {name: p.shape for name, p in parameters.items()}
    if {name: x.shape for name, x in weights.items()} != shapes:
        _check_config(checkpoint, record["model"], model.config)
    check_tensors(checkpoint, weights, parameters)
    if optimizer is not None:
        restored = _optimizer_state(checkpoint, moments, model, optimizer)
        try:
            optimizer.load_state_dict(restored)
        except ValueError as error:
            raise of_another(checkpoint, f"optimizer ({error})") from error
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    return record["step"], record["state"]


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # A step count may be a view of one vector of them all, which safetensors does not store.
    return {
        f"{name}.{key}": value.clone() if value.dim() == 0 else value.contiguous()
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _optimizer_state(
    checkpoint: Path, tensors: dict[str, Tensor], model: Transformer, optimizer
) -> dict:
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    keys = {name.rpartition(".")[2] for name in tensors}
    state = {
        i: {k: tensors[f"{name}.{k}"] for k in keys if f"{name}.{k}" in tensors}
        for i, name in enumerate(order)
    }
    state = {i: entry for i, entry in state.items() if entry}
    if sum(map(len, state.values())) != len(tensors):
        raise of_another(checkpoint, "optimizer: it holds states of other parameters")
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _check_config(checkpoint: Path, saved: dict, config: ModelConfig) -> None:
    if found := differences(saved, asdict(config)):
        raise of_another(checkpoint, f"model: {'; '.join(found)}")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its only cause here; its message holds the system's
        raise OSError(f"{path}: {error}") from None
    sync(path)


def _publish(draft: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # of a run that rolled back
        final.rename(replaced)
    draft.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
