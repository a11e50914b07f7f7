"""Reads the model out of a checkpoint that a run has written.

A checkpoint is a folder `step-00000060` with `model.safetensors`, `optimizer.safetensors` and
`state.json`, which holds the sizes and SHA-256 of the other two and of itself; a run keeps them in
its folder `checkpoints`. `tritium.training.run.checkpoint` writes them. In place of the tensors, a
run whose model is sharded over ranks writes `shards`, by torch.distributed.checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tritium.model import lora
from tritium.model.config import ModelConfig

FILES = ("model.safetensors", "optimizer.safetensors")
RECORD = "state.json"
SHARDS = "shards"
FORMAT = 2

Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not belong to this run."""


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run; the folder itself if it is one.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / RECORD).is_file():
        return folder
    found = checkpoints(folder / "checkpoints") or checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint; name the folder of a run of train.py, or of one of its "
            "checkpoints"
        )
    return found[-1]


def best(folder: Path) -> Path:
    """Return the checkpoint of a run with the lowest validation loss, if it was kept.

    Else the newest; the folder itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none, or the newest is damaged.
    """
    last = newest(folder)
    if last != folder:
        try:
            lowest = (read_record(last).get("state") or {}).get("best") or {}
        except CheckpointError:
            if last.exists():
                raise
            return best(folder)  # its run, which is training, has a newer one
        for checkpoint in checkpoints(last.parent):
            if step_of(checkpoint) == lowest.get("step"):
                return checkpoint
    return last


def read_model(checkpoint: Path, kind: type[Model]) -> Model:
    """Make the model that a checkpoint holds; adapters (`model.lora`) are merged.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    record = read_record(checkpoint)
    model = kind(ModelConfig(**record["model"]))
    if "lora" in record:
        lora.adapt(model, **record["lora"])
    model.to(getattr(torch, record.get("dtype", "float32")))
    weights = read_tensors(checkpoint, FILES[0], record)
    check_tensors(checkpoint, weights, dict(model.named_parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    lora.merge(model)
    return model


def read_chosen(run: Path, choose: Callable[[Path], Path], kind: type[Model]) -> Model:
    """Read the model of the checkpoint that `choose` names, as `read_model`.

    A run that is training deletes old checkpoints: one that is gone before it is read gives way to
    the one that is chosen then.
    """
    while True:
        checkpoint = choose(run)
        try:
            return read_model(checkpoint, kind)
        except Exception:  # which one depends on the file that was to be opened
            if checkpoint.exists():
                raise


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def read_record(checkpoint: Path) -> dict:
    """Return what `state.json` holds, or raise CheckpointError."""
    path = checkpoint / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; name a folder that holds it") from None
    except ValueError:
        raise damaged(path, "is not JSON") from None
    if not isinstance(record, dict) or "format" not in record:
        raise damaged(path, "is not the record of a checkpoint")
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is of format {record['format']}, this version reads format {FORMAT}; "
            "resume with the version that wrote it"
        )
    if record.pop("sha256", None) != record_digest(record):
        raise damaged(path, "has another checksum than when it was written")
    return record


def read_tensors(checkpoint: Path, name: str, record: dict) -> dict[str, Tensor]:
    """Return the tensors of one of `FILES`, or raise CheckpointError."""
    if name not in record["files"]:
        check_files(checkpoint, record)
        return read_shards(checkpoint, name)
    path = checkpoint / name
    _check_file(path, record["files"][name])
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, f"cannot be read ({error})") from None


def read_shards(
    checkpoint: Path,
    name: str,
    like: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of one of `FILES` from a checkpoint of shards.

    Args:
        checkpoint: its folder, whose files have been checked.
        name: one of `FILES`.
        like: makes the tensor to read into, of a name, shape and dtype; distributed ones get their
            parts, and every rank calls this. None: in this process alone, all of each.

    Raises:
        CheckpointError: torch cannot read them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    begin, reader = prefix_of(name), FileSystemReader(checkpoint / SHARDS)
    make = like or (lambda _key, size, dtype: torch.empty(size, dtype=dtype))
    tensors: dict[str, Any] = {
        key: make(key.removeprefix(begin), x.size, x.properties.dtype)
        for key, x in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(begin) and isinstance(x, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():  # that no other process takes part is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=reader, no_dist=like is None)
    except CheckpointException as error:
        raise damaged(checkpoint / SHARDS, f"cannot be read ({error})") from None
    return {key.removeprefix(begin): x for key, x in tensors.items()}


def prefix_of(name: str) -> str:
    """Return how the names of tensors begin in shards, for one of `FILES`: "model."."""
    return name.removesuffix("safetensors")


def check_files(checkpoint: Path, record: dict) -> None:
    """Raise CheckpointError unless the files of a checkpoint are as they were written."""
    for name, expected in record["files"].items():
        _check_file(checkpoint / name, expected)


def _check_file(path: Path, expected: dict) -> None:
    if not path.exists():
        raise damaged(path, "is missing")
    if path.stat().st_size != expected["bytes"]:
        raise damaged(path, f"has {path.stat().st_size} bytes instead of {expected['bytes']}")
    if file_digest(path) != expected:
        raise damaged(path, "has another checksum than when it was written")


def check_tensors(checkpoint: Path, tensors: dict[str, Tensor], parameters: dict) -> None:
    """Raise CheckpointError unless the tensors are those of a model's parameters."""
    # The checksums were those of the record, so whatever differs belongs to another model.
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise of_another(checkpoint, f"model: it and this one differ in {odd[0]}")
    for name, p in parameters.items():
        saved = tensors[name]
        if saved.shape != p.shape:
            shapes = f"{list(saved.shape)}, now {list(p.shape)}"
            raise of_another(checkpoint, f"model: {name} has shape {shapes}")
        if saved.dtype != p.dtype:
            before, now = (str(x.dtype).removeprefix("torch.") for x in (saved, p))
            raise CheckpointError(
                f"{checkpoint} is of another precision: weights in {before}, now in {now}; resume "
                "with the --precision it was made with, or start a new run in another folder"
            )


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error of a file that is not as it was written."""
    folder = path.parent.parent if path.parent.name == SHARDS else path.parent
    return CheckpointError(
        f"{path} {what}: the checkpoint is damaged; move the folder {folder.name} elsewhere "
        "to resume from the one before, if there is one"
    )


def of_another(checkpoint: Path, what: str) -> CheckpointError:
    """Return the error of a checkpoint that is intact but belongs to another run."""
    return CheckpointError(
        f"{checkpoint} is of another {what}; resume with the settings it was made with, or start "
        "a new run in another folder"
    )


def file_digest(path: Path) -> dict:
    """Return the size of a file in bytes, and its SHA-256."""
    with path.open("rb") as file:
        size = path.stat().st_size
        # One call for all of the file: the interpreter's lock is released once, not per block.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest = hashlib.sha256(content).hexdigest()
    return {"bytes": size, "sha256": digest}


def record_digest(record: dict) -> str:
    """Return the SHA-256 of a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
