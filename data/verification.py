"""Verification of prepared data by checksums, before a run or, if there is much, during it."""

import os
from pathlib import Path
from threading import Thread

from tritium.data.error import DataError
from tritium.data.shards import open_prepared, verify

AT_ONCE = 1 << 30  # bytes; read and hashed in about a second


class Verification:
    """Compare every shard of a prepared folder with its sha256, once.

    Up to `AT_ONCE` bytes are compared now. More would keep a GPU waiting for minutes, so a thread
    does it while the run continues, and `check` tells of what it found.

    Args:
        folder: what `prepare` returned.
        at_once: bytes that are compared now, at most.

    Raises:
        DataError: the folder is incomplete, or a shard is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], at_once: int = AT_ONCE):
        manifest, self._folder = open_prepared(folder).manifest, Path(folder)
        self._shards = [shard for shards in manifest.splits.values() for shard in shards]
        self._damage: DataError | None = None
        if sum((self._folder / shard.file).stat().st_size for shard in self._shards) <= at_once:
            self._compare()
            self.check()
        else:
            Thread(target=self._compare, name="verification", daemon=True).start()

    def check(self) -> None:
        """Raise DataError if a shard was found to be damaged by now."""
        if self._damage is not None:
            raise self._damage

    def _compare(self) -> None:
        for shard in self._shards:
            try:
                verify(self._folder, [shard])
            except DataError as error:
                self._damage = error
            except OSError as error:
                path = self._folder / shard.file
                self._damage = DataError(f"cannot read the shard {path}: {error.strerror}")
            if self._damage:
                return
