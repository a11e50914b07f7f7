"""Checkpoints: folders that are complete and checked, or not there at all.

A checkpoint is a folder `step-00000060` with `model.safetensors`, `optimizer.safetensors` and
`state.json`, which holds the sizes and SHA-256 of the other two. It is written under a temporary
name, synced, and renamed: a process killed at any moment leaves the last one valid. No pickle is
written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .transformer import ModelConfig, Transformer

FILES = ("model.safetensors", "optimizer.safetensors")
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not belong to this run."""


def save(
    folder: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: dict,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Args:
        folder: where the checkpoints of a run lie; made if absent.
        step: optimizer steps taken so far.
        model: its parameters are saved.
        optimizer: its state tensors are saved, by the names of the parameters.
        state: anything else, as JSON.
        keep: how many checkpoints to leave, at least 1.

    Returns:
        The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    draft = folder / f".{final.name}.tmp"
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    draft.mkdir()
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    for name, tensors in zip(FILES, (weights, _optimizer_tensors(model, optimizer)), strict=True):
        save_file(tensors, draft / name)
        _sync(draft / name)
    record = {
        "format": FORMAT,
        "step": step,
        "model": asdict(model.config),
        "files": {name: _fingerprint(draft / name) for name in FILES},
        "state": state,
    }
    (draft / "state.json").write_text(json.dumps(record, indent=1))
    _sync(draft / "state.json")
    _sync(draft)
    if final.exists():  # of a run that was resumed from an earlier step
        shutil.rmtree(final)
    draft.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def load(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer | None = None
) -> tuple[int, dict]:
    """Restore a model, and an optimizer if given, from a checkpoint.

    Returns:
        The step, and the `state` that `save` was given.

    Raises:
        CheckpointError: files are missing, damaged or of another model. Nothing was changed.
    """
    record = read_record(checkpoint)
    _check_config(checkpoint, record["model"], model.config)
    weights, moments = (_read_tensors(checkpoint, name, record) for name in FILES)
    parameters = dict(model.named_parameters())
    _check_tensors(checkpoint, weights, {name: p.shape for name, p in parameters.items()})
    if optimizer is not None:
        restored = _optimizer_state(checkpoint, moments, model, optimizer)
        optimizer.load_state_dict(restored)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    return record["step"], record["state"]


def load_model(checkpoint: Path) -> Transformer:
    """Make the model that a checkpoint holds. Raises CheckpointError like `load`."""
    model = Transformer(ModelConfig(**read_record(checkpoint)["model"]))
    load(checkpoint, model)
    return model


def read_record(checkpoint: Path) -> dict:
    """Return what `state.json` holds, or raise CheckpointError."""
    path = checkpoint / "state.json"
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; name a folder that holds it") from None
    except ValueError:
        raise _damaged(path, "is not JSON") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _damaged(path, f"is not of format {FORMAT}")
    return record


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
    state = {i: {k: tensors.get(f"{name}.{k}") for k in keys} for i, name in enumerate(order)}
    state = {i: entry for i, entry in state.items() if any(x is not None for x in entry.values())}
    if sum(x is not None for entry in state.values() for x in entry.values()) != len(tensors):
        raise _damaged(checkpoint / FILES[1], "holds states of other parameters")
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _read_tensors(checkpoint: Path, name: str, record: dict) -> dict[str, Tensor]:
    path = checkpoint / name
    expected = record["files"][name]
    if not path.exists():
        raise _damaged(path, "is missing")
    if path.stat().st_size != expected["bytes"]:
        raise _damaged(path, f"has {path.stat().st_size} bytes instead of {expected['bytes']}")
    if _fingerprint(path) != expected:
        raise _damaged(path, "has another checksum than when it was written")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, f"cannot be read ({error})") from None


def _check_config(checkpoint: Path, saved: dict, config: ModelConfig) -> None:
    ours = asdict(config)
    differences = [
        f"{key} {saved.get(key)} (here {ours.get(key)})"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} is of another model: {', '.join(differences)}; "
            "resume with the settings it was made with, or start a new run in another folder"
        )


def _check_tensors(checkpoint: Path, tensors: dict[str, Tensor], shapes: dict) -> None:
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise _damaged(checkpoint / FILES[0], f"lacks or exceeds the model by {odd[0]}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise _damaged(
                checkpoint / FILES[0],
                f"holds {name} of shape {list(tensors[name].shape)} instead of {list(shape)}",
            )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}: the checkpoint is damaged; delete or move the folder {path.parent.name} "
        "to go on from the one before"
    )


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
