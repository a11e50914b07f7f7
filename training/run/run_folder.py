"""The folder of one run: its lock, and its crash-safe log."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from tritium.data import atomic, json_lines
from tritium.data.json_lines import to_line
from tritium.data.json_text import with_nan

LOCK = ".lock"


class RunFolderError(ValueError):
    """The folder cannot be this run's. Nothing in it was changed."""


@contextmanager
def lock_folder(run: Path, *, resume: bool) -> Iterator[Path]:
    """Make the folder of a run, and keep other processes out of it inside the block.

    Args:
        run: the folder; deleted again where the block fails before it put anything there.
        resume: whether it may hold a run already.

    Raises:
        RunFolderError: it "is a file", "is not empty", "is in use" or "cannot be written".
    """
    made = not run.exists()
    if run.exists() and not run.is_dir():
        raise RunFolderError(f"--out {run} is a file; name a folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        _lock(run, lock)
        if not resume and _content(run):
            raise RunFolderError(
                f"--out {run} is not empty; pass --resume to resume the run in it, or name a new "
                "folder"
            )
        yield run
    finally:
        os.close(lock)  # which releases the lock, as the end of the process does
        if made and not _content(run):
            (run / LOCK).unlink(missing_ok=True)
            run.rmdir()


def _lock(run: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 1000).decode(errors="replace") or "another process"
        raise RunFolderError(
            f"{run} is in use by {owner}; wait for it or stop it, or name another folder"
        ) from None
    except OSError as error:  # a file system without locks
        raise _unwritable(run, error) from error
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        os.fsync(lock)
    except OSError as error:
        raise _unwritable(run, error) from error


def _content(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if path.name != LOCK]


def _unwritable(run: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{run} cannot be written ({error.strerror}); make room or name a folder elsewhere"
    )


class RunLog:
    """A file such as log.jsonl: one JSON object per line, each with its `step`.

    JSON has no NaN and no infinity: both are null there, and NaN in what `read_lines` returns.

    After a rollback, the entries of the steps to repeat move to a file beside it,
    abandoned-log.jsonl, each with `abandoned`: the number of rollbacks by then.

    Args:
        path: the file. Entries of later steps than `step` are deleted.
        step: the step that the run resumes from.
        log: called with one line for lines that could not be written; they are kept, and
            written with the next.
        n_rollbacks: rollbacks so far.

    Attributes:
        entries: all there are.
    """

    def __init__(self, path: Path, step: int, log: Callable[[str], None], n_rollbacks: int = 0):
        self._abandoned = path.with_name(f"abandoned-{path.name}")
        if self._abandoned.exists():
            known = [
                entry for entry in read_lines(self._abandoned) if entry["abandoned"] <= n_rollbacks
            ]
            atomic.write(self._abandoned, b"".join(map(to_line, known)))
        self.entries = [entry for entry in read_lines(path) if entry["step"] <= step]
        kept = b"".join(map(to_line, self.entries))
        atomic.write(path, kept)
        self._path, self._log, self._size, self._waiting = path, log, len(kept), b""

    def rewind(self, step: int, n_rollbacks: int) -> None:
        """Move the entries of later steps than `step` to the abandoned ones.

        Raises:
            OSError: they could not be written elsewhere; nothing has changed.
        """
        kept = [entry for entry in self.entries if entry["step"] <= step]
        discarded = [{**x, "abandoned": n_rollbacks} for x in self.entries[len(kept) :]]
        if discarded:
            before = read_lines(self._abandoned)
            atomic.write(self._abandoned, b"".join(map(to_line, before + discarded)))
            content = b"".join(map(to_line, kept))
            atomic.write(self._path, content)
            self.entries, self._size, self._waiting = kept, len(content), b""

    def append(self, entries: list[dict]) -> None:
        """Write entries, or keep them for the next time."""
        self.entries += entries
        self._waiting += b"".join(map(to_line, entries))
        try:
            with self._path.open("r+b", buffering=0) as file:
                self._write(file)
        except OSError as error:
            self._log(
                f"Could not write {self._path} ({error.strerror}); its lines wait for the next."
            )

    def _write(self, file: FileIO) -> None:
        file.seek(self._size)
        written = 0
        try:
            while written < len(self._waiting):
                written += file.write(self._waiting[written:])
        except OSError:
            file.truncate(self._size)  # no half line stays
            raise
        self._size, self._waiting = self._size + written, b""

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        try:
            atomic.sync(self._path)
        except OSError as error:
            self._log(f"Could not write {self._path} ({error.strerror}).")


def read_lines(path: Path) -> list[dict]:
    """Return the entries of a .jsonl file up to the first broken line; none without a file.

    As `tritium.data.json_lines.read`; null, written for a number that is not finite, is NaN.
    """
    return [with_nan(entry) for entry in json_lines.read(path)]
