"""The list of what a run has finished, one JSON object per line, each on disk before the next."""

from pathlib import Path

from tritium.data import json_lines
from tritium.data.atomic import write

FILE = "journal.jsonl"


def append(folder: Path, entry: dict) -> None:
    """Add `entry`, and wait until the disk has it."""
    json_lines.append(folder / FILE, entry)


def replace(folder: Path, entries: list[dict]) -> None:
    """Replace the journal by `entries`, atomically."""
    write(folder / FILE, b"".join(map(json_lines.to_line, entries)))


def remove(folder: Path) -> None:
    """Delete the journal: everything that it lists is in a manifest now."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> list[dict]:
    """Return the entries, without a last one that was cut short; none if there is no journal."""
    return json_lines.read(folder / FILE)
