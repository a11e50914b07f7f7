"""A small operation to measure, doubling, with settings, rows and a report of it."""

import torch

from tritium.bench import case, compare, tables
from tritium.bench.operations import Operation
from tritium.kernels.roofline import Device

CPU = torch.device("cpu")
RATES = Device("a machine", "", copy=1e9, matrix_16=1e9, matrix_32=1e9, arithmetic=1e9)
SETTINGS = case.Settings(CPU, RATES, 0, torch.float32, quick=True, seconds=1e-6)
ROWS = (
    tables.Row("a", {"M": 2, "N": 64}, "Tritium", "forward", 1.5, 1.25, 2.0, 3_000_000, 10,
               "memory",
               80.0, peak_bytes=1 << 20, error=1e-3),
    tables.Row("a", {"M": 2, "N": 64}, "eager", "forward", problem="out of memory"),
    tables.Row("b", {"M": 2, "N": 4096}, "Tritium", "forward", 1.5, 1.25, 2.0, 10, 2_000_000_000,
               "matrix products", 180.0),
    tables.Row("b", {"M": 2, "N": 4096}, "eager", "both", 1.5, 1.25, 2.0, 10, 10, "memory", 0.5),
)  # fmt: skip


def doubling(**options) -> Operation:
    """x ↦ 2x, in which "Tritium" errs by 1 % of the output and nothing in the gradient."""
    return Operation(
        shapes={"two": {"M": 2}}, axis="M", smallest={"M": 4, "N": 8},
        inputs=lambda make, M, N: (make(M, N),),
        tritium={"Tritium": lambda: lambda x: 2 * x + 0.02 * x.detach()},
        eager=lambda x: 2 * x,
        **options,
    )  # fmt: skip


def raising(problem: Exception):
    def fail(*inputs: torch.Tensor, **dims: int) -> torch.Tensor:
        raise problem

    return fail


def report_of(operation: Operation, rows: tuple[tables.Row, ...]) -> tables.Report:
    notes = compare._notes(operation, SETTINGS)
    return compare.make_report(
        "softmax",
        operation.axis,
        "float32",
        SETTINGS,
        "python -m tritium.bench softmax",
        notes,
        rows,
    )
