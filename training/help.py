"""The help of train.py: its flags in groups, the usual ones or all of them."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from functools import cache
from textwrap import dedent, wrap

from tritium.training.settings import ABOUT_PRESETS, PRESETS
from tritium.training.validation import Setting, settings

COLUMN = 34  # where the descriptions begin
WIDTH = 100

GROUPS = {
    "length": ("length",),
    "learning rate": ("schedule",),
    "optimizer and loss": ("batch_size", "optimizer", "dropout", "label_smoothing", "z_loss"),
    "precision and speed": ("device", "threads", "parallel", "group_size", "compute"),
    "memory": ("memory",),
    "data": ("data", "text_field", "tokenizer", "packing", "seed"),
    "checkpoints": ("out", "resume", "resume_anyway", "saving"),
    "monitoring": ("eval_every", "eval_tokens", "stop_after", "log_every", "observing"),
    "recovery from bad steps": ("recovery",),
    "fine-tuning": ("init_from", "lora_rank", "lora_alpha", "lora_layers"),
    "model": ("depth", "shape", "model"),
}
"""Fields of TrainConfig in each group of the help, by its title."""

USUAL = {
    "max-steps", "max-epochs", "max-tokens", "max-minutes",
    "schedule", "learning-rate", "warmup-steps", "final-lr",
    "batch-size", "optimizer", "muon-learning-rate",
    "weight-decay", "max-grad-norm", "beta1", "beta2", "dropout",
    "device", "threads", "parallel", "precision", "cuda-graph",
    "micro-batch-size", "activation-checkpointing", "plan",
    "data", "text-field", "tokenizer", "packing", "seed",
    "out", "resume", "resume-anyway", "save-every", "keep-last", "keep-best",
    "eval-every", "stop-after", "log-every", "sample-every", "sample-prompt", "track",
    "recovery", "init-from", "lora-rank", "lora-alpha", "lora-layers", "depth", "shape",
    "model.vocab-size", "model.n-layers", "model.d-model", "model.n-heads", "model.n-kv-heads",
    "model.max-seq-len",
}  # fmt: skip
"""The flags that --help shows, each in a line."""

USAGE = """\
usage: python train.py [PRESET] [--flag value ...]     train; without arguments too
       python train.py --resume RUN [--flag value ...] resume the run in that folder

presets (the values below are those of {preset}):
"""


def show_help(preset: str, *, everything: bool) -> None:
    """Print the flags and their values in a preset: all of them, or the usual ones."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    print(USAGE.format(preset=preset), end="")
    for name, about in ABOUT_PRESETS.items():
        print(f"  {name:{max(map(len, PRESETS)) + 2}}{about}")
    for title, members in GROUPS.items():
        print(f"\n{title}")
        for setting in settings().values():
            if setting.path[0] in members and (everything or setting.flag in USUAL):
                print("\n".join(_lines(setting, preset, width, everything)))
    if not everything:
        print("\n--help-all: every flag, described in full. --no-FLAG turns off what is on.")


def _lines(setting: Setting, preset: str, width: int, everything: bool) -> list[str]:
    value = setting.of(PRESETS[preset])
    text = description(setting)
    if not everything:
        text = re.split(r"\. |; (?![^(]*\))", text)[0].rstrip(".")
    default = "" if value is None or value == () or value is False else f" [{_shown(value)}]"
    head = f"  --{setting.flag}{_placeholder(setting)}"
    room = max(20, width - COLUMN)
    if not everything and len(text) + len(default) > room:
        text = f"{text[: room - len(default) - 4].rpartition(' ')[0]} ..."
    body = wrap(text + default, room, break_long_words=False, break_on_hyphens=False)
    if len(head) < COLUMN:
        return [f"{head:{COLUMN}}{body[0]}", *(" " * COLUMN + line for line in body[1:])]
    return [head, *(" " * COLUMN + line for line in body)]


def _shown(value: object) -> str:
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else repr(value) if value == "" else f"{value}"


def _placeholder(setting: Setting) -> str:
    if bool in setting.kinds:
        return " RUN" if setting.flag == "resume" else ""
    if setting.choices and not setting.range:
        return f" {'|'.join(setting.choices)}" if len("|".join(setting.choices)) < 18 else " NAME"
    if setting.range:
        return " N" if setting.range.whole else " X"
    return " TEXT"


def description(setting: Setting) -> str:
    """Return what the source says below a field."""
    text = _descriptions(setting.owner)[setting.path[-1]]
    if not setting.choices or setting.range:
        return text
    named = all(choice in text for choice in setting.choices)
    return text if named else f"{text.rstrip('.')}: {', '.join(setting.choices)}."


@cache
def _descriptions(owner: type) -> dict[str, str]:
    (tree,) = ast.parse(dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr)
            assert isinstance(below.value, ast.Constant)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found
