"""Journal of a session: entries on the disk as they come, a line of JSON each."""

import json
import threading
from pathlib import Path


class Journal:
    """Entries in a file, in order; an entry that `append` returned from survives a kill.

    What a kill or a loss of power left behind the last whole line is removed when the file is
    opened.

    Args:
        path: the file.
        keep: whether to read the file and to keep its entries. False for one of several processes
            that append to it at once, each a line at a time.
    """

    def __init__(self, path: Path, keep: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.keep = path, keep
        self.lock = threading.Lock()
        self.entries: list[dict] = _lines().opened(path) if keep else []

    def append(self, **entry: object) -> None:
        """Add an entry; on return the disk has it."""
        with self.lock:
            _lines().append(self.path, entry)
            if self.keep:
                self.entries.append(json.loads(_lines().to_line(entry)))

    def of(self, kind: str) -> list[dict]:
        """The entries of one kind, in order."""
        return [entry for entry in self.entries if entry.get("kind") == kind]


def read(path: Path, start: int) -> list[dict]:
    """The entries of a file from a byte on; other processes may be writing it."""
    return _lines().read(path, start)


def _lines():
    """The reader and writer of lines, imported late: the plugin of pytest leaves torch to tests."""
    from tritium.data import json_lines

    return json_lines
