"""Faults of `Launcher` and of `operator` in runtime.py: what is kept wrongly, or hidden."""

from functools import partial

from tests.mutants import Mutant

_launcher = partial(Mutant, file="kernels/launcher.py")
_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _launcher(
        what="alignment not seen",
        original="        if bits % 16:",
        replacement="        if False:",
    ),
    _launcher(
        what="alignment to 8 bytes taken for that to 16",
        original="        if bits % 16:",
        replacement="        if bits % 8:",
    ),
    _launcher(
        what="dtypes not seen",
        original="key = plan, device, *[x if x is None else x.dtype for x in tensors]",
        replacement="key = plan, device, *[x is None for x in tensors]",
    ),
    _launcher(
        what="values of numbers not seen",
        original="num_warps, numbers, constants, *map",
        replacement="num_warps, constants, *map",
    ),
    _launcher(
        what="a whole number taken for a fraction",
        original="*map(type, numbers), ",
        replacement="",
    ),
    _launcher(
        what="True taken for 1 among the constants",
        original=" *map(type, constants),",
        replacement="",
    ),
    _launcher(
        what="constants not seen",
        original="num_warps, numbers, constants, *map",
        replacement="num_warps, numbers, *map",
    ),
    _launcher(
        what="warps not seen",
        original="num_warps, numbers, constants, *map",
        replacement="numbers, constants, *map",
    ),
    _launcher(
        what="another device not seen",
        original="key = plan, device, *[",
        replacement="key = plan, *[",
    ),
    _launcher(
        what="size of memory not seen on AMD",
        original="        if _minds_size(device):",
        replacement="        if False:",
    ),
    _launcher(
        what="size of memory off by one on AMD",
        original=".nbytes() < 1 << 31",
        replacement=".nbytes() <= 1 << 31",
    ),
    _launcher(
        what="an address of before handed on",
        original="*addresses, *plan.numbers, *plan.constants,\n        )",
        replacement="*key[:0], *self.__dict__.setdefault('first', addresses), *plan.numbers,\n"
        "            *plan.constants,\n        )",
    ),
    _launcher(
        what="the grid of the first launch for all",
        original="self._launch(plan, grid, (*grid, 1, 1)[:3], tensors)",
        replacement="self._launch(plan, plan.grid, plan.three_axes, tensors)",
    ),
    _launcher(
        what="plans kept without bound",
        original="if len(self._plans) >= KEPT:",
        replacement="if False:",
    ),
    _runtime(
        what="results that are not needed missing from an operator",
        original="x.new_empty(0) if y is None else y for y in results",
        replacement="y for y in results",
    ),
    _runtime(
        what="a dead wrapper handed to a kernel",
        original="type(x) is Tensor and is_functorch_wrapped_tensor(x)",
        replacement="False",
    ),
    _launcher(
        what="kernels kept without bound",
        original="if len(self._kept) >= KEPT:",
        replacement="if False:",
    ),
    _launcher(
        what="only the last kernel kept",
        original="if len(self._kept) >= KEPT:",
        replacement="if True:",
    ),
    _launcher(
        what="the second axis of the grid forgotten",
        original="*three_axes, stream",
        replacement="*(grid[0], 1, 1), stream",
    ),
    _launcher(
        what="hooks not heard",
        original="        if _is_hooked():",
        replacement="        if False:",
    ),
    _launcher(
        what="constants not handed on",
        original="*addresses, *plan.numbers, *plan.constants,\n        )",
        replacement="*addresses, *plan.numbers,\n        )",
    ),
    _runtime(
        what="a mode does not see operators",
        original="_len_torch_dispatch_stack() > 0",
        replacement="False",
    ),
    _runtime(
        what="a profiler does not see operators",
        original="or _profiler_enabled()",
        replacement="or False",
    ),
    _runtime(
        what="a subclass does not see operators",
        original="(kind is Tensor or kind is Parameter) and not",
        replacement="isinstance(x, Tensor) and not",
    ),
    _runtime(
        what="the sign of a negated view lost",
        original="x.is_neg() or ",
        replacement="",
    ),
    _runtime(
        what="always dispatched",
        original="        if x.is_cpu:\n            return launch(x, *args)",
        replacement="        if x.is_cpu:\n            return overload(x, *args)",
    ),
    _runtime(
        what="half a power of two",
        original="1 << (n - 1).bit_length() if n > 1 else 1",
        replacement="1 << n.bit_length() - 1 if n > 1 else 1",
    ),
    _runtime(what="blocks rounded down", original="-(-n // block)", replacement="n // block"),
]
