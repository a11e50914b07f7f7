"""The check of all settings: types, ranges and combinations.

`RANGES` has an entry for every number that a flag or config.json can hold. A message names the
setting, what it must be, what it was, and the fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from math import inf
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from tritium.training.device import choose_device
from tritium.training.monitor import trackers
from tritium.training.settings import TrainConfig

LARGEST = 3.4e38  # of a float32, in which every fraction ends
SMALLEST = 1e-37


class ConfigError(ValueError):
    """The settings ask for something that cannot be done."""


class Range(NamedTuple):
    """Range of a numeric setting."""

    words: str
    """After "must"."""
    low: float
    high: float
    whole: bool = False
    below: bool = False
    """Whether `high` itself is excluded."""

    def problem(self, value: object) -> str | None:
        """Return what `value` must be, or None if it is."""
        kind = "be a whole number" if self.whole else "be a number"
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return kind
        if value != value or value < self.low or value > self.high:
            too_large = value > self.high < inf and self.words.startswith(("be at least", "be ab"))
            return f"be at most {self.high:,}" if too_large else self.words
        return self.words if self.below and value == self.high else None


def _whole(low: int, high: int = 2**31 - 1) -> Range:
    return Range(f"be at least {low}", low, high, whole=True)


AT_LEAST_0 = Range("be at least 0", 0, LARGEST)
ABOVE_0 = Range("be above 0", SMALLEST, LARGEST)
RATE = Range("be in [0, 1)", 0, 1, below=True)
SHARE = Range("be in [0, 1]", 0, 1)
STEPS = 2**53  # as far as a step is a whole number in the schedule's fractions

RANGES = {
    "seed": Range("be in [0, 2**64)", 0, 2**64 - 1, whole=True),
    "eval_every": _whole(1, STEPS), "eval_tokens": _whole(1, STEPS), "log_every": _whole(1, STEPS),
    "stop_after": _whole(1, STEPS),
    "batch_size": _whole(1), "group_size": _whole(1), "threads": _whole(0, 1024),
    "label_smoothing": RATE, "z_loss": AT_LEAST_0, "dropout": RATE,
    "lora_rank": _whole(1, 2**20), "lora_alpha": ABOVE_0,
    # Length and Schedule
    "max_steps": _whole(1, STEPS), "max_tokens": _whole(1, STEPS), "max_epochs": ABOVE_0,
    "max_minutes": Range("be above 0", SMALLEST, 1e12),
    "learning_rate": ABOVE_0, "warmup_steps": _whole(0, STEPS), "final_lr": SHARE,
    "decay_fraction": Range("be in (0, 1]", SMALLEST, 1),
    # OptimizerConfig
    "muon_learning_rate": ABOVE_0, "ns_steps": _whole(1, 100), "row_beta2": RATE,
    "weight_decay": AT_LEAST_0, "max_grad_norm": ABOVE_0, "beta1": RATE, "beta2": RATE,
    "eps": ABOVE_0, "momentum": AT_LEAST_0, "dampening": SHARE, "alpha": SHARE,
    "lr_decay": AT_LEAST_0, "initial_accumulator_value": AT_LEAST_0,
    # SaveConfig, RecoveryConfig, ObserveConfig, MemoryConfig
    "save_every": _whole(1, STEPS), "keep_last": _whole(1), "keep_every": _whole(1, STEPS),
    "spike_zscore": ABOVE_0, "spike_window": _whole(2, 1_000_000), "max_skips": _whole(1),
    "lower_lr": Range("be between 0 and 1", SMALLEST, 1, below=True),
    "layer_stats_every": _whole(0, STEPS), "sample_every": _whole(0, STEPS),
    "sample_tokens": _whole(0, 1_000_000), "micro_batch_size": _whole(1),
    "memory_gib": Range("be above 0", SMALLEST, 1e9),
    # ModelConfig, and its depth alone
    "depth": _whole(1, 10_000),
    "vocab_size": _whole(1), "n_layers": _whole(1, 10_000), "d_model": _whole(1, 2**20),
    "n_heads": _whole(1, 2**20), "n_kv_heads": _whole(1, 2**20), "d_ff": _whole(1, 2**24),
    "max_seq_len": _whole(1, 2**24), "rope_theta": Range("be at least 1", 1, LARGEST),
    "qk_gain": ABOVE_0, "norm_eps": AT_LEAST_0, "softcap": ABOVE_0, "d_head": _whole(1, 2**16),
    "window": _whole(1, 2**24), "full_every": _whole(1, 10_000), "attention_softcap": ABOVE_0,
    # RopeScaling
    "factor": Range("be at least 1", 1, LARGEST), "original_length": _whole(1, 2**24),
    "slow": ABOVE_0, "fast": ABOVE_0, "attention_factor": ABOVE_0,
}  # fmt: skip


class Setting(NamedTuple):
    """One field of TrainConfig or of a part of it."""

    path: tuple[str, ...]
    """The fields that lead to it: ("length", "max_steps")."""
    flag: str
    """The flag without its dashes: "max-steps"."""
    owner: type
    kinds: tuple[type, ...]
    """bool, int, float, str, tuple or NoneType; more than one where the setting is a union."""
    choices: tuple[str, ...] = ()
    """Allowed words, if not all are."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.flag.rpartition(".")[2].replace("-", "_")

    @property
    def range(self) -> Range | None:
        """Range of its numbers; None if it holds none."""
        return RANGES[self.path[-1]] if {int, float} & {*self.kinds} else None

    def of(self, config: Any) -> Any:
        """Return its value."""
        for name in self.path:
            config = getattr(config, name)
        return config

    def problem(self, value: object) -> str | None:
        """Return what `value` must be, or None if it is."""
        if (value is None and NoneType in self.kinds) or value in self.choices:
            return None
        if tuple in self.kinds:
            named = isinstance(value, (tuple, list)) and all(
                x in self.choices if self.choices else isinstance(x, str) for x in value
            )
            return None if named else f"be among {', '.join(self.choices) or 'texts'}"
        if self.range is not None:
            problem = self.range.problem(value)
            others = f", or {' or '.join(self.choices)}" if self.choices else ""
            return problem and problem + others
        if self.choices:
            return f"be one of {', '.join(self.choices)}"
        kind = bool if bool in self.kinds else str
        words = "be true or false" if kind is bool else "be text"
        return None if isinstance(value, kind) else words

    def wrong(self, problem: str, value: object, default: object) -> ConfigError:
        """Return the error for a wrong value."""
        return ConfigError(
            f"{self.name} must {problem}, got {value}; leave --{self.flag} out for {default}"
        )


@cache
def settings() -> dict[str, Setting]:
    """Return all settings by their flags."""
    return {setting.flag: setting for setting in _settings(TrainConfig, (), "")}


def check(config: TrainConfig, usual: TrainConfig) -> None:
    """Raise ConfigError unless a run can be trained with these settings, on this machine.

    Args:
        config: the settings.
        usual: the defaults, for the messages.
    """
    for setting in settings().values():
        value = setting.of(config)
        if problem := setting.problem(value):
            raise setting.wrong(problem, value, setting.of(usual))
    try:
        config.length.check()
        config.memory.check(config.model)
        config.optimizer.check()
        trackers.require(config.observing.track)
        choose_device(config.device)
        config.compute.check(config.optimizer)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _settings(owner: type, path: tuple[str, ...], prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(owner, include_extras=True)
    for field in fields(owner):
        hint, name = hints[field.name], field.name.replace("_", "-")
        if get_origin(hint) is Annotated:
            given = [x.name for x in hint.__metadata__]  # tyro.conf.arg(name=...)
            hint, name = hint.__origin__, given[0] if given else name
        where = (*path, field.name)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _settings(hint, where, f"{prefix}{name}." if name else prefix)
        else:
            kinds, choices = _kinds(hint)
            yield Setting(where, f"{prefix}{name}", owner, kinds, choices)


def _kinds(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return (str,), inner
    if origin is tuple:
        return (tuple,), _kinds(inner[0])[1]
    if origin in (Union, UnionType):
        parts = [_kinds(each) for each in inner]
        return tuple(k for kinds, _ in parts for k in kinds), tuple(
            c for _, cs in parts for c in cs
        )
    return (hint,), ()
