"""Faults of what torch.compile sees of the operators, in runtime.py and in the model."""

from functools import partial

from tests.mutants import Mutant

_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _runtime(
        what="no operator registered with Inductor",
        original="        _register_lowering(overload)\n",
        replacement="",
    ),
    _runtime(
        what="references where torch.compile traces",
        original="or torch.compiler._is_exporting_flag:",
        replacement="or is_compiling():",
    ),
    _runtime(
        what="only backward operators registered with Inductor",
        original="lowering is None or op in lowering.lowerings:",
        replacement='lowering is None or op in lowering.lowerings or "forward" in str(op):',
    ),
    _runtime(
        what="operators hidden from torch.compile",
        original="if overwrites or is_dynamo_compiling():",
        replacement="if overwrites:",
    ),
]
