"""Faults of files of lines: what a kill or a loss of power left there costs a whole line."""

from functools import partial

from tests.mutants import Mutant

_lines = partial(Mutant, file="data/json_lines.py")

MUTANTS = [
    _lines(
        what="a line that does not end is read",
        original='*lines, _ = file.read().split(b"\\n")',
        replacement='lines = file.read().split(b"\\n")',
    ),
    _lines(
        what="lines end at carriage returns",
        original='*lines, _ = file.read().split(b"\\n")',
        replacement="lines = file.read().splitlines()",
    ),
    _lines(
        what="bytes that are no UTF-8 end the process",
        original="except ValueError:",
        replacement="except json.JSONDecodeError:",
    ),
    _lines(
        what="another encoding is guessed",
        original="json.loads(line.decode())",
        replacement="json.loads(line)",
    ),
    _lines(
        what="a number taken for an entry",
        original="if not isinstance(entry, dict):",
        replacement="if False:",
    ),
    _lines(
        what="a broken line passed over, and what follows it kept",
        original="except ValueError:\n            break",
        replacement="except ValueError:\n            continue",
    ),
    _lines(
        what="broken bytes are left where lines are appended",
        original="        os.truncate(path, size)",
        replacement="        pass",
    ),
    _lines(
        what="the line's end is cut off too",
        original="start += len(line) + 1",
        replacement="start += len(line)",
    ),
    _lines(
        what="the whole file is read again",
        original="file.seek(start)",
        replacement="pass",
    ),
    _lines(
        what="reading changes the file",
        original="    return _read(path, start)[0]",
        replacement="    return _read(path, start)[0] if start else opened(path)",
    ),
    _lines(
        what="lines are not appended but replace",
        original='path.open("ab")',
        replacement='path.open("wb")',
    ),
    _lines(
        what="lines behind a broken one are lost",
        original='if b"\\n" in rest:',
        replacement="if False:",
    ),
    _lines(
        what="a line that a kill left is kept beside, too",
        original='if b"\\n" in rest:',
        replacement="if rest:",
    ),
    _lines(
        what="what was kept beside before is lost",
        original='.broken").open("ab")',
        replacement='.broken").open("wb")',
    ),
    _lines(
        what="the disk is not waited for",
        original="os.fsync(file.fileno())",
        replacement="pass",
    ),
    _lines(
        what="the disk is waited for before it has the line",
        original="        file.flush()\n",
        replacement="",
    ),
    _lines(
        what="a missing file is an error",
        original="except FileNotFoundError:",
        replacement="except PermissionError:",
    ),
    Mutant(
        what="NaN is written, which is no JSON",
        file="data/json_text.py",
        original="return entry if isfinite(entry) else None",
        replacement="return entry if isfinite(entry) else 0.0",
    ),
]
