"""The command line of train.py: flags to settings, and a run that is resumed by its folder alone.

Flags and their types are those of `TrainConfig`; tyro turns their texts into values. What is wrong
with them is said here, in one line.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
import tyro

from tritium.data.tokenizer import CHARACTERS
from tritium.data.tokenizer import FILE as TOKENIZER
from tritium.training.depth import deep, fit_to_depth
from tritium.training.help import show_help
from tritium.training.run import checkpoint
from tritium.training.run.ranks import launcher
from tritium.training.schedule import Length
from tritium.training.settings import PRESETS, TrainConfig
from tritium.training.validation import ConfigError, Setting, check, settings

RUNS = Path("runs")
SHOWN = 3  # runs in a message

ALIASES = {
    "lr": "learning-rate", "max-lr": "learning-rate", "peak-lr": "learning-rate",
    "min-lr": "final-lr", "lr-schedule": "schedule", "lr-scheduler": "schedule",
    "lr-scheduler-type": "schedule", "scheduler": "schedule", "warmup": "warmup-steps",
    "warmup-iters": "warmup-steps", "steps": "max-steps", "iters": "max-steps",
    "iterations": "max-steps", "max-iters": "max-steps", "num-steps": "max-steps",
    "epochs": "max-epochs", "num-epochs": "max-epochs", "num-train-epochs": "max-epochs",
    "tokens": "max-tokens", "minutes": "max-minutes", "batch": "batch-size", "bs": "batch-size",
    "micro-batch": "micro-batch-size", "device-batch-size": "micro-batch-size",
    "per-device-train-batch-size": "micro-batch-size", "wd": "weight-decay",
    "grad-clip": "max-grad-norm", "clip": "max-grad-norm", "clip-grad-norm": "max-grad-norm",
    "adam-beta1": "beta1", "adam-beta2": "beta2", "epsilon": "eps", "adam-epsilon": "eps",
    "optim": "optimizer", "dtype": "precision",
    "gradient-checkpointing": "activation-checkpointing",
    "eval-interval": "eval-every", "eval-steps": "eval-every", "val-every": "eval-every",
    "log-interval": "log-every", "logging-steps": "log-every", "save-interval": "save-every",
    "save-steps": "save-every", "save-total-limit": "keep-last", "report-to": "track",
    "out-dir": "out", "output": "out", "output-dir": "out", "run-dir": "out",
    "dataset": "data", "data-path": "data", "input": "data", "text-column": "text-field",
    "prompt": "sample-prompt", "num-threads": "threads", "random-seed": "seed",
    "context": "model.max-seq-len", "context-length": "model.max-seq-len",
    "block-size": "model.max-seq-len", "seq-len": "model.max-seq-len",
    "sequence-length": "model.max-seq-len", "ctx": "model.max-seq-len",
    "layers": "model.n-layers", "n-layer": "model.n-layers", "num-layers": "model.n-layers",
    "heads": "model.n-heads", "n-head": "model.n-heads",
    "num-heads": "model.n-heads", "kv-heads": "model.n-kv-heads", "width": "model.d-model",
    "n-embd": "model.d-model", "dim": "model.d-model", "hidden-size": "model.d-model",
    "ffn-dim": "model.d-ff",
}  # fmt: skip
"""Other names of flags. Fields of the model are accepted without "model." too."""

ANSWERS = {
    "preset": "the preset comes first, without a flag: python train.py tiny",
    "gradient-accumulation-steps": "--batch-size is the whole step, say --micro-batch-size for "
    "what is computed at once",
    "grad-accum": "--batch-size is the whole step, say --micro-batch-size for what is computed at "
    "once",
    "fp16": "say --precision bfloat16", "bf16": "say --precision bfloat16",
    "fp32": "say --precision float32", "cpu": "say --device cpu", "gpu": "say --device cuda",
    "cuda": "say --device cuda", "adamw": "say --optimizer adamw", "sgd": "say --optimizer sgd",
    "muon": "say --optimizer muon", "muon-lr": "say --muon-learning-rate",
    "wandb": "say --track wandb", "tensorboard": "say --track tensorboard",
    "checkpoint": "say --resume RUN, with the folder of the run", "resume-from": "say --resume RUN",
    "betas": "say --beta1 and --beta2", "no-eval": "say --eval-every with a large number",
}  # fmt: skip


def parse(arguments: list[str]) -> tuple[TrainConfig, str, Path]:
    """Return the settings that a command line asks for, their preset, and the run folder.

    Raises:
        ConfigError: it asks for something that cannot be done.
        SystemExit: it asked for help.
    """
    named = None
    if arguments and not arguments[0].startswith("-"):
        named, *arguments = arguments
        if named not in PRESETS:
            raise ConfigError(f"there is no preset {named!r}; choose one of {', '.join(PRESETS)}")
    preset = named or ("gpu" if torch.cuda.is_available() else "small")
    for flag in {"-h", "--help", "--help-all"} & {*arguments}:
        show_help(preset, everything=flag == "--help-all")
        raise SystemExit(0)
    given = _given(arguments)
    if given.get("init-from", ["None"]) != ["None"]:
        shaping = {x for x in settings() if x.startswith("model.")} - {"model.max-seq-len"}
        shaping |= {"tokenizer", "shape", "depth"}
        if wrong := [x for x in given if x in shaping]:
            raise ConfigError(
                f"--{wrong[0]} is that of the model which --init-from names; drop one of them"
            )
    usual, run = PRESETS[preset], _folder(given)
    if "resume" in given and given["resume"] != ["False"]:
        if run is None:
            raise ConfigError(f"--resume needs the folder of a run: {_candidates()}")
        record = _record(run)
        if record and named in (None, record["preset"]):
            preset, usual = record["preset"], _recorded(record, run)
    if (shape := given.get("shape", ["None"])[0]) != "None":
        usual = usual.reshaped(shape)
    depth = given.get("depth", ["None"])[0]
    begun, usual = usual, _deepened(usual, depth, given)
    config = _converted(given, usual)
    lengths = {x.name for x in fields(Length)} & {name.replace("-", "_") for name in given}
    if lengths:
        only = {name: getattr(config.length, name) for name in lengths}
        config = replace(config, length=Length(**only))
    if depth != "None":
        config = fit_to_depth(config, begun, given)
    check(config, usual)
    if run is None:  # of its own even where others begin in the same second
        unique = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run = RUNS / f"{preset}-{unique}"
    return config, preset, run


def _deepened(usual: TrainConfig, depth: str, given: dict[str, list[str]]) -> TrainConfig:
    """Return settings with the shape of a depth, the same ones for "None"."""
    if depth == "None":
        return usual
    if given.get("shape", ["None"]) != ["None"]:
        raise ConfigError("--depth and --shape each name a shape; drop one of them")
    if given.get("resume", ["False"]) != ["False"]:
        raise ConfigError("--depth is of a new run, and --resume has that of its run; drop --depth")
    return replace(usual, model=deep(usual.model, int(depth)))


def resume_command(run: Path) -> str:
    """Return the line that resumes a run."""
    program = sys.argv[0] if sys.argv[0].endswith(".py") else "train.py"
    return f"{launcher()} {shlex.quote(program)} --resume {shlex.quote(str(run))}"


def next_command(run: Path | None) -> str:
    """Return how an ended run is continued: by its folder, if that holds its settings already."""
    if run is not None and (run / "config.json").is_file():
        return resume_command(run)
    return "the same command again (it had made no step)"


def _given(arguments: list[str]) -> dict[str, list[str]]:
    """Return the values of each flag by its full name; the last one counts."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--") and argument != "--":
            typed, equals, value = argument.removeprefix("--").partition("=")
            name, negated = _full_name(typed)
            values = given[name] = [value] if equals else []
            if negated:
                values[:] = ["False"]
        elif values is None:
            raise ConfigError(
                f"{argument!r} belongs to no flag; the preset comes first, see train.py --help"
            )
        else:
            values.append(argument)
    return {name: _checked(settings()[name], values) for name, values in given.items()}


def _full_name(typed: str) -> tuple[str, bool]:
    """Return the flag that was meant, and whether it was negated by "no-"."""
    known, name = settings(), typed.replace("_", "-")
    for candidate in (name, ALIASES.get(name), f"model.{name}"):
        if candidate in known:
            return candidate, False
    positive = name.removeprefix("no-").replace("model.no-", "model.")
    if positive != name:
        for candidate in (positive, f"model.{positive}"):
            if candidate in known and bool in known[candidate].kinds:
                return candidate, True
    if name in ANSWERS:
        raise ConfigError(f"there is no --{typed}: {ANSWERS[name]}")
    near = get_close_matches(name, [*known, *ALIASES], 1)
    hint = f"did you mean --{ALIASES.get(near[0], near[0])}? " if near else ""
    raise ConfigError(f"there is no --{typed}; {hint}train.py --help-all lists all flags")


def _checked(setting: Setting, values: list[str]) -> list[str]:
    """Return the values of a flag, or raise ConfigError unless they are legal."""
    flag = f"--{setting.flag}"
    if setting.flag == "resume" and values not in ([], ["False"], ["false"], ["True"], ["true"]):
        if len(values) > 1:
            raise ConfigError(f"{flag} takes one folder, got {' '.join(values)}")
        return values
    if bool in setting.kinds:
        words = {(): ["True"], ("true",): ["True"], ("false",): ["False"]}
        words |= {("none",): ["None"]} if NoneType in setting.kinds else {}
        legal = words.get(tuple(value.lower() for value in values))
        if legal is None:
            negative = f"--no-{setting.flag}"
            raise ConfigError(f"{flag} takes no value, got {values[-1]}; say {flag} or {negative}")
        return legal
    if tuple not in setting.kinds and len(values) != 1:
        got = f"got {' '.join(values)}; quote it if it is one" if values else "got none"
        raise ConfigError(f"{flag} takes one value, {got}")
    read = [_read(setting, value) for value in values]
    problem = setting.problem(read if tuple in setting.kinds else read[0])
    if problem:
        raise ConfigError(f"{setting.name} must {problem}, got {' '.join(values)}; change {flag}")
    return values


def _read(setting: Setting, text: str) -> object:
    """Return the value of a text as far as `Setting.problem` needs it."""
    if text == "None" and NoneType in setting.kinds:
        return None
    if text in setting.choices:
        return text
    if bool in setting.kinds:
        return {"True": True, "False": False}.get(text, text)
    if setting.range is not None:
        try:
            return int(text) if setting.range.whole else float(text)
        except ValueError:
            return text
    return text


def _folder(given: dict[str, list[str]]) -> Path | None:
    """Return the run folder that --out or --resume name; leave --resume as a plain switch."""
    out = given.get("out", [""])[0]
    resumed = given.get("resume", ["True"])[0]
    if resumed not in ("True", "False"):
        if out and Path(out) != Path(resumed):
            raise ConfigError(f"--resume {resumed} and --out {out} name two folders; drop --out")
        if not (Path(resumed) / "config.json").is_file():
            raise ConfigError(f"--resume {resumed}: there is no run; {_candidates()}")
        given["resume"], out = ["True"], resumed
        given["out"] = [out]
    return Path(out) if out not in ("", "None") else None


def _candidates() -> str:
    """Name the newest runs that can be resumed."""
    found = [path for path in RUNS.glob("*") if checkpoint.checkpoints(path / "checkpoints")]
    if not found:
        return f"there is none with a checkpoint in {RUNS}/"
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    steps = [checkpoint.step_of(checkpoint.checkpoints(x / "checkpoints")[-1]) for x in found]
    named = [f"--resume {x} (step {n:,})" for x, n in zip(found, steps, strict=True)]
    return f"the newest: {', or '.join(named[:SHOWN])}"


def _record(run: Path) -> dict | None:
    """Return what config.json of a run holds, or None without one."""
    try:
        record = json.loads((run / "config.json").read_text())
        if isinstance(record["config"], dict) and record["preset"] in PRESETS:
            return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(run, f"{type(error).__name__}: {error}") from error
    raise _unusable(run, f"of the preset {record['preset']}")


def _recorded(record: dict, run: Path) -> TrainConfig:
    """Return the settings that a run began with."""
    try:
        config = _built(TrainConfig, record["config"])
        asked = record.get("vocab_size", config.model.vocab_size)
        model = replace(config.model, vocab_size=asked)
    except (TypeError, ValueError, AttributeError) as error:
        raise _unusable(run, str(error)) from error
    data, tokenizer = config.data, config.tokenizer
    if data and not Path(data).exists():  # perhaps named from where the run began
        there = Path(str(record.get("folder", ".")), data)
        data = str(there) if there.exists() else data
    if tokenizer not in (None, CHARACTERS) and (own := run / TOKENIZER).is_file():
        tokenizer = str(own)  # the one it was trained with, wherever that came from
    return replace(
        config, model=model, out=str(run), resume=False, resume_anyway=False, data=data,
        tokenizer=tokenizer,
    )  # fmt: skip


def _built(kind: type, entries: dict) -> Any:
    hints, values = get_type_hints(kind), {}
    for name, value in entries.items():
        if is_dataclass(hints.get(name)):
            value = _built(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _unusable(run: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{run / 'config.json'} does not hold the settings of a run of this version ({why}); give "
        "them as flags, with the preset first"
    )


def _converted(given: dict[str, list[str]], usual: TrainConfig) -> TrainConfig:
    arguments = []
    for name, values in given.items():
        if settings()[name].kinds == (bool,):
            group, dot, last = name.rpartition(".")
            arguments.append(f"--{group}{dot}{'' if values == ['True'] else 'no-'}{last}")
        elif tuple in settings()[name].kinds:
            arguments += [f"--{name}", *values]
        else:
            arguments.append(f"--{name}={values[0]}")
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return tyro.cli(TrainConfig, args=arguments, default=usual)
    except SystemExit:
        raise ConfigError(_sentence(said.getvalue())) from None
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _sentence(box: str) -> str:
    """Return what tyro says between the first two rules of its box."""
    text: list[str] = []
    for line in box.splitlines()[1:]:
        if line.strip(" │╭╮╰╯─-"):
            text.append(line.strip(" │"))
        elif text:
            break
    sentence = " ".join(text)
    return sentence.partition(": ")[2] if sentence.startswith("Error parsing") else sentence
