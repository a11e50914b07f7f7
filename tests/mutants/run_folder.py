"""Faults of a run's .jsonl files: what a loss of power leaves behind the last line ends the run."""

from functools import partial

from tests.mutants import Mutant

_folder = partial(Mutant, file="training/run/run_folder.py")

MUTANTS = [
    _folder(
        what="the file decoded before its lines",
        original='path.read_bytes().split(b"\\n")',
        replacement='path.read_text().encode().split(b"\\n")',
    ),
    _folder(
        what="a number taken for an entry",
        original="if not isinstance(entry, dict):",
        replacement="if False:",
    ),
    _folder(
        what="a broken line passed over, and what follows it kept",
        original="ended there\n            break",
        replacement="ended there\n            continue",
    ),
]
