"""Faults of bench/ends.py and of what raises its errors: another status, or no sentence."""

from functools import partial

from tests.mutants import Mutant

_ends = partial(Mutant, file="bench/ends.py")
_trials = partial(Mutant, file="bench/runs/_trials.py")

MUTANTS = [
    _ends(
        what="wrong input ends with 1",
        original="raise SystemExit(2 if isinstance(error, WrongInputError) else 1)",
        replacement="raise SystemExit(1)",
    ),
    _ends(
        what="a failure ends with 2",
        original="raise SystemExit(2 if isinstance(error, WrongInputError) else 1)",
        replacement="raise SystemExit(2)",
    ),
    _ends(
        what="every ValueError is taken for wrong input",
        original="except (WrongInputError, FailedError) as error:",
        replacement="except (ValueError, FailedError) as error:",
    ),
    _ends(
        what="a verb is named twice",
        original='.removeprefix(f"{command.split()[-1]}: ")',
        replacement="",
    ),
    _ends(
        what="NaN is a number large enough",
        original="if not value >= least:",
        replacement="if value < least:",
    ),
    _trials(
        what="what train.py refuses is a failure",
        original="if status == WRONG_INPUT:",
        replacement="if False:",
    ),
    _trials(
        what="the name of train.py stays in its sentence",
        original='re.split(r"^train\\.py: ", said, flags=re.MULTILINE)',
        replacement="[said, said]",
    ),
    _trials(
        what="what diverged is taken for well trained",
        original="    if status:\n",
        replacement="    if status == 1:\n",
    ),
    Mutant(
        what="a text that is not there ends characters with a traceback",
        file="bench/runs/characters.py",
        original="with as_wrong_input(DataError):",
        replacement="with as_wrong_input():",
    ),
]
