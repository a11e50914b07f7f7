"""Text of the protocol for CPUs: the library of one Python, file by file as its checksums say.

docs/cpu/text.sha256 has the sums in the format of sha256sum: `sha256sum -c` checks a library by it.
The version is named because the library of every release differs: of 610 files 218 are others, or
not there, in Debian's 3.11.2, and 1.1 MB is the same in 3.11 to 3.13. So the text is
that of CPython 3.11.7, whichever Python runs; its modules are in every copy of that release.
Files that a library has in addition do not count.

Files whose sum begins with 00 to 0c, one in twenty, are held out: training, its validation and its
tokenizer see the others alone.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from tritium.bench.ends import WrongInputError
from tritium.bench.runs._trials import SCRIPT
from tritium.data.shards import Manifest

RELEASE = "3.11.7"
SUMS = SCRIPT.parent / "docs" / "cpu" / "text.sha256"
HELD_OUT = 13  # of 256
KNOWN, REPORT = "known", "report"  # folders
SHOWN = 3  # files in a message
SPLIT = {"train": (550, 9_666_199), "val": (29, 606_304)}
"""Documents and bytes that train.py learns from and chooses by."""


def read_sums(file: Path = SUMS) -> dict[str, str]:
    """Return the sha256 of each file of the text, by its path in the library."""
    if not file.is_file():
        raise WrongInputError(f"{file} is not there; run it in a checkout, which has docs/cpu")
    lines = (line.split("  ", 1) for line in file.read_text().splitlines())
    return {name: digest for digest, name in lines}


def is_held_out(digest: str) -> bool:
    """Whether the file of a sum is one of those that a run never sees."""
    return int(digest[:2], 16) < HELD_OUT


def write_text(library: Path, out: Path, sums: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Check a library, copy what may be seen, and return its folder and the held-out texts.

    Args:
        library: the folder `lib/python3.11`, or `Lib` of the sources.
        out: folder of the copy; one that is there already is checked and used.
        sums: as `read_sums` returns them.

    Raises:
        WrongInputError: the library is of another release, or the copy was changed.
    """
    texts, missing, changed = {}, [], []
    for name, digest in sums.items():
        try:
            texts[name] = (library / name).read_bytes()
        except OSError:
            missing.append(name)
            continue
        if sha256(texts[name]).hexdigest() != digest:
            changed.append(name)
    if missing or changed:
        found = [f"{len(x)} {what} ({_some(x)})" for what, x in
                 (("are missing", missing), ("are others", changed)) if x]  # fmt: skip
        raise WrongInputError(
            f"the text is the library of CPython {RELEASE}; of its {len(sums)} files "
            f"{' and '.join(found)} in {library}; name that library by --text: lib/python3.11 of "
            f"an installed {RELEASE}, or Lib of Python-{RELEASE}.tgz from python.org"
        )
    folder = out / KNOWN
    known = {name for name, digest in sums.items() if not is_held_out(digest)}
    for name in known:
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(texts[name])
        elif file.read_bytes() != texts[name]:
            raise WrongInputError(f"{file} was changed; delete {folder}, which is written anew")
    there = {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}
    if more := sorted(there - known):
        raise WrongInputError(f"{folder} holds more than the text ({_some(more)}); delete it")
    return folder, [texts[name].decode() for name in sums if name not in known]


def check_split(manifest: Manifest) -> None:
    """Raise WrongInputError unless prepared text has the documents of the protocol on each side."""
    found = {
        name: (sum(x.documents for x in shards), sum(x.bytes for x in shards))
        for name, shards in manifest.splits.items()
    }
    if found != SPLIT:
        raise WrongInputError(
            f"documents and bytes to learn from and to choose by must be {SPLIT}, got {found}: "
            "text is read or split in another way since; raise the version of the protocol"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
