"""Faults of `Launcher` and `operator` in runtime.py: what is kept wrongly, or hidden."""

from functools import partial

from tests.mutants import Mutant

_runtime = partial(Mutant, file="kernels/runtime.py")

MUTANTS = [
    _runtime(
        what="alignment not seen",
        original="x.data_ptr() % 16 == 0 for",
        replacement="True for",
    ),
    _runtime(
        what="alignment to 8 bytes taken for that to 16",
        original="x.data_ptr() % 16 == 0 for",
        replacement="x.data_ptr() % 8 == 0 for",
    ),
    _runtime(
        what="dtypes not seen",
        original="*[x if x is None else x.dtype for x in tensors],",
        replacement="",
    ),
    _runtime(
        what="values of numbers not seen",
        original="device, num_warps, numbers, constants, *options.items(),",
        replacement="device, num_warps, constants,",
    ),
    _runtime(
        what="a whole number taken for a fraction",
        original="*map(type, numbers), ",
        replacement="",
    ),
    _runtime(
        what="True taken for 1 among the constants",
        original=" *map(type, constants),",
        replacement="",
    ),
    _runtime(
        what="constants not seen",
        original="device, num_warps, numbers, constants, *options.items(),",
        replacement="device, num_warps, numbers,",
    ),
    _runtime(
        what="warps not seen",
        original="device, num_warps, numbers, constants, *options.items(),",
        replacement="device, numbers, constants,",
    ),
    _runtime(
        what="another device not seen",
        original="device, num_warps, numbers, constants, *options.items(),",
        replacement="num_warps, numbers, constants,",
    ),
    _runtime(
        what="size of memory not seen on AMD",
        original="        if _minds_size(device):",
        replacement="        if False:",
    ),
    _runtime(
        what="size of memory off by one on AMD",
        original=".nbytes() < 1 << 31",
        replacement=".nbytes() <= 1 << 31",
    ),
    _runtime(
        what="kernels kept without bound",
        original="if len(self._kept) >= KEPT:",
        replacement="if False:",
    ),
    _runtime(
        what="only the last kernel kept",
        original="if len(self._kept) >= KEPT:",
        replacement="if True:",
    ),
    _runtime(
        what="the second axis of the grid forgotten",
        original="*(*grid, 1, 1)[:3], stream",
        replacement="*(grid[0], 1, 1), stream",
    ),
    _runtime(
        what="hooks not heard",
        original="        if _is_hooked():",
        replacement="        if False:",
    ),
    _runtime(
        what="constants not handed on",
        original="*tensors, *numbers, *constants,\n        )  # fmt: skip",
        replacement="*tensors, *numbers,\n        )  # fmt: skip",
    ),
    _runtime(
        what="a mode does not see operators",
        original="torch._C._len_torch_dispatch_stack() > 0",
        replacement="False",
    ),
    _runtime(
        what="a profiler does not see operators",
        original="or _profiler_enabled()",
        replacement="or False",
    ),
    _runtime(
        what="a subclass does not see operators",
        original="        elif kind not in _PLAIN:\n            return False",
        replacement="        elif kind not in _PLAIN:\n            continue",
    ),
    _runtime(
        what="the sign of a negated view lost",
        original="x.is_neg() or ",
        replacement="",
    ),
    _runtime(
        what="always dispatched",
        original="        return launch_on_its_device(*args)\n\n    call",
        replacement="        return overload(*args)\n\n    call",
    ),
    _runtime(
        what="half a power of two",
        original="1 << (n - 1).bit_length() if n > 1 else 1",
        replacement="1 << n.bit_length() - 1 if n > 1 else 1",
    ),
    _runtime(what="blocks rounded down", original="-(-n // block)", replacement="n // block"),
]
