"""Atomic file writes: the disk has the complete file, or nothing of it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file `path` by `content`; text is written as UTF-8.

    Readers, and a crash at any moment, find the old file or the new one. On return the disk has it.
    """
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write, whose file replaces `path` if the block ends without an error.

    It is in the folder of `path` and has the same suffix, for writers that depend on it. After an
    error nothing is left of it, and `path` is as it was.
    """
    path = Path(path)
    draft = path.with_name(f".{secrets.token_hex(6)}.tmp{path.suffix}")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until the disk has a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
