"""The list of what a run has finished, one JSON object per line, each on disk before the next."""

import json
import os
from pathlib import Path

from tritium.data.atomic import write

FILE = "journal.jsonl"


def append(folder: Path, entry: dict) -> None:
    """Add `entry`, and wait until the disk has it."""
    with (folder / FILE).open("ab") as f:
        f.write(json.dumps(entry).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def replace(folder: Path, entries: list[dict]) -> None:
    """Replace the journal by `entries`, atomically."""
    write(folder / FILE, "".join(json.dumps(entry) + "\n" for entry in entries))


def remove(folder: Path) -> None:
    """Delete the journal: everything that it lists is in a manifest now."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> list[dict]:
    """Return the entries, without a last one that was cut short; none if there is no journal."""
    entries = []
    try:
        for line in (folder / FILE).read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entries.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return entries
