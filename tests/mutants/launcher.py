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
        original="            *map(dtype_of, tensors), *options.items(),\n",
        replacement="            *options.items(),\n",
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
        original="key = plan, device\n",
        replacement="key = (plan,)\n",
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
        original="*addresses, *plan.values,\n",
        replacement="*self.__dict__.setdefault('first', addresses), *plan.values\n",
    ),
    _launcher(
        what="the grid of the first launch for all",
        original="self.launch(plan, *tensors, grid=grid)",
        replacement="self.launch(plan, *tensors)",
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
        original="*three_axes, active",
        replacement="*(three_axes[0], 1, 1), active",
    ),
    _launcher(
        what="hooks not heard",
        original="        if _is_hooked():",
        replacement="        if False:",
    ),
    _launcher(
        what="constants not handed on",
        original="*addresses, *plan.values,\n",
        replacement="*addresses, *plan.numbers\n",
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
        original="or type(x) not in _TENSORS or not",
        replacement="or not",
    ),
    _runtime(
        what="a subclass behind the first argument does not see operators",
        original=" or not plain.issuperset(map(type, args))",
        replacement="",
    ),
    _runtime(
        what="an option of another type handed to a kernel",
        original="            or (spread and not _PLAIN.issuperset(map(type, args[-1])))\n",
        replacement="",
    ),
    _runtime(
        what="options left a tuple where an operator is dispatched",
        original="return (*args[:-1], *args[-1]) if spread else args",
        replacement="return args",
    ),
    _runtime(
        what="options single where an operator is launched",
        original="args if options is None else (*args[:-spread], options(*args[-spread:]))",
        replacement="args",
    ),
    _runtime(
        what="zeros without memory dispatched as they are",
        original="type(x) in _TENSORS and x._is_zerotensor():",
        replacement="False:",
    ),
    _runtime(
        what="only the first argument looked at",
        original="slice(None if incoming is None else incoming - 1)",
        replacement="slice(0)",
    ),
    _runtime(
        what="zeros without memory handed to a kernel",
        original="or x.is_neg() or x._is_zerotensor()",
        replacement="or x.is_neg()",
    ),
    _runtime(
        what="zeros without memory behind the first argument handed to a kernel",
        original="(y.is_neg() or y._is_zerotensor())",
        replacement="y.is_neg()",
    ),
    _runtime(
        what="the sign of a negated view lost",
        original="or x.is_neg() or ",
        replacement="or ",
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
