"""Faults of Ctrl-C: a traceback, another status, or the name of a run that cannot be resumed."""

from functools import partial

from tests.mutants import Mutant

_train = partial(Mutant, file="train.py")

MUTANTS = [
    _train(
        what="a traceback of the imports",
        original="signal.signal(signal.SIGINT, signal.SIG_DFL)",
        replacement="pass",
    ),
    _train(
        what="another status",
        original="sys.exit(130)",
        replacement="sys.exit(1)",
    ),
    Mutant(
        what="a run is named that has not begun",
        file="training/command_line.py",
        original='if run is not None and (run / "config.json").is_file():',
        replacement="if run is not None:",
    ),
    Mutant(
        what="a run that has begun is not named",
        file="training/command_line.py",
        original='if run is not None and (run / "config.json").is_file():',
        replacement="if False:",
    ),
    Mutant(
        what="a verb of the bench ends with a traceback",
        file="bench/ends.py",
        original="except KeyboardInterrupt:",
        replacement="except MemoryError:",
    ),
]
