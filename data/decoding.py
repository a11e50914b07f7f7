"""Bytes to text: detection of the encoding, and of files that are not text.

A byte order mark decides. Without one a file is UTF-8, or UTF-32, or UTF-16 of an alphabet: every
second byte is NUL then, or the number of the alphabet. Everything else with many control characters
is not text, whatever its name.
"""

import codecs
from io import BufferedReader, RawIOBase
from typing import BinaryIO, cast
from unicodedata import category

MOST_CONTROL = 0.05
"""Share of control and replacement characters from which on something is not text."""

HEAD = 1 << 16  # bytes that decide the encoding
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_CONTROL = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})  # \b and escapes: terminals' logs
_HIGH = bytes(range(32))
_REPLACED = "\ufffd".encode()
_STRANGE = {"Cc", "Cn", "Co", "Cs"}  # controls, and what Unicode gives no meaning
_ALWAYS_BINARY = {b"%PDF-": "a PDF", b"{\\rtf": "an RTF document"}  # may hold plain bytes alone
_BINARY = {
    b"\x7fELF": "a program (ELF)",
    b"MZ": "a program (EXE)",
    b"PK\x03\x04": "a zip file, as .docx, .xlsx and .epub are",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"RIFF": "a picture or recording (RIFF)",
    b"\x1f\x8b": "compressed (gzip); name it .gz",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); name it .zst",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"7z\xbc\xaf": "compressed (7z)",
    b"PAR1": "a parquet table; name it .parquet",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "a database (SQLite)",
    b"\xd0\xcf\x11\xe0": "a document of old Office",
    b"\x93NUMPY": "an array (NumPy)",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


class NotTextError(ValueError):
    """Bytes that are no text in any encoding known here; the message says what they are."""


def detect(head: bytes) -> tuple[str, int]:
    """Return the encoding of a file that begins with `head`, and the length of its mark.

    Bytes that are not UTF-8 and nothing else either are left to the reader of "utf-8", which finds
    each place.

    Raises:
        NotTextError: it is not text.
    """
    for magic, name in _ALWAYS_BINARY.items():
        if head.startswith(magic):
            raise NotTextError(f"not text but {name}")
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            if encoding != "utf-8" and not _is_text_in(encoding, head[len(mark) :], spare=1):
                raise NotTextError(_what(head))
            return encoding, len(mark)
    if is_text(head) and (b"\0" not in head or _is_utf8(head)):
        return "utf-8", 0
    candidates = [e for e in ("utf-32-le", "utf-32-be") if len(head) > 3 and _is_text_in(e, head)]
    if not candidates and not _has_magic(head):
        candidates = [e for e in ("utf-16-le", "utf-16-be") if _is_without_mark(e, head)]
    if candidates:
        return min(candidates, key=lambda encoding: _blocks(encoding, head)), 0
    if is_text(head):
        return "utf-8", 0
    raise NotTextError(_what(head))


def is_text(data: bytes) -> bool:
    """Whether `data` is UTF-8 with at most one, or MOST_CONTROL, characters that no text has."""
    strange = len(data) - len(data.translate(None, _CONTROL)) + data.count(_REPLACED)
    return strange <= max(1, MOST_CONTROL * len(data))


def as_utf8(plain: BinaryIO, encoding: str, mark: int) -> BinaryIO:
    """Return the stream `plain` without its mark of that many bytes, and in UTF-8.

    What is malformed in another encoding becomes bytes that are not UTF-8 either.
    """
    plain.read(mark)
    if encoding == "utf-8":
        return plain
    return cast(BinaryIO, BufferedReader(_Transcoded(plain, encoding)))


class _Transcoded(RawIOBase):
    def __init__(self, plain: BinaryIO, encoding: str):
        self._plain, self._rest, self._ended = plain, b"", False
        self._decoder = codecs.getincrementaldecoder(encoding)("data.malformed")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest and not self._ended:
            part = self._plain.read(HEAD)
            self._ended = not part
            self._rest = self._decoder.decode(part, self._ended).encode("utf-8", "surrogatepass")
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def _malformed(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff", error.end


codecs.register_error("data.malformed", _malformed)


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _decoded(encoding: str, head: bytes) -> str:
    return codecs.getincrementaldecoder(encoding)().decode(head)  # a cut last character is kept


def _is_text_in(encoding: str, head: bytes, spare: int = 0) -> bool:
    try:
        text = _decoded(encoding, head)
    except UnicodeDecodeError:
        return False
    strange = sum(category(c) in _STRANGE and c not in "\b\t\n\v\f\r\x1b" for c in text)
    return strange <= max(spare, MOST_CONTROL * len(text))


def _is_without_mark(encoding: str, head: bytes) -> bool:
    # The high byte of every alphabet is below 0x20, as few bytes of any other text are. Chinese
    # without a mark is not guessed, nor a text whose encoding changes.
    high = head[encoding.endswith("le") :: 2]
    parts = [high[i : i + 64] for i in range(0, len(high), 64)]
    low = [len(part) - len(part.translate(None, _HIGH)) for part in parts]
    alphabetic = all(2 * n >= len(part) for n, part in zip(low, parts, strict=True))
    return 4 * sum(low) >= 3 * len(high) > 0 and alphabetic and _is_text_in(encoding, head)


def _blocks(encoding: str, head: bytes) -> int:
    # A text keeps to few blocks of 256 characters; read in the wrong order it is all over.
    return len({ord(c) >> 8 for c in _decoded(encoding, head)})


def _has_magic(head: bytes) -> bool:
    return any(head.startswith(magic) for magic in _BINARY) or head[257:262] == b"ustar"


def _what(head: bytes) -> str:
    for magic, name in _BINARY.items():
        if head.startswith(magic):
            return f"not text but {name}"
    if head[257:262] == b"ustar":
        return "not text but an archive (tar)"
    return "not text but binary"
