"""Standard JSON, which has no NaN and no infinities."""

from __future__ import annotations

import json
from math import isfinite, nan
from typing import Any


def to_json(entry: object, indent: int | None = None) -> str:
    """Return JSON with null for numbers that are not finite."""
    return json.dumps(_finite(entry), indent=indent, allow_nan=False)


def with_nan(entry: Any) -> Any:
    """Return what was read with NaN for null, for entries in which only numbers can be null."""
    if isinstance(entry, dict):
        return {name: with_nan(x) for name, x in entry.items()}
    if isinstance(entry, list):
        return [with_nan(x) for x in entry]
    return nan if entry is None else entry


def _finite(entry: object) -> object:
    if isinstance(entry, float):
        return entry if isfinite(entry) else None
    if isinstance(entry, dict):
        return {name: _finite(x) for name, x in entry.items()}
    return [_finite(x) for x in entry] if isinstance(entry, (list, tuple)) else entry
