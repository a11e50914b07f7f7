"""The cache of prepared data, whose folders appear complete or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritium.data.atomic import sync
from tritium.data.error import DataError, UnreachableError


def cache_root() -> Path:
    """Return $TRITIUM_HOME, else $XDG_CACHE_HOME/tritium, else ~/.cache/tritium.

    Raises:
        DataError: the user has no home folder, as in a container.
    """
    home, base = os.environ.get("TRITIUM_HOME"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path(base or "~/.cache", "tritium")).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"there must be a folder for prepared data, but this user (number {os.getuid()}) has "
            "no home folder; set TRITIUM_HOME to a folder that can be written"
        ) from error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Wait until no other process makes `folder`, and keep others waiting inside the block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # the kernel releases it when the process dies
        yield


@contextmanager
def publication(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `folder` if the block ends without an error.

    After a kill, a full disk or a lost network its files are kept; after any other
    DataError they are deleted. Files in it must have been synced. The earlier content of
    `folder` is deleted when the new one is complete. Call it under `lock(folder)`.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
    except UnreachableError:
        raise
    except DataError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync(folder.parent)
