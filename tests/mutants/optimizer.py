"""Faults of kernels/_optimizer.py: tables out of date, state not carried over."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/_optimizer.py")

MUTANTS = [
    _mutant(
        what="moved tensors not noticed",
        original="if places != self._places:",
        replacement="if not self._places:",
    ),
    _mutant(
        what="tables not made again",
        original="self._places, self._tables = places, None",
        replacement="self._places = places",
    ),
    _mutant(
        what="moved moments not checked",
        original="if old[:1] == (names,) and old[3:] == new[3:]:",
        replacement="if old[:1] == (names,):",
    ),
    _mutant(
        what="changed options not uploaded",
        original="if rows != self._hyper_rows or",
        replacement="if not self._hyper_rows or",
    ),
    _mutant(
        what="one step count for all parameters",
        original='state["step"] = step.to(p.device, torch.float32, copy=True)',
        replacement='state["step"] = step',
    ),
    _mutant(
        what="options lost in a copy",
        original="return super().__getstate__() | ours",
        replacement="return super().__getstate__()",
    ),
]
