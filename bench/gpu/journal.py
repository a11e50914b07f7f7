"""Journal of a session: entries on the disk as they come, a line of JSON each."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tritium.training.run.json_text import to_json


class Journal:
    """Entries in a file, in order; an entry that `append` returned from survives a kill.

    A line that a kill cut short is removed when the file is opened.

    Args:
        path: the file.
        keep: whether to read the file and to keep its entries. False for one of several processes
            that append to it at once, each a line at a time.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.keep = path, keep
        self.lock = threading.Lock()
        self.entries: list[dict] = list(self._read()) if keep else []

    def _read(self) -> Iterator[dict]:
        whole = 0
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            whole += len(line)
            yield entry
        if whole < len(content):
            os.truncate(self.path, whole)

    def append(self, **entry: object) -> None:
        """Add an entry; on return the disk has it."""
        line = to_json(entry).encode() + b"\n"
        with self.lock, self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            if self.keep:
                self.entries.append(json.loads(line))

    def of(self, kind: str) -> list[dict]:
        """The entries of one kind, in order."""
        return [entry for entry in self.entries if entry.get("kind") == kind]
