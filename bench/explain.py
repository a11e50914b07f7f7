"""Lower bounds of an operation: `python -m tritium.bench explain OP --shape T=..,V=..`."""

from typing import Literal

import torch
import tyro

from tritium.bench.compare import DTYPES
from tritium.bench.ends import as_wrong_input
from tritium.kernels.roofline import OPERATIONS, explain

STATE_DTYPES = DTYPES | {"uint8": torch.uint8}


def main(
    op: tyro.conf.Positional[str],
    shape: str,
    dtype: Literal["bf16", "fp32"] = "bf16",
    master: Literal["float32", "split", "none"] = "float32",
    state_dtype: Literal["fp32", "bf16", "uint8"] = "fp32",
    device: str | None = None,
) -> None:
    """Print the least bytes, operations and time of an operation, forward and backward.

    Args:
        op: an operation of tritium.kernels.roofline.
        shape: its dimensions: T=32768,V=50304
        dtype: bf16 or fp32; of an optimizer's weights and gradients.
        master: what an optimizer keeps of bf16 weights; none is stochastic rounding.
        state_dtype: of an optimizer's moments.
        device: part of a device's name, such as H200; the present GPU if left out.
    """
    with as_wrong_input(ValueError):
        found = explain(
            op, **_dims(op, shape), dtype=DTYPES[dtype], device=device,
            master=None if master == "none" else master, state_dtype=STATE_DTYPES[state_dtype],
        )  # fmt: skip
    print(found)


def _dims(op: str, shape: str) -> dict[str, int]:
    dims = {}
    for item in shape.split(","):
        letter, _, size = item.partition("=")
        if len(letter) != 1 or not size.replace("_", "").isdecimal():
            raise ValueError(f"explain: --shape must be like T=32768,V=50304; got {shape!r}")
        dims[letter] = int(size)
    if op in OPERATIONS and set(dims) != set(OPERATIONS[op]):
        raise ValueError(f"explain: {op} needs {', '.join(OPERATIONS[op])}; got {shape!r}")
    return dims
