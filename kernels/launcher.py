"""Launches of Triton's kernels: planned once for each layout, and without Triton's own choice.

Triton chooses among what it compiled at every launch, by the dtype, alignment or value of every
argument. What decides that is planned here once, except the addresses of the tensors.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

KEPT = 64  # kernels and plans per launcher: with more in turn, they are looked up again


class Plan:
    """Launch of a kernel except for its tensors: grid, numbers, constants, Triton's options.

    A plan is for tensors of the same dtypes, and of the same ones missing, at every launch.
    """

    __slots__ = ("constants", "grid", "numbers", "options", "three_axes", "values")

    def __init__(
        self, grid: tuple[int, ...], numbers: tuple[float, ...], constants: tuple[Any, ...],
        num_warps: int = 4, **options: Any,
    ) -> None:  # fmt: skip
        """Plan a launch; the arguments are those of `Launcher`."""
        self.grid, self.numbers, self.constants = grid, numbers, constants
        self.values = (*numbers, *constants)
        self.three_axes = (*grid, 1, 1)[:3]
        # Fusion of products and sums is said because Triton 3.10 changes its default.
        self.options = {"num_warps": num_warps, "enable_fp_fusion": True, **options}


planned = functools.lru_cache(KEPT)
"""Decorator of functions that return plans: computed once for each combination of arguments.

Those are shapes, strides, the dtypes of the tensors or None, and tuned constants that tests change:
a function that read these itself would return what it computed before the change.
"""


def dtype_of(x: Tensor | None) -> torch.dtype | None:
    """Return the dtype of `x`, None where there is no tensor, as an argument of a plan."""
    return None if x is None else x.dtype


class Launcher:
    """Launcher of a kernel that caches what it was compiled to, for launches that are alike.

    Triton looks that up at every launch, by the dtype, alignment or value of every argument, which
    takes it 10 to 20 us. Here Triton is asked only if something decisive was never seen before: the
    device, a dtype, an alignment, the value or type of a number, a constant, the warps.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._kept: dict[tuple, tuple] = {}
        self._plans: dict[tuple, Plan] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...], constants: tuple[Any, ...], num_warps: int = 4,
        **options: Any,
    ) -> None:  # fmt: skip
        """Launch the kernel, whose parameters are `tensors`, `numbers`, `constants`, in this order.

        Args:
            grid: one axis or two.
            tensors: pointer arguments, None where there is none; all on the device of the launch.
            numbers: sizes, strides and other arguments whose value is not compiled in.
            constants: the constexprs.
            num_warps: Triton's option.
            options: other options of Triton.
        """
        key = (
            num_warps, numbers, constants, *map(type, numbers), *map(type, constants),
            *map(dtype_of, tensors), *options.items(),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= KEPT:
                self._plans.clear()
            plan = self._plans[key] = Plan(grid, numbers, constants, num_warps, **options)
        self.launch(plan, *tensors, grid=grid)

    def launch(
        self, plan: Plan, *tensors: Tensor | None, grid: tuple[int, ...] | None = None
    ) -> None:
        """Launch the kernel as planned, on these tensors: pointer arguments as of a call.

        `grid` is another than the plan's.
        """
        # Kernels are handed addresses, which decide already what is launched: Triton would ask each
        # tensor for its own again, and the driver whose it is.
        addresses: list[int | None] = []
        bits = 0
        for x in tensors:
            if x is None:
                addresses.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                bits |= address
        active: Any = None if _INTERPRETED else driver.active
        device = active and active.get_current_device()
        key = plan, device
        if bits % 16:
            key += tuple([address is None or address % 16 == 0 for address in addresses])
        if _minds_size(device):
            key += tuple(x is not None and x.untyped_storage().nbytes() < 1 << 31 for x in tensors)
        kept = self._kept.get(key)
        if kept is None:
            compiled = self._kernel[grid or plan.grid](*tensors, *plan.values, **plan.options)
            if compiled is not None:  # the interpreter returns None
                if len(self._kept) >= KEPT:
                    self._kept.clear()
                self._kept[key] = (
                    compiled, compiled.run, compiled.function, compiled.packed_metadata
                )  # fmt: skip
            return
        compiled, run, function, metadata = kept
        three_axes = plan.three_axes if grid is None else (*grid, 1, 1)[:3]
        if _is_hooked():
            compiled[three_axes](*tensors, *plan.values)
            return
        run(
            *three_axes, active.get_current_stream(device), function, metadata, None, None, None,
            *addresses, *plan.values,
        )  # fmt: skip


_INTERPRETED = knobs.runtime.interpret


@functools.cache
def _minds_size(device: Any) -> bool:
    """Return whether Triton compiles by a tensor's memory, below 2 GiB or not: on AMD it does."""
    if device is None:
        return False
    active: Any = driver.active
    return active.get_current_target().backend == "hip"


def _is_hooked() -> bool:
    """Return whether hooks, of Triton's profiler say, are to be called at every launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls))
