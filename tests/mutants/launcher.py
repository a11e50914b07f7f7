"""Faults of `Launcher` in runtime.py: what was compiled is kept for other arguments."""

from functools import partial

from tests.mutants import Mutant

_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _runtime(
        what="alignment not seen",
        original="x.data_ptr() % 16 if isinstance(x, Tensor) else",
        replacement="None if isinstance(x, Tensor) else",
    ),
    _runtime(
        what="alignment to 8 bytes taken for that to 16",
        original="x.data_ptr() % 16",
        replacement="x.data_ptr() % 8",
    ),
    _runtime(
        what="values of integers not seen",
        original="else (type(x), x) for x in args",
        replacement="else type(x) for x in args",
    ),
    _runtime(
        what="a whole number taken for a fraction",
        original="else (type(x), x) for x in args",
        replacement="else x for x in args",
    ),
    _runtime(
        what="constants not seen",
        original="self._key != (decisive, constants, _device()):",
        replacement="self._key[::2] != (decisive, _device()):",
    ),
    _runtime(
        what="another device not seen",
        original="self._key != (decisive, constants, _device()):",
        replacement="self._key[:2] != (decisive, constants):",
    ),
    _runtime(
        what="the first grid kept",
        original="self._compiled[(programs, 1, 1)]",
        replacement="self._compiled[(1, 1, 1)]",
    ),
    _runtime(
        what="constants not handed on",
        original="self._compiled[(programs, 1, 1)](*args, *constants)",
        replacement="self._compiled[(programs, 1, 1)](*args)",
    ),
]
