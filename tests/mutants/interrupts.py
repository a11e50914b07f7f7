"""Faults of Ctrl-C: a traceback, another status, or the name of a run that cannot be resumed."""

from functools import partial

from tests.mutants import Mutant

_command = partial(Mutant, file="tritium/__init__.py")

MUTANTS = [
    _command(
        what="a traceback of the imports",
        original="signal.signal(signal.SIGINT, signal.SIG_DFL)",
        replacement="pass",
    ),
    _command(
        what="modules of Tritium are no commands",
        original='return module.startswith("tritium.")',
        replacement="return False",
    ),
    _command(
        what="every program that is a module is a command of Tritium",
        original='return module.startswith("tritium.")',
        replacement="return True",
    ),
    _command(
        what="every train.py is Tritium's",
        original='Path(script).resolve() == _CHECKOUT / "train.py"',
        replacement='Path(script).name == "train.py"',
    ),
    _command(
        what="train.py is no command",
        original='Path(script).resolve() == _CHECKOUT / "train.py"',
        replacement="False",
    ),
    _command(
        what="every program that imports Tritium is a command",
        original="if _is_command() and signal",
        replacement="if signal",
    ),
    _command(
        what="Ctrl-C kills a command without cleaning up",
        original="signal.signal(signal.SIGINT, signal.default_int_handler)",
        replacement="pass",
    ),
    _command(
        what="Ctrl-C is heard in the background",
        original="    if before is signal.SIG_DFL:\n        signal.signal(",
        replacement="    if True:\n        signal.signal(",
    ),
    _command(
        what="Ctrl-C raises behind a command's end",
        original="            signal.signal(signal.SIGINT, before)",
        replacement="            pass",
    ),
    _command(
        what="another status",
        original="raise SystemExit(130)",
        replacement="raise SystemExit(1)",
    ),
    _command(
        what="nothing is said of how to resume",
        original="            print(said, file=sys.stderr)",
        replacement="            pass",
    ),
    Mutant(
        what="train.py ends with another status",
        file="train.py",
        original="sys.exit(130)",
        replacement="sys.exit(1)",
    ),
    Mutant(
        what="train.py imports torch first",
        file="train.py",
        original="import tritium  # before",
        replacement="import torch\nimport tritium  # before",
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
        original="with tritium.interruptible():",
        replacement="if True:",
    ),
    Mutant(
        what="a command that cannot be interrupted",
        file="training/generate.py",
        original="tritium.interruptible(), ",
        replacement="",
    ),
]
