"""Standard output and error that never raise, whatever the text, even after the reader is gone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

FAILURES = (OSError, ValueError, RuntimeError)
"""Errors of a gone reader or a full disk; of a closed stream; of a signal amid another write."""


class TolerantStream:
    """A text stream that writes what it can, and drops the rest instead of raising.

    What its encoding does not know is escaped, `лиса` to `\\u043b\\u0438\\u0441\\u0430` in Latin-1.
    Where the reader has gone, everything is dropped from then on.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                escaped = text.encode(encoding, "backslashreplace").decode(encoding)
                self._stream.write(escaped)
        except FAILURES as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if there still is a reader."""
        try:
            self._stream.flush()
        except FAILURES as error:
            self._failed(error)

    def close(self) -> None:
        """Flush; whoever opened the stream closes it."""
        self.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(*FAILURES):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def give_up(self) -> None:
        """Drop everything from now on, including what is buffered."""
        with suppress(*FAILURES, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # or the interpreter's end would try once more
            os.close(nowhere)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ESHUTDOWN, errno.EIO):
            self.give_up()


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr tolerant inside the block.

    Standard streams that the process was started without (`>&-`) lead nowhere, so that no file
    which it opens later takes their place and what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    before = sys.stdout, sys.stderr
    # None where the process has no such stream; print and rich know that.
    sys.stdout, sys.stderr = (stream and TolerantStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TolerantStream):
                stream.flush()
        for stream in before:
            _finish(stream)
        sys.stdout, sys.stderr = before


def _finish(stream: TextIO | None) -> None:
    """Flush, or drop what is buffered: otherwise the interpreter exits with status 120."""
    if stream is not None:
        try:
            stream.flush()
        except FAILURES:
            TolerantStream(stream).give_up()


def printable(text: object) -> str:
    """Return a text without what a terminal takes for commands, or no font and no file can hold.

    Control characters, line breaks among them, and lone surrogates are escaped.
    """
    return "".join(
        x if x.isprintable() or x in "\u200c\u200d" else x.encode("unicode_escape").decode()
        for x in str(text)
    )
