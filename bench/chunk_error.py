"""Accuracy of linear cross-entropy by the number of chunks: `python -m tritium.bench chunk_error`.

The gradient of the weight is a sum over chunks. Its relative root mean square error is taken
against float64 on the same bfloat16 inputs. Tritium adds in float32, and
torch.nn.functional.linear_cross_entropy (torch 2.13) by one of three policies.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tritium.bench import tables
from tritium.bench.ends import at_least
from tritium.bench.errors import relative_rms
from tritium.bench.harness import device_name
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.kernels.units import counted

RESULTS = "chunk_error.md"  # in the folder of results
WIDTH = 120
CHUNKS = (1, 8, 64, 256)
POLICIES = ("accurate", "balanced", "compact")


def implementations(T: int, V: int) -> Iterator[tuple[str, dict[int, Callable]]]:
    """Each implementation's loss, by its number of chunks."""
    rows = {n: -(-T // n) for n in CHUNKS}
    yield (
        "tritium.kernels.linear_cross_entropy",
        {n: partial(linear_cross_entropy, chunk_bytes=rows[n] * V * 2) for n in CHUNKS},
    )
    torchs = getattr(F, "linear_cross_entropy", None)
    if torchs is None or "options" not in inspect.signature(torchs).parameters:
        return
    options = partial(torch.nn.LinearCrossEntropyOptions, chunking_method=None)
    for policy in POLICIES:
        chunked = {
            n: options(batch_chunk_size=rows[n], acc_policy=policy, acc_dtype=torch.float32)
            for n in CHUNKS
        }
        yield (
            f'torch, acc_policy="{policy}"',
            {n: partial(torchs, options=chunked[n]) for n in CHUNKS},
        )


def weight_gradient(loss: Callable, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The gradient of the mean loss with respect to the weight."""
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(loss(hidden.detach().requires_grad_(), weight, target), weight)[0]


def measure(T: int, D: int, V: int) -> Iterator[tuple[str, list[float]]]:
    """Each implementation's relative error of the weight's gradient, for each of CHUNKS."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=device).bfloat16()
    weight = (torch.randn(V, D, device=device) / D**0.5).bfloat16()
    target = torch.randint(V, (T,), device=device)

    def whole(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), t)

    exact = weight_gradient(whole, hidden.double(), weight.double(), target)
    for name, losses in implementations(T, V):
        gradients = (weight_gradient(loss, hidden, weight, target) for loss in losses.values())
        yield name, [relative_rms([gradient], [exact]) for gradient in gradients]


def main(T: int = 4096, D: int = 256, V: int = 4096, write: bool = False) -> None:
    """Show the error of the weight's gradient in bfloat16 by the number of chunks.

    Args:
        T: tokens.
        D: width.
        V: vocabulary.
        write: keep the table in chunk_error.md, in the folder of results.
    """
    at_least(1, T=T, D=D, V=V)
    columns = [f"{counted(n, 'chunk')}, %" for n in CHUNKS]
    rows = [(name, *(f"{100 * e:.3f}" for e in errors)) for name, errors in measure(T, D, V)]

    def table(style: box.Box) -> Table:
        result = Table("implementation", *columns, box=style)
        for row in rows:
            result.add_row(*row)
        return result

    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [f"Relative RMS error of dweight, bfloat16, T = {T}, D = {D}, V = {V}; {device}"]
    if len(rows) == 1:
        lines.append(f"torch {torch.__version__} has no chunked linear_cross_entropy to compare.")
    Console(width=WIDTH).print(*lines, table(box.SIMPLE), sep="\n")
    if write:
        command = f"python -m tritium.bench chunk_error --T {T} --D {D} --V {V} --write"
        file = StringIO()
        print(f"`{command}`, torch {torch.__version__}", *lines, sep="\n\n", file=file)
        Console(file=file, width=WIDTH).print(table(box.MARKDOWN))
        tables.write(tables.results() / RESULTS, file.getvalue().encode())
