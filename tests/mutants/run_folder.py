"""Faults of a run's .jsonl files: entries that are lost, repeated, or of another step."""

from functools import partial

from tests.mutants import Mutant

_folder = partial(Mutant, file="training/run/run_folder.py")

MUTANTS = [
    _folder(
        what="a number that is not finite comes back as None",
        original="[with_nan(entry) for entry in json_lines.read(path)]",
        replacement="json_lines.read(path)",
    ),
    _folder(
        what="entries of later steps stay",
        original='self.entries = [entry for entry in read_lines(path) if entry["step"] <= step]',
        replacement="self.entries = read_lines(path)",
    ),
    _folder(
        what="lines are written behind broken bytes",
        original="        atomic.write(path, kept)\n",
        replacement="        path.touch()\n",
    ),
    _folder(
        what="half a line stays on a full disk",
        original="file.truncate(self._size)",
        replacement="pass",
    ),
    _folder(
        what="lines that could not be written are lost",
        original='self._size, self._waiting = self._size + written, b""',
        replacement="self._size += written",
    ),
    _folder(
        what="what was abandoned before is lost",
        original="before + discarded",
        replacement="discarded",
    ),
    _folder(
        what="what the checkpoint knows nothing of stays abandoned",
        original='if entry["abandoned"] <= n_rollbacks',
        replacement="if True",
    ),
]
