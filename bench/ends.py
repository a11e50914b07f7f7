"""Ends of a command of the bench: 2 for wrong input, as in train.py; 1 for what failed or differs.

A verb raises one of the two errors below with a sentence. `ended` alone prints it, behind the
verb's name, and chooses the exit status. A verb whose tables say that something is wrong exits with
status 1 itself.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tritium


class WrongInputError(ValueError):
    """The command asks for something that cannot be done. Exit status 2."""


class FailedError(RuntimeError):
    """A run, or a tool that it needs, failed. Exit status 1."""


@contextmanager
def ended(command: str) -> Iterator[None]:
    """Run a verb inside the block; end the process with a sentence where it cannot be done.

    Args:
        command: `bench` and the verb, which begin the sentence.

    Raises:
        SystemExit: with status 2 after a `WrongInputError`, 1 after a `FailedError`, 130 after
            Ctrl-C.
    """
    try:
        with tritium.interruptible():
            yield
    except (WrongInputError, FailedError) as error:
        said = str(error).removeprefix(f"{command.split()[-1]}: ")  # as a library's function says
        print(f"{command}: {said}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, WrongInputError) else 1) from None


@contextmanager
def as_wrong_input(*kinds: type[Exception]) -> Iterator[None]:
    """Take errors of these kinds, inside the block, for wrong input."""
    try:
        yield
    except kinds as error:
        raise WrongInputError(str(error)) from None


def at_least(least: float, **given: float) -> None:
    """Refuse numbers that are too small.

    Args:
        least: the smallest that is right.
        given: numbers by their flags' names.

    Raises:
        WrongInputError: "--seeds must be at least 1, got 0".
    """
    for name, value in given.items():
        if not value >= least:  # nor NaN
            flag = name.replace("_", "-")
            raise WrongInputError(f"--{flag} must be at least {least:g}, got {value:g}")


def writable(out: Path) -> None:
    """Make the folder of the file that `--out` names, and try it, before there is what to write.

    Raises:
        WrongInputError: "--out cannot be written".
    """
    try:
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise WrongInputError(
            f"--out {out} cannot be written ({error.strerror}); name a file elsewhere"
        ) from None


def split_flags(flags: str) -> list[str]:
    """Return the words of `--flags`.

    Raises:
        WrongInputError: a quotation mark is open.
    """
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise WrongInputError(f"--flags cannot be read: {error}, got {flags!r}") from None
