"""Files of one JSON object a line, read up to where a kill or a loss of power cut them.

Whatever bytes these leave, and all that follows them, is no entry. So nothing is appended
behind them: `opened` removes them first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tritium.data.json_text import to_json


def read(path: Path, start: int = 0) -> list[dict]:
    """Return the entries up to the first broken line; none without a file.

    A broken line is one that does not end, or holds anything but a JSON object in UTF-8.

    Args:
        path: the file; another process may be writing it.
        start: byte at which the first line to read begins.
    """
    return _read(path, start)[0]


def opened(path: Path) -> list[dict]:
    """Return the entries, as `read` does, and remove what follows them: `append` may be called.

    What is more than one line without its end is not what a kill leaves, and may hold entries: it
    is kept in a file beside, which is called the same with `.broken` behind.
    """
    entries, size = _read(path)
    rest = path.read_bytes()[size:] if path.exists() else b""
    if b"\n" in rest:
        with path.with_name(f"{path.name}.broken").open("ab") as kept:
            kept.write(rest)
            kept.flush()
            os.fsync(kept.fileno())
    if rest:
        os.truncate(path, size)
    return entries


def append(path: Path, entry: dict) -> None:
    """Add an entry to a file that was opened; on return the disk has it.

    Several processes may append to one file at once. The file is made if it is not there.
    """
    with path.open("ab") as file:
        file.write(to_line(entry))
        file.flush()
        os.fsync(file.fileno())


def to_line(entry: dict) -> bytes:
    """Return the line of an entry; numbers that are not finite are null in it."""
    return (to_json(entry) + "\n").encode()


def _read(path: Path, start: int = 0) -> tuple[list[dict], int]:
    """Return the entries, and the byte at which the last one's line ends."""
    entries: list[dict] = []
    try:
        with path.open("rb") as file:
            file.seek(start)
            *lines, _ = file.read().split(b"\n")
    except FileNotFoundError:
        return [], start
    for line in lines:
        try:
            entry = json.loads(line.decode())
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
        start += len(line) + 1
    return entries, start
