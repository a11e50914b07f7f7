"""Faults of find_lr: it begins with other weights than were named, or learns too late of --out."""

from functools import partial

from tests.mutants import Mutant

_find = partial(Mutant, file="bench/runs/find_lr.py")

MUTANTS = [
    _find(
        what="the weights of --init-from not read",
        original="say(copy_weights(config.init_from, model))",
        replacement='say(f"Weights of {config.init_from}, with a context of 64 of its 256")',
    ),
    _find(
        what="its shape and tokenizer not taken",
        original="config = shaped(config)",
        replacement="shaped(config)",
    ),
    _find(
        what="its vocabulary cut to the tokenizer's",
        original="    if config.init_from is None:\n        shape",
        replacement="    if True:\n        shape",
    ),
    _find(
        what="a run that is to be resumed begun anew",
        original="if config.resume:",
        replacement="if False:",
    ),
    _find(
        what="the picture's place not tried",
        original="        writable(out)\n",
        replacement="",
    ),
    _find(
        what="the picture's ending not looked at",
        original='if out.suffix.removeprefix(".").lower() not in drawn:',
        replacement="if False:",
    ),
    Mutant(
        what="a folder taken for a file",
        file="bench/ends.py",
        original="if out.is_dir():",
        replacement="if False:",
    ),
]
