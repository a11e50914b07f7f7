"""Files that are on the disk whole, or not at all, and hold JSON that everybody reads."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Replace the file `path`: readers, and a crash at any moment, find it old or new."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def to_json(entry: object, indent: int | None = None) -> str:
    """Return JSON, in which null stands for a number that is not finite: JSON has none such."""
    return json.dumps(_finite(entry), indent=indent, allow_nan=False)


def _finite(entry: object) -> object:
    if isinstance(entry, float):
        return entry if isfinite(entry) else None
    if isinstance(entry, dict):
        return {name: _finite(x) for name, x in entry.items()}
    return [_finite(x) for x in entry] if isinstance(entry, (list, tuple)) else entry


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
