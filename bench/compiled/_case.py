"""One launch for `static` to compile, and the limits of its machine code."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

UNFIT = {
    ("_cross_entropy_kernel", "gfx942"): "with gradients it is launched with 32 warps, which are "
    "2,048 threads where a wave has 64 lanes: MI300 takes 1,024",
}
"""By kernel and target, why it is excused there from its limits."""


@dataclass(frozen=True)
class Limit:
    """Limits of one kernel's machine code, beyond those of every kernel."""

    bytes: float = math.inf
    """Through device memory, for each element; 5 % are left for what each row has one of."""
    instructions: float = math.inf
    """For each element, on NVIDIA's targets."""
    single: bool = False
    """It is one program, which may compute in float64 and move as little as it likes."""
    atomics: bool = False
    """Its docstring says that it uses them."""


@dataclass(frozen=True)
class Case:
    """One way to call an operation, and what its machine code may look like."""

    label: str
    launch: Callable[[], object]
    wide: bool = True
    """Every row starts at a multiple of 16 elements: large tiles move 8 or 16 bytes per thread."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """By the name of the kernel."""
    narrow_on: tuple[str, ...] = ()
    """Targets on which tiles move less all the same."""


def name_of(dtype: torch.dtype) -> str:
    """The dtype as labels have it."""
    return str(dtype).removeprefix("torch.")
