"""Bytes that a step keeps for its backward pass, by policy: `python -m tritium.bench activations`.

Predicted by `tritium.training.memory.predict` from the shape alone, and counted in a forward pass
through saved-tensor hooks, for the PyTorch references and for the Triton kernels, which off a GPU
run in Triton's interpreter. On a GPU also the peak of a whole step, as the allocator saw it; and
one step in too little memory, which falls back to smaller plans and must give the same gradient.

With `--by-depth` it is counted for models of 4 to 32 blocks, and for reversible ones, which keep
the same at every depth.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import Literal, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

from rich import box
from rich.console import Console
from rich.table import Table

from train import accumulate_gradients
from tritium.bench import tables
from tritium.bench.ends import at_least
from tritium.bench.harness import device_name
from tritium.kernels import runtime
from tritium.model import ModelConfig, Transformer
from tritium.model.activation_checkpointing import saved_bytes
from tritium.model.cpu_linear import Linear
from tritium.training.memory.plan import MemoryConfig, Planner
from tritium.training.memory.predict import Memory
from tritium.training.memory.retry import MemoryRetry
from tritium.training.optim import OptimizerConfig
from tritium.training.precision import ComputeConfig

RESULTS = "activations.md"  # in the folder of results
BY_DEPTH = "activations_by_depth"  # a table and a picture
WIDTH = 120
MIB = 2**20
MODEL = ModelConfig(
    vocab_size=4096, n_layers=12, d_model=128, n_heads=4, n_kv_heads=2, max_seq_len=128
)
POLICIES = "none", "selective", "every-3", "every-2", "full"
WITHIN = 0.05
DEPTHS = 4, 8, 16, 32
REVERSIBLE = "reversible"


class Row(NamedTuple):
    """One policy; bytes."""

    path: str
    dtype: torch.dtype
    policy: str
    predicted: int
    counted: int
    peak_predicted: int
    peak_measured: int | None

    def cells(self, none: int) -> tuple[str, ...]:
        """The row of the table, where the policy `none` counted so many bytes."""
        measured = self.peak_measured
        peaks = () if measured is None else (self.peak_predicted, measured)
        return (
            self.path, str(self.dtype)[6:], self.policy, f"{self.predicted / MIB:.2f}",
            f"{self.counted / MIB:.2f}", f"{self.predicted / self.counted - 1:+.2%}",
            f"{self.counted / none:.0%}",
            *(f"{x / MIB:.2f}" for x in peaks),
        )  # fmt: skip


def main(sequences: int = 2, by_depth: bool = False, write: bool = False) -> None:
    """Compare the prediction with what is counted; end with status 1 where they are 5 % apart.

    Args:
        sequences: of a micro-batch.
        by_depth: count for 4, 8, 16 and 32 blocks instead; end with status 1 where what reversible
            models keep differs by 5 %.
        write: keep the table in activations.md, or activations_by_depth.md and .png, in the folder
            of results.
    """
    at_least(1, sequences=sequences)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if by_depth:
        count_by_depth(device, sequences, write=write)
        return
    rows = [*_rows(device, sequences)]
    trial = _out_of_memory(device) if device.type == "cuda" else ()
    head = (
        f"`python -m tritium.bench activations --sequences {sequences} --write`, "
        f"torch {torch.__version__}, {device_name(device)}",
        f"{MODEL.n_layers} layers of width {MODEL.d_model}, vocabulary {MODEL.vocab_size:,}, "
        f"{sequences} × {MODEL.max_seq_len} tokens; MiB",
    )
    _print(Console(width=WIDTH), box.SIMPLE, head, rows, trial)
    if write:
        file = StringIO()
        _print(Console(file=file, width=WIDTH), box.MARKDOWN, head, rows, trial)
        tables.write(tables.results() / RESULTS, file.getvalue().encode())
    if not all(abs(row.predicted / row.counted - 1) <= WITHIN for row in rows):
        raise SystemExit(1)


def count_by_depth(device: torch.device, sequences: int, *, write: bool) -> None:
    """Count what a forward pass keeps at each depth, for every policy and for reversible models."""
    kept = {
        name: [_kept(device, sequences, n_layers, name) for n_layers in DEPTHS]
        for name in (*POLICIES, REVERSIBLE)
    }
    table = Table("blocks", *kept)
    for i, n_layers in enumerate(DEPTHS):
        table.add_row(f"{n_layers}", *(f"{each[i] / MIB:.2f}" for each in kept.values()))
    head = (
        f"`python -m tritium.bench activations --by-depth --sequences {sequences} --write`, "
        f"torch {torch.__version__}, {device_name(device)}",
        f"Width {MODEL.d_model}, vocabulary {MODEL.vocab_size:,}, {sequences} × "
        f"{MODEL.max_seq_len} tokens in float32; MiB that a forward pass keeps for its backward "
        "pass",
    )
    path = tables.results() / BY_DEPTH
    tables.present(
        head, table, width=WIDTH, write_to=path.with_suffix(".md") if write else None
    )  # fmt: skip
    if write:
        tables.plot_lines(
            {name: [x / MIB for x in each] for name, each in kept.items()}, DEPTHS,
            path.with_suffix(".png"), "blocks", "kept for the backward pass (MiB)",
        )  # fmt: skip
    flat = kept[REVERSIBLE]
    if max(flat) > (1 + WITHIN) * min(flat):
        raise SystemExit(1)


def _kept(device: torch.device, sequences: int, n_layers: int, name: str) -> int:
    config = replace(MODEL, n_layers=n_layers, reversible=name == REVERSIBLE)
    policy = "none" if config.reversible else name
    model = Transformer(config, activation_checkpointing=policy).to(device)
    tokens = torch.randint(config.vocab_size, (sequences, config.max_seq_len), device=device)
    given = [tokens, *model.parameters(), model.cos_LK, model.sin_LK]
    before, runtime.CPU_KERNELS = runtime.CPU_KERNELS, False
    try:
        return saved_bytes(partial(model, tokens, tokens), given)
    finally:
        runtime.CPU_KERNELS = before


def _rows(device: torch.device, sequences: int) -> Iterator[Row]:
    before = runtime.REFERENCE, runtime.CPU_KERNELS
    try:
        for path, kernels in (("references", False), ("kernels", True)):
            runtime.REFERENCE = device.type == "cuda" and not kernels
            runtime.CPU_KERNELS = kernels
            for dtype in (torch.float32, torch.bfloat16):
                optimizer = OptimizerConfig()
                memory = Memory(Transformer, MODEL, optimizer, device, dtype, sequences)
                for policy in POLICIES:
                    yield _row(path, memory, policy)
    finally:
        runtime.REFERENCE, runtime.CPU_KERNELS = before


def _row(path: str, memory: Memory, policy: str) -> Row:
    size, device = memory.batch_size, memory.device
    model = Transformer(MODEL, activation_checkpointing=policy).to(device)
    tokens = torch.randint(MODEL.vocab_size, (size, MODEL.max_seq_len), device=device)
    cast = ComputeConfig(precision(memory.dtype)).apply(model, device).cast

    def forward() -> torch.Tensor:
        with cast:
            return model(tokens, tokens)

    with cast:
        copies = [x.narrow for x in model.modules() if isinstance(x, Linear)]
    given = [tokens, *model.parameters(), model.cos_LK, model.sin_LK]
    counted = saved_bytes(forward, [*given, *(x for x in copies if x is not None)])
    step = memory.step(policy, size)
    measured = None
    if device.type == "cuda":
        for _ in range(2):  # the first makes the gradients, and what libraries keep
            torch.cuda.reset_peak_memory_stats(device)
            accumulate_gradients(model, (tokens, tokens), size, cast)
        measured = torch.cuda.max_memory_allocated(device)
    peak = step.total - step.states
    return Row(path, memory.dtype, policy, step.activations, counted, peak, measured)


def precision(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """Name the arithmetic whose products are of that dtype."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _out_of_memory(device: torch.device, sequences: int = 64) -> tuple[str, ...]:
    """Take a step in a third of the memory that its activations need; say what came of it."""
    memory = Memory(Transformer, MODEL, OptimizerConfig(), device, torch.float32, sequences)
    model = Transformer(MODEL).to(device)
    tokens = torch.randint(MODEL.vocab_size, (sequences, MODEL.max_seq_len))
    compute = partial(accumulate_gradients, model, (tokens, tokens), cast=nullcontext())
    compute(sequences)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    said = []
    fallback = MemoryRetry(Planner(memory, MemoryConfig()), None, lambda x: said.append(f"- {x}"))
    with _limited(device, memory.step("none", sequences).activations // 3):
        fallback.attempt(model, compute)
    got = [p.grad for p in model.parameters() if p.grad is not None]
    error = max(((x - y).norm() / y.norm()).item() for x, y in zip(got, expected, strict=True))
    title = f"One step of {sequences} sequences in a third of the memory of its activations:"
    return title, *said, f"- relative error of the gradient, the largest of all: {error:.1e}"


@contextmanager
def _limited(device: torch.device, nbytes: int) -> Iterator[None]:
    """Let this process take that many bytes of a GPU more than it has taken."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_reserved(device) + nbytes
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _print(
    console: Console, style: box.Box, head: tuple[str, ...], rows: list[Row], trial: tuple[str, ...]
) -> None:
    table = Table("path", "dtype", "policy", box=style)
    titles = ["predicted", "counted", "error", "of none"]
    on_gpu = rows[0].peak_measured is not None
    for title in titles + (["peak predicted", "peak measured"] if on_gpu else []):
        table.add_column(title, justify="right")
    none = {(row.path, row.dtype): row.counted for row in rows if row.policy == "none"}
    for row in rows:
        table.add_row(*row.cells(none[row.path, row.dtype]))
    console.print(*head, table, sep="\n\n")
    if trial:
        console.print(*trial, sep="\n")
