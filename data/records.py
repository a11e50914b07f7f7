"""Reads documents from files; counts and skips bad records."""

import hashlib
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tritium.data.decoding import HEAD, NotTextError, as_utf8, detect, is_text
from tritium.data.error import DataError, printable
from tritium.data.files import JSONL, PARQUET, kind, open_bytes, stamp

PIECE = 65_536  # characters, about; a long text file is cut into documents of this length
_LEAST = 1024  # characters, about, of such a document
SURE_TO_BE_CUT = 8 * _LEAST + 1  # a text of one line that long gives two documents
ROWS = 64  # rows of a table held at once: each may be a book
_LINE = 1 << 20  # bytes of a text file read at once
_DIGIT = re.compile("[0-9]")
_NOT_TEXT = "not text but control characters"


@dataclass
class Tally:
    """Counts of one pass over a source so far."""

    kept: int = 0
    """Documents given out."""
    good: int = 0
    """Records that could be read; for a single text file, lines."""
    bad: Counter[str] = field(default_factory=Counter)
    """Records that could not be read, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records that were read and not wanted, by reason."""
    first_bad: str = ""
    """Place of the first bad record, and its fault."""
    encodings: Counter[str] = field(default_factory=Counter)
    """Files in another encoding than UTF-8, by encoding."""
    n_bytes: int = 0
    """Bytes of the files that have been read to their end, as stored."""
    stored: BinaryIO | None = None
    """The file that is being read."""

    def add_bad(self, reason: str, where: str, records: int = 1) -> None:
        """Count records that cannot be used."""
        self.bad[reason] += records
        self.first_bad = self.first_bad or printable(f"{where}: {reason}")

    def share_bad(self) -> float:
        """Return the share of the records met so far that could not be read."""
        bad = self.bad.total()
        return bad / max(1, bad + self.good)

    def position(self) -> int:
        """Return how many bytes of the source's files have been read, as stored."""
        return self.n_bytes + (self.stored.tell() if self.stored else 0)

    def summary(self) -> str:
        """Say what was left out and why, for people; nothing if nothing was."""
        return summary(self.bad, self.first_bad, self.left_out)


def summary(bad: Mapping[str, int], first_bad: str, left_out: Mapping[str, int]) -> str:
    """Say in a line how many records were left out and why; nothing if none was."""
    parts = []
    if bad:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in bad.items())
        parts.append(f"{sum(bad.values()):,} bad ({reasons}; first: {first_bad})")
    parts += [f"{n:,} {reason}" for reason, n in left_out.items()]
    return ", ".join(parts)


def read_files(files: list[Path], column: str, tally: Tally, cut: bool) -> Iterator[str]:
    """Yield the texts of files: each row of a table, each text file, or its pieces if `cut`."""
    for file in files:
        size, _ = stamp(file)
        try:
            encoding, mark = ("utf-8", 0) if kind(file) == PARQUET else _encoding(file, tally)
            with open_bytes(file) as (stored, plain):
                tally.stored = stored
                if kind(file) == PARQUET:
                    yield from _parquet_rows(plain, file, column, tally)
                elif kind(file) == JSONL:
                    lines = as_utf8(plain, encoding, mark)
                    yield from _json_lines(lines, encoding, file, column, tally)
                else:
                    lines = as_utf8(plain, encoding, mark)
                    read = _pieces if cut else _whole
                    yield from read(lines, encoding, file, tally)
        except NotTextError as error:
            tally.add_bad(str(error), str(file))
        except (OSError, EOFError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"cannot read {file}: {error}; repair or remove it") from error
            tally.add_bad("damaged file", f"{file} ({error})")
        finally:
            tally.stored = None
        tally.n_bytes += size


def read_text(file: Path) -> str:
    """Return a text file whole, decompressed and decoded as `read_files` does, with line feeds.

    Raises:
        DataError: it cannot be read, is no text, or is a table of many.
    """
    if kind(file) in (JSONL, PARQUET):
        raise DataError(f"{file} is a table of texts; name one text, as .txt or without an ending")
    tally = Tally()
    texts = [*read_files([file], "", tally, cut=False)]
    if not texts:
        raise DataError(f"cannot read {tally.first_bad}; name a text")
    return texts[0]


def read_modules(files: list[Path], tally: Tally) -> Iterator[str]:
    """Yield each Python file, in the encoding that it declares."""
    for file in files:
        size, _ = stamp(file)
        try:
            with tokenize.open(file) as f:
                text = f.read()
        except (LookupError, SyntaxError, ValueError):
            tally.add_bad("not in the encoding that it declares", str(file))
        except OSError as error:
            raise DataError(f"cannot read {file}: {error}; repair or remove it") from error
        else:
            if (text := check_text(text, "text", str(file), tally)) is not None:
                yield text
        tally.n_bytes += size


def only_code(texts: Iterable[str], tally: Tally) -> Iterator[str]:
    """Yield the texts that read like code written by people, each once.

    Left out are copies of one before; tables, in which the digits are a fifth of the characters
    that are not white space; and generated code, whose lines are longer than 100 characters on
    average, or one of them than 1,000.
    """
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        lines = text.splitlines() or [""]
        if digest in seen:
            tally.left_out["duplicate"] += 1
        elif len(text) > 100 * len(lines) or max(map(len, lines)) > 1000:
            tally.left_out["generated, with long lines"] += 1
        elif 5 * len(_DIGIT.findall(text)) > len("".join(text.split())):
            tally.left_out["tables of numbers"] += 1
        else:
            seen.add(digest)
            yield text


def check_text(value: object, column: str, where: str, tally: Tally) -> str | None:
    """Return `value` if it is text or null, which is no text; else count it as bad."""
    if value is None:
        tally.good += 1
        return ""
    if not isinstance(value, str):
        tally.add_bad(f"field '{column}' is {type(value).__name__}, not text", where)
        return None
    try:
        data = value.encode()
    except UnicodeEncodeError:
        tally.add_bad("half of a surrogate pair", where)
        return None
    if not is_text(data):
        tally.add_bad(_NOT_TEXT, where)
        return None
    tally.good += 1
    return value


def _encoding(file: Path, tally: Tally) -> tuple[str, int]:
    with open_bytes(file) as (_, plain):
        encoding, mark = detect(plain.read(HEAD))
    if encoding != "utf-8":
        tally.encodings[encoding.upper()] += 1
    return encoding, mark


def _json_lines(
    plain: BinaryIO, encoding: str, file: Path, column: str, tally: Tally
) -> Iterator[str]:
    for number, line in enumerate(plain, 1):
        if line.isspace():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            tally.add_bad(f"not {encoding.upper()}", where)
            continue
        except (ValueError, RecursionError):
            tally.add_bad("not JSON", where)
            continue
        if not isinstance(row, dict):
            tally.add_bad("not a JSON object", where)
        elif column not in row:
            tally.add_bad(f"no field '{column}'", f"{where} (it has {_names([*row])})")
        elif (text := check_text(row[column], column, where, tally)) is not None:
            yield text


def _parquet_rows(plain: BinaryIO, file: Path, column: str, tally: Tally) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    table = ParquetFile(plain)
    names = table.schema_arrow.names
    if column not in names:
        where = f"{file} (it has {_names(names)})"
        tally.add_bad(f"no field '{column}'", where, max(1, table.metadata.num_rows))
        return
    number = 0
    for batch in table.iter_batches(ROWS, columns=[column]):
        for value in batch.column(0):
            number += 1
            where = f"{file} row {number}"
            try:
                text = check_text(value.as_py(), column, where, tally)
            except UnicodeDecodeError:
                tally.add_bad("not UTF-8", where)
                continue
            if text is not None:
                yield text


def _whole(plain: BinaryIO, encoding: str, file: Path, tally: Tally) -> Iterator[str]:
    text = _decode(plain.read(), encoding, file, 0, tally)
    if text is not None:
        yield text


def _pieces(plain: BinaryIO, encoding: str, file: Path, tally: Tally) -> Iterator[str]:
    size = min(PIECE, max(_LEAST, file.stat().st_size // 100))
    piece, length = [], 0
    for line in _lines(plain, encoding, file, tally):
        for i in range(0, len(line), 4 * size):
            part = line[i : i + 4 * size]
            piece.append(part)
            length += len(part)
            if length >= size and (part.isspace() or length >= 4 * size):
                yield "".join(piece)
                piece, length = [], 0
    if piece:
        yield "".join(piece)


def _lines(plain: BinaryIO, encoding: str, file: Path, tally: Tally) -> Iterator[str]:
    position, rest = 0, b""
    while data := rest + (part := plain.readline(_LINE)):
        whole = not part or part.endswith(b"\n")
        end = len(data) if whole else _last_boundary(data)
        text = _decode(data[:end], encoding, file, position, tally)
        if text is not None:
            yield text
        position, rest = position + end, data[end:]


def _decode(data: bytes, encoding: str, file: Path, position: int, tally: Tally) -> str | None:
    """Return UTF-8 as text with line feeds, or count it as bad: it was read at `position`."""
    reason, start = None, 0
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        reason, start = f"not {encoding.upper()}", error.start
    if reason is None and not is_text(data):
        reason = _NOT_TEXT
    if reason is not None:  # positions are those of the file where nothing was transcoded
        at = f"{file} at byte {position + start}" if encoding == "utf-8" else str(file)
        tally.add_bad(reason, at)
        return None
    tally.good += 1
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _last_boundary(data: bytes) -> int:
    # Where the last character or line end begins that may continue in the next part.
    for i in range(len(data) - 1, max(-1, len(data) - 4), -1):
        if data[i] >= 0xC0 or data[i] == 0x0D:
            return i
        if data[i] < 0x80:
            break
    return len(data)


def _names(names: list) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return shown + (", ..." if len(names) > 8 else "") if names else "none"
