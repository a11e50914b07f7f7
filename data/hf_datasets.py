"""Hugging Face datasets, by name and revision, read through `datasets`: `hf://OWNER/NAME@REVISION`.

A dataset is downloaded once, into the cache of `datasets`, or streamed. The revision is resolved to
a commit first, so that the same text is read every time; a full commit hash needs no network once
the dataset is there. `hf:///FOLDER` is a dataset on disk.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from tritium.data.error import DataError, UnreachableError
from tritium.data.records import ROWS, Tally, check_text

SCHEME = "hf://"


def is_hub(path: str | Path | None) -> bool:
    """Whether `path` names a dataset rather than a file or folder of text."""
    return isinstance(path, str) and path.startswith(SCHEME)


def files(path: str) -> list[Path]:
    """List the files of a dataset on disk; none for one of the hub."""
    root = _folder(path)
    if root is None:
        return []
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; a dataset of the hub is hf://OWNER/NAME")
    return sorted(file for file in root.rglob("*") if file.is_file())


def revision(path: str) -> str:
    """Return the commit of a dataset of the hub, or a digest of the files of one on disk.

    Raises:
        DataError: the hub cannot be reached, or knows no such dataset or revision.
    """
    if _folder(path) is not None:
        stats = [(str(file), file.stat()) for file in files(path)]
        content = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in stats)
        return hashlib.sha256(content.encode()).hexdigest()
    name, wanted = _name(path)
    if wanted and re.fullmatch("[0-9a-f]{40}", wanted):
        return wanted
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(name, revision=wanted).sha
    except Exception as error:  # of the hub's library, of its HTTP library, of the system
        raise UnreachableError(
            f"cannot ask the hub for revision {wanted or 'main'} of {name}: {_first_line(error)}; "
            f"check the name and the network, or give a commit, {SCHEME}{name}@40_HEX_DIGITS"
        ) from error
    return str(sha)


def read(
    path: str, column: str, tally: Tally, *, config: str | None, split: str, stream: bool
) -> Iterator[str]:
    """Yield the texts of column `column` of a dataset.

    Raises:
        DataError: it cannot be loaded, or has no such column.
    """
    import datasets

    folder = _folder(path)
    name, commit = (str(folder), None) if folder else (_name(path)[0], revision(path))
    try:
        rows = datasets.load_dataset(
            name, name=config, split=split, revision=commit, streaming=stream
        )
        columns = rows.column_names
        if columns is not None and column not in columns:
            raise DataError(f"{path} has no column '{column}' but {sorted(columns)}; set field=")
        number = 0
        for batch in rows.select_columns([column]).iter(ROWS):
            for value in dict(batch)[column]:
                number += 1
                text = check_text(value, column, f"{path} row {number}", tally)
                if text is not None:
                    yield text
    except DataError:
        raise
    except Exception as error:  # of datasets and all that it uses
        raise UnreachableError(
            f"cannot read {path} (configuration {config}, split {split}): {_first_line(error)}; "
            "check these and the network; finished shards are kept"
        ) from error


def _folder(path: str) -> Path | None:
    rest = path.removeprefix(SCHEME)
    return Path(rest) if rest.startswith("/") else None


def _name(path: str) -> tuple[str, str | None]:
    name, _, wanted = path.removeprefix(SCHEME).removeprefix("datasets/").partition("@")
    return name, wanted or None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
