"""Where text comes from: a file, a folder, or the standard library of the running interpreter.

The standard library is the default because it is on every machine: about 12 MB of real text, no
download. Everything else is read from local disk through Hugging Face `datasets`; nothing here
touches the network.
"""

import hashlib
import logging
import os
import platform
import sysconfig
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

PROSE = (".txt", ".md", ".rst", ".tex")
CODE = (".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".sh")
READERS = {".jsonl": "from_json", ".parquet": "from_parquet"}
READABLE = (*PROSE, *CODE, *READERS)
TEXT_OPTIONS = {"encoding": "utf-8-sig"}  # UTF-8, a byte order mark dropped

PIECE = 65_536  # characters, about; a long text file is cut into documents of this length
ROWS = 64  # documents held at once: each may be a whole file

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class DataError(ValueError):
    """Data that cannot be used as given. The message names what, why, and the fix."""


def documents(source: str | Path | None = None, *, field: str = "text") -> Iterator[str]:
    """Yield the documents of `source`, one string each, in the same order every time.

    Args:
        source: a text file, a `.jsonl` or `.parquet` file, or a folder of these, read recursively
            and sorted by name without hidden files. None: the interpreter's standard library, one
            document per module, without tests and installed packages.
        field: the column of `.jsonl` and `.parquet` files that holds the text.

    Yields:
        Each row of a table; each text file of a folder. A text file given by itself is cut at
        blank lines into pieces of a hundredth of its length, 1 to 64 K characters, so that some
        can be kept for validation. Nulls and documents of white space alone are left out, a byte
        order mark is dropped, and every line end becomes a line feed.

    Raises:
        DataError: there is no such file or folder, or it holds no text; a file is of another type,
            is damaged, or is not UTF-8; a table has no column `field`, or it does not hold text.
    """
    files = source_files(source)
    if source is None:
        texts = map(_read_module, files)
    elif files == [_resolve(source)] and not _is_table(files[0]):
        texts = _read_pieces(files[0])
    else:
        texts = _read(files, field)
    empty = True
    for text in texts:
        if text and not text.isspace():
            empty = False
            yield text
    if empty:
        raise DataError(f"{describe(source)} holds no text; name a file or folder that does")


def source_files(source: str | Path | None) -> list[Path]:
    """List the files that `documents` reads, in its order, or raise its DataError."""
    if source is None:
        return _library_files()
    root = _resolve(source)
    if not root.exists():
        raise DataError(f"there is no file or folder {root}; text is read from local disk only")
    if root.is_dir():
        return _folder_files(root)
    if root.suffix and root.suffix.lower() not in READABLE:
        raise DataError(f"cannot read {root}: {root.suffix} is none of {' '.join(READABLE)}")
    return [root]


def source_fingerprint(source: str | Path | None) -> str:
    """Digest the names, sizes and modification times of the files of `source`, unread."""
    digest = hashlib.sha256(platform.python_version().encode() if source is None else b"")
    for file in source_files(source):
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def describe(source: str | Path | None) -> str:
    """Name `source` for people."""
    if source is None:
        return f"the standard library of Python {platform.python_version()}"
    return str(_resolve(source))


def _resolve(source: str | Path) -> Path:
    return Path(source).expanduser().resolve()


def _is_table(file: Path) -> bool:
    return file.suffix.lower() in READERS


def _walk(root: Path, skip: Callable[[str], bool]) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip(name)]
        found += [Path(folder, name) for name in names if not skip(name)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _library_files() -> list[Path]:
    # _sysconfigdata and config-* describe the machine that built Python, not the language.
    def skip(name: str) -> bool:
        return name in _NOT_LIBRARY or name.startswith(("config-", "_sysconfigdata"))

    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, skip) if file.suffix == ".py"]
    if not files:
        raise DataError(f"this Python has no library in source form in {root}; name your own text")
    return files


def _folder_files(root: Path) -> list[Path]:
    files = _walk(root, lambda name: name.startswith("."))
    files = [file for file in files if file.suffix.lower() in READABLE]
    if not files:
        raise DataError(f"the folder {root} holds no file of type {' '.join(READABLE)}; add some")
    return files


def _read_module(file: Path) -> str:
    with tokenize.open(file) as f:  # obeys the coding line that a module may have
        return f.read()


def _read(files: list[Path], field: str) -> Iterator[str]:
    files = [file for file in files if file.stat().st_size]  # datasets stops at an empty one
    for is_table, group in groupby(files, key=_is_table):
        if is_table:
            for file in group:  # one by one, so that an error can name it
                yield from _rows([file], field, READERS[file.suffix.lower()])
        else:
            yield from _rows([*group], "text", "from_text", sample_by="document", **TEXT_OPTIONS)


def _read_pieces(file: Path) -> Iterator[str]:
    size = min(PIECE, max(1024, file.stat().st_size // 100))
    lines = _rows(
        [file], "text", "from_text", sample_by="line", keep_linebreaks=True, **TEXT_OPTIONS
    )
    parts = (line[i : i + 4 * size] for line in lines for i in range(0, len(line), 4 * size))
    piece, length = [], 0
    for part in parts:
        piece.append(part)
        length += len(part)
        if length >= size and (part.isspace() or length >= 4 * size):
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def _rows(files: list[Path], column: str, reader: str, **options) -> Iterator[str]:
    try:
        with _stream(files, reader, options) as batches:
            for batch in batches:
                yield from _texts(batch, column, files[0])
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(files)) from error
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        what = files[0] if len(files) == 1 else f"one of {files[0]} ... {files[-1]}"
        raise DataError(f"cannot read {what}: {error}; repair or remove the file") from error


@contextmanager
def _stream(files: list[Path], reader: str, options: dict) -> Iterator[Iterable[dict]]:
    # datasets takes names for patterns ("[", "*", "::"), and one that matches nothing for an empty
    # file: it gets links under plain names. What it caches goes with them.
    import datasets

    with tempfile.TemporaryDirectory() as folder, _quiet(logging.getLogger("datasets")):
        links = [Path(folder, f"{i:09}{file.suffix.lower()}") for i, file in enumerate(files)]
        for link, file in zip(links, files, strict=True):
            link.symlink_to(file)
        read = getattr(datasets.Dataset, reader)
        yield read([*map(str, links)], streaming=True, cache_dir=folder, **options).iter(ROWS)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # what it would print is in the error it raises
    try:
        yield
    finally:
        logger.setLevel(level)


def _texts(batch: dict, column: str, file: Path) -> Iterator[str]:
    if column not in batch:
        raise DataError(
            f"{file} has no column '{column}' but {sorted(batch)}; name the text with field="
        )
    for text in batch[column]:
        if not isinstance(text, str | None):
            raise DataError(f"{file}: column '{column}' holds {type(text).__name__}, not text")
        yield text or ""


def _not_utf8(files: list[Path]) -> str:
    for file in files:
        offset = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return f"{file} is not UTF-8 at byte {offset + error.start}; convert it"
                offset += len(line)
    return f"{files[0]} changed while it was read; run again"
