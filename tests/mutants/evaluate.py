"""Faults of the text that is measured: it is read otherwise than by train.py."""

from functools import partial

from tests.mutants import Mutant

_evaluate = partial(Mutant, file="training/evaluate.py")

MUTANTS = [
    _evaluate(
        what="the file read as it is stored",
        original="text = read_text(file)",
        replacement="text = file.read_bytes().decode()",
    ),
    _evaluate(
        what="line ends kept",
        original="text = read_text(file)",
        replacement='text = read_text(file).replace("\\n", "\\r\\n")',
    ),
    Mutant(
        what="a table measured as text",
        file="data/records.py",
        original="if kind(file) in (JSONL, PARQUET):\n        raise",
        replacement="if False:\n        raise",
    ),
    Mutant(
        what="questions not decompressed",
        file="training/multiple_choice.py",
        original="with open_bytes(file) as (_, plain):",
        replacement='with file.open("rb") as plain:',
    ),
]
