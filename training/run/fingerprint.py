"""Fingerprint of everything that affects the result: data, tokenizer, settings, device, code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[2]
SOURCES = ("kernels/**/*.py", "model/**/*.py", "data/**/*.py", "training/**/*.py", "train.py")
SHOWN = 20  # differences in a message


class FingerprintError(ValueError):
    """A run is to continue with other data, settings or code than it began with."""


@cache
def code_version() -> dict[str, str]:
    """Return the versions of the packages that compute, and a digest of each source file."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return versions | {path.relative_to(ROOT).as_posix(): _digest(path) for path in files}


def differences(saved: dict, current: dict) -> list[str]:
    """Name the entries of two nested dicts that differ: `config.seed: 1, now 2`."""
    before, now = dict(_flatten(saved)), dict(_flatten(current))
    return [
        f"{name}: {before.get(name, 'absent')}, now {now.get(name, 'absent')}"
        for name in sorted(before.keys() | now.keys())
        if name not in before or name not in now or before[name] != now[name]
    ]


def require_same(saved: dict, current: dict, source: Path, *, anyway: bool) -> str:
    """Compare the fingerprint of a run with that of a checkpoint.

    Args:
        saved: the fingerprint in the checkpoint.
        current: the fingerprint of this run.
        source: the checkpoint, to be named.
        anyway: whether differences are allowed.

    Returns:
        The differences in words, empty if there are none.

    Raises:
        FingerprintError: the checkpoint "was written with different settings".
    """
    found = differences(saved, current)
    if not found:
        return ""
    shown = "".join(f"\n  {line}" for line in found[:SHOWN])
    shown += f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    if not anyway:
        raise FingerprintError(
            f"{source} was written with different settings:{shown}\n"
            "Resume with the same, or pass --resume-anyway."
        )
    return f"Resuming although {source} was written with different settings:{shown}\n"


def same_data(state: dict, fingerprint: dict) -> bool:
    """Whether a checkpoint's `state` is of the text and tokens of the run of that fingerprint."""
    before = state.get("fingerprint", {})
    return all(before.get(name) == fingerprint[name] for name in ("data", "tokenizer"))


def best_of(state: dict, fingerprint: dict) -> dict | None:
    """Return the lowest validation in a checkpoint's `state`, if a run may compare its own with it.

    Not if it is of other text than the run of that fingerprint validates on: other data or tokens,
    another context or number of tokens.
    """
    before, now = state.get("fingerprint", {}), fingerprint
    # Checkpoints made before the validation split had an entry are known by the others.
    same = (
        same_data(state, now) and before.get("validation", now["validation"]) == now["validation"]
    )
    return state.get("best") if same and _measure(before) == _measure(now) else None


def _measure(fingerprint: dict) -> tuple[int, int]:
    config = fingerprint["config"]
    return config["eval_tokens"], config["model"]["max_seq_len"]


def _flatten(entries: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
