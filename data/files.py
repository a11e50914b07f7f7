"""Files of a local source, and their bytes, decompressed."""

import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, cast

from tritium.data.error import DataError

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".sh")
JSONL, PARQUET = ".jsonl", ".parquet"
READABLE = (*PROSE, *CODE, JSONL, PARQUET)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of every kind but parquet, which has its own

_NOT_PACKAGE = {"__pycache__", "test", "tests", "testing", "_vendor", "vendor", "node_modules"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def resolve(path: str | Path) -> Path:
    """Return the absolute path, `~` and the links of its folder followed; `~x` of no user stays.

    The last name stays as it was given, because it says how to read the file: in the hub's cache it
    is a link to a file without a suffix.
    """
    given = Path(os.path.expanduser(path))
    return given.parent.resolve() / given.name if given.name not in ("", "..") else given.resolve()


def kind(file: Path) -> str:
    """Return the extension that says how to read `file`: `.jsonl` for `A.JSONL.gz`.

    Of a link without one, the name that it leads to says it.
    """
    suffixes = [suffix.lower() for suffix in _named(file).suffixes] or [""]
    return suffixes[-2] if suffixes[-1] in COMPRESSIONS and len(suffixes) > 1 else suffixes[-1]


def local_files(path: str | Path) -> list[Path]:
    """List the files to read at `path`, sorted, without the hidden ones of a folder.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be read.
    """
    try:
        root = resolve(path)
        there = root.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have
        if len(text := str(path)) > 200 or "\n" in text:
            raise DataError(
                f"a source is the name of a file, folder or dataset, got {text[:40]!r}..., which "
                "reads like the text itself; write it to a file and give its name"
            ) from error
        raise DataError(f"cannot read {path}: {error}; name a file or folder") from error
    if not there:
        raise DataError(f"there is no file or folder {root}; a dataset of the hub is hf://NAME")
    if root.is_dir():
        return _folder_files(root)
    if root.suffix and not _is_readable(root):
        raise DataError(f"cannot read {root}: {root.suffix} is none of {_readable()}")
    return [root]


def stamp(file: Path) -> tuple[int, int]:
    """Return the size of `file` in bytes and when it was written, in nanoseconds.

    Raises:
        DataError: it is not a file, or out of reach; to read a pipe would wait forever.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; repair or remove it") from error
    if not S_ISREG(stat.st_mode):
        raise DataError(f"cannot read {file}: it is a pipe or a device; write its text to a file")
    return stat.st_size, stat.st_mtime_ns


def library_files() -> list[Path]:
    """List the modules of the interpreter's standard library, without tests and packages.

    Without its `encodings` too: tables of characters, 12 % of the text, that read like no code.
    """

    # _sysconfigdata and config-* describe the machine that built Python, not the language.
    def skip(name: str) -> bool:
        return name in _NOT_LIBRARY or name.startswith(("config-", "_sysconfigdata"))

    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, skip) if file.suffix == ".py"]
    files = [file for file in files if file.relative_to(root).parts[0] != "encodings"]
    if not files:
        raise DataError(f"this Python has no library in source form in {root}; name your own text")
    return files


def installed_files() -> list[Path]:
    """List the Python files of all packages that are installed beside torch, without tests."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise DataError("there is no torch to look beside of; install it, or name your own text")
    root = Path(spec.origin).parents[1]

    def skip(name: str) -> bool:
        return name in _NOT_PACKAGE or name.startswith((".", "test_"))

    return [file for file in _walk(root, skip) if file.suffix == ".py"]


@contextmanager
def open_bytes(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open `file` twice over: as stored, whose position tells progress, and decompressed."""
    with file.open("rb") as stored:
        compression = COMPRESSIONS.get(_named(file).suffix.lower())
        if compression is None:
            yield stored, stored
            return
        import pyarrow

        plain = BufferedReader(cast(RawIOBase, pyarrow.input_stream(stored, compression)))
        yield stored, cast(BinaryIO, plain)


def _named(file: Path) -> Path:
    """Return `file`, or the first name with a suffix that it leads to as a link."""
    named = file
    for _ in range(40):  # as many as Linux follows
        if named.suffix or not named.is_symlink():
            break
        named = named.parent / named.readlink()
    return named if named.suffix else file


def _is_readable(file: Path) -> bool:
    compressed = _named(file).suffix.lower() in COMPRESSIONS
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
    visible = _walk(root, lambda name: name.startswith("."))
    files = [file for file in visible if file.suffix and _is_readable(file)]
    if not files:
        raise DataError(f"the folder {root} holds no file of type {' '.join(READABLE)}; add some")
    return files
