"""Faults of runs that begin with a model: the source is needed again, or its shape is not taken."""

from tests.mutants import Mutant

MUTANTS = [
    Mutant(
        what="a resumed run reads the tokenizer of its source",
        file="training/command_line.py",
        original="tokenizer = str(own)",
        replacement="pass",
    ),
    Mutant(
        what="--resume where nothing had begun takes the preset's shape",
        file="training/initial.py",
        original='begun = config.resume and Path(config.out or "", "config.json").is_file()',
        replacement="begun = config.resume",
    ),
]
