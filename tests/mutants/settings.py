"""Faults of the settings' check and of the command line: what is wrong is accepted, or misread."""

from functools import partial

from tests.mutants import Mutant

_check = partial(Mutant, file="training/validation.py")
_line = partial(Mutant, file="training/command_line.py")

MUTANTS = [
    _check(
        what="NaN is in every range",
        original="if value != value or value < self.low",
        replacement="if value < self.low",
    ),
    _check(
        what="no lower end",
        original="value < self.low or value > self.high:",
        replacement="value > self.high:",
    ),
    _check(
        what="no upper end",
        original="value < self.low or value > self.high:",
        replacement="value < self.low:",
    ),
    _check(
        what="true is a number",
        original="if isinstance(value, bool) or not isinstance(",
        replacement="if not isinstance(",
    ),
    _check(
        what="a fraction is a whole number",
        original="int if self.whole else int | float)",
        replacement="int | float)",
    ),
    _check(
        what="an end that is excluded is accepted",
        original="return self.words if self.below and value == self.high else None",
        replacement="return None",
    ),
    _check(
        what="an end that is included is refused",
        original="if self.below and value == self.high",
        replacement="if value == self.high",
    ),
    _check(
        what="a step of 0", original='"max_steps": _whole(1,', replacement='"max_steps": _whole(0,'
    ),
    _check(what="dropout of 1", original='"dropout": RATE', replacement='"dropout": SHARE'),
    _check(
        what="a window of one loss",
        original='"spike_window": _whole(2,',
        replacement='"spike_window": _whole(1,',
    ),
    _check(
        what="any word among choices",
        original="return f\"be one of {', '.join(self.choices)}\"",
        replacement="return None",
    ),
    _check(
        what="any words in a list",
        original="x in self.choices if self.choices else isinstance(x, str) for x in value",
        replacement="True for x in value",
    ),
    _check(
        what="a switch takes anything",
        original="return None if isinstance(value, kind) else words",
        replacement="return None",
    ),
    _check(
        what="only the outer settings are checked",
        original="yield from _settings(hint, where,",
        replacement="() if path else (yield from ())  # ",
    ),
    _line(
        what="the first of equal flags counts",
        original="values = given[name] = [value] if equals else []",
        replacement="values = given.setdefault(name, [value] if equals else [])",
    ),
    _line(
        what="a negated switch is on",
        original='values[:] = ["False"]',
        replacement='values[:] = ["True"]',
    ),
    _line(
        what="two values where one belongs",
        original="if tuple not in setting.kinds and len(values) != 1:",
        replacement="if tuple not in setting.kinds and not values:",
    ),
    _line(
        what="ranges only where tyro looks",
        original='    if problem:\n        raise ConfigError(f"{setting.name} must',
        replacement='    if False:\n        raise ConfigError(f"{setting.name} must',
    ),
    _line(
        what="two folders, one ignored",
        original="if out and Path(out) != Path(resumed):",
        replacement="if False:",
    ),
    _line(
        what="a folder without a run is resumed",
        original='if not (Path(resumed) / "config.json").is_file():',
        replacement="if False:",
    ),
    _line(
        what="runs of one second share a folder",
        original="-{secrets.token_hex(3)}",
        replacement="",
    ),
    _line(
        what="a length adds to the preset's",
        original="config = replace(config, length=Length(**only))",
        replacement="config = replace(config, length=replace(config.length, **only))",
    ),
    _line(
        what="a resumed run has the preset's settings",
        original='preset, usual = record["preset"], _recorded(record, run)',
        replacement='preset = record["preset"]',
    ),
]
