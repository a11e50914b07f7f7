"""Which files a local source consists of, and their bytes, decompressed."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

from .error import DataError

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".sh")
JSONL, PARQUET = ".jsonl", ".parquet"
READABLE = (*PROSE, *CODE, JSONL, PARQUET)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of every kind but parquet, which has its own

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def resolve(path: str | Path) -> Path:
    """Return the absolute path, `~` and links followed."""
    return Path(path).expanduser().resolve()


def kind(file: Path) -> str:
    """Return the extension that says how to read `file`: `.jsonl` for `A.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes] or [""]
    return suffixes[-2] if suffixes[-1] in COMPRESSIONS and len(suffixes) > 1 else suffixes[-1]


def local_files(path: str | Path) -> list[Path]:
    """List the files to read at `path`, sorted, without the hidden ones of a folder.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be read.
    """
    root = resolve(path)
    if not root.exists():
        raise DataError(f"there is no file or folder {root}; a dataset of the hub is hf://NAME")
    if root.is_dir():
        return _folder_files(root)
    if root.suffix and not _is_readable(root):
        raise DataError(f"cannot read {root}: {root.suffix} is none of {_readable()}")
    return [root]


def library_files() -> list[Path]:
    """List the modules of the interpreter's standard library, without tests and packages."""

    # _sysconfigdata and config-* describe the machine that built Python, not the language.
    def skip(name: str) -> bool:
        return name in _NOT_LIBRARY or name.startswith(("config-", "_sysconfigdata"))

    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, skip) if file.suffix == ".py"]
    if not files:
        raise DataError(f"this Python has no library in source form in {root}; name your own text")
    return files


@contextmanager
def open_bytes(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open `file` twice over: as stored, whose position tells progress, and decompressed."""
    with file.open("rb") as stored:
        compression = COMPRESSIONS.get(file.suffix.lower())
        if compression is None:
            yield stored, stored
            return
        import pyarrow

        plain = BufferedReader(cast(RawIOBase, pyarrow.input_stream(stored, compression)))
        yield stored, cast(BinaryIO, plain)


def _is_readable(file: Path) -> bool:
    compressed = file.suffix.lower() in COMPRESSIONS
    return kind(file) in READABLE and not (compressed and kind(file) == PARQUET)


def _readable() -> str:
    return f"{' '.join(READABLE)}, nor one of these with {' or '.join(COMPRESSIONS)}"


def _walk(root: Path, skip: Callable[[str], bool]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        found += [Path(folder, name) for name in names if not skip(name)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _folder_files(root: Path) -> list[Path]:
    files = [file for file in _walk(root, lambda name: name.startswith(".")) if _is_readable(file)]
    if not files:
        raise DataError(f"the folder {root} holds no file of type {' '.join(READABLE)}; add some")
    return files
