"""Host time of each operation, beside PyTorch's and Liger's: `python -m tritium.bench host`.

As in a model, several calls go forward and one backward pass goes through all, which divides what
it costs to begin one (15 us). The tensors are tiny and in CPU memory. Triton's kernels, Tritium's
and Liger's, are compiled for the GPU of `_stub_driver` and launched there, which runs nothing;
those of PyTorch are for CPUs, and compute next to nothing. What is measured is the host's part:
Python, autograd, dispatch, allocation, launches, everything except the GPU's driver. It is the time
that the thread itself ran, the least of many calls: what else runs on the machine only adds to it.
"""

import gc
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from rich.table import Table
from torch import Tensor
from triton import knobs

from tritium.bench import harness, host_cost, tables
from tritium.bench.ends import WrongInputError, at_least
from tritium.bench.operations import OPERATIONS, Make
from tritium.kernels import runtime

RESULTS = "host.md"  # in the folder of results
WIDTH = 100
DEPTH = 16  # calls of an operation before the backward pass through them
TARGET = 40.0  # microseconds, forward and backward
TINY = {"T": 2, "M": 2, "B": 2, "L": 2, "H": 2, "G": 2, "K": 16, "D": 32, "F": 32, "V": 32, "N": 32}
# A product per chunk: their host time is PyTorch's.
LEFT_OUT = (
    "linear_cross_entropy", "linear_log_prob", "linear_kl_div", "linear_topk_kl_div", "info_nce",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Microseconds of one operation, forward and backward; None where Liger has none."""

    op: str
    tritium: float
    pytorch: float
    liger: float | None
    without_liger: str = ""
    """Reason why Liger, which has the operation, has no figure."""

    @property
    def verdict(self) -> str:
        """Names of what it exceeds: the target, PyTorch, Liger."""
        above = [f"{TARGET:.0f} us"] if self.tritium > TARGET else []
        above += ["PyTorch"] if self.tritium > self.pytorch else []
        above += ["Liger"] if self.liger is not None and self.tritium > self.liger else []
        return f"above {', '.join(above)}" if above else "at or below all"


def main(
    ops: tuple[str, ...] = (), /, *, rounds: int = 7, calls: int = 20, write: bool = False
) -> None:
    """Print a table of the host time of every operation, forward and backward.

    Args:
        ops: operations to measure; all if none is named.
        rounds: number of rounds, in which the implementations take turns.
        calls: calls per round; the least of all rounds counts.
        write: write the table to host.md, in the folder of results.
    """
    if knobs.runtime.interpret or runtime.REFERENCE:
        raise WrongInputError(
            "kernels must be compiled; unset TRITON_INTERPRET and TRITIUM_REFERENCE"
        )
    if unknown := sorted({*ops} - {*OPERATIONS}):
        raise WrongInputError(f"no operation {unknown}; name some of {', '.join(OPERATIONS)}")
    at_least(1, rounds=rounds, calls=calls)
    names = ops or tuple(name for name in OPERATIONS if name not in LEFT_OUT)
    rows = [measure(name, rounds, calls) for name in names]
    table = Table("operation", "Tritium, us", "PyTorch, us", "Liger, us", "Tritium is")
    for row in rows:
        liger = "" if row.liger is None else f"{row.liger:.1f}"
        table.add_row(row.op, f"{row.tritium:.1f}", f"{row.pytorch:.1f}", liger, row.verdict)
    device = harness.device_name(torch.device("cpu"))
    lines = [
        f"`python -m tritium.bench host --write`, torch {torch.__version__}, Triton "
        f"{triton.__version__}, Python {platform.python_version()}, {device}, stub driver.",
        f"Host time of an operation, forward and backward: of {DEPTH} calls on tensors of their "
        "own and one backward pass through all, per call; time of the thread, the least of "
        f"{rounds * calls}. Tiny bfloat16 tensors; Triton's kernels are launched on a stub of a "
        "GPU, which runs nothing. PyTorch's column is of its kernels for CPUs, which compute next "
        "to nothing: its Python, autograd, dispatch and allocations are those of a GPU, its "
        "launches, of which it makes more, are function calls.",
        *(f"{row.op} has no figure of Liger: {row.without_liger}." for row in rows
          if row.without_liger),
    ]  # fmt: skip
    path = tables.results() / RESULTS if write else None
    tables.present(lines, table, width=WIDTH, write_to=path)


def measure(op: str, rounds: int, calls: int) -> Row:
    """Measure one operation and those it is compared with, in turns."""
    operation = OPERATIONS[op]
    dims = {name: TINY[name] for name in operation.smallest}
    inputs = operation.inputs(Make(torch.bfloat16, torch.device("cpu")), **dims)
    implementations: dict[str, tuple[Callable[[], object], Callable]] = {
        "tritium": (trained(operation.tritium["Tritium"](), inputs), host_cost.unexecuted),
        "pytorch": (trained(operation.eager, inputs), nullcontext),
    }
    without_liger = ""
    if "liger" in operation.peers:
        try:
            liger = trained(operation.peers["liger"](), inputs)
            with host_cost.unexecuted():
                liger()
            implementations["liger"] = liger, host_cost.unexecuted
        except Exception as error:  # not installed, or not made for tensors in CPU memory
            without_liger = f"{type(error).__name__}: {error}".rstrip(".")
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, (call, surroundings) in implementations.items():
            with surroundings():
                best[name] = min(_least(call, calls), best.get(name, float("inf")))
    return Row(op, best["tritium"], best["pytorch"], best.get("liger"), without_liger)


def trained(function: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """`DEPTH` calls of `function`, each on its own inputs, and one backward pass through all."""
    every = [
        tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
        for _ in range(DEPTH)
    ]
    wanted = [x for xs in every for x in xs if x.requires_grad]
    grads: list[Tensor] = []

    def call() -> object:
        results = []
        for xs in every:
            y = function(*xs)
            results.extend(y) if isinstance(y, tuple) else results.append(y)
        differentiable = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
        if not grads:
            grads.extend(map(torch.ones_like, differentiable))
        return torch.autograd.grad(differentiable, wanted, grads)

    return call


def _least(call: Callable[[], object], calls: int) -> float:
    """Return the microseconds of one of the operations in `call`."""
    for _ in range(3):
        call()
    taken = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(calls):
            start = time.thread_time()
            call()
            taken.append(time.thread_time() - start)
    finally:
        gc.enable()
    return min(taken) / DEPTH * 1e6
