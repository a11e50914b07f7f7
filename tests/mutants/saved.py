"""Faults in reading a run that trains: what is gone ends it, or an older one is chosen."""

from functools import partial

from tests.mutants import Mutant

_saved = partial(Mutant, file="model/saved.py")

MUTANTS = [
    _saved(
        what="a checkpoint that is gone ends the reading",
        original="            if checkpoint.exists():\n                raise\n",
        replacement="            raise\n",
    ),
    _saved(
        what="errors of files alone are looked at",
        original="except Exception:  # which",
        replacement="except OSError:  # which",
    ),
    _saved(
        what="a record that is gone ends the choice",
        original="            if last.exists():\n                raise\n",
        replacement="            raise\n",
    ),
    _saved(
        what="the newest of before is chosen",
        original="return best(folder)  # its",
        replacement="return last  # its",
    ),
]
