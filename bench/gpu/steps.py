"""Training steps that a session measures: Tritium's, and PyTorch's own modules compiled."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import train
from tritium.bench.harness import summary
from tritium.bench.runs.plain_gpt import PlainGPT
from tritium.bench.step import floors
from tritium.bench.tables import Row
from tritium.kernels.roofline import Device
from tritium.model import ModelConfig, Transformer
from tritium.training.cuda_graph import WARM_UP, training_step
from tritium.training.optim import OptimizerConfig, set_rate
from tritium.training.precision import ComputeConfig

SAMPLES = 8  # steps of a turn that are timed
MAX_NORM, RATE = 1.0, 6e-4
Step = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """A model, and the batch of its step."""

    config: ModelConfig
    batch: int

    @property
    def dims(self) -> dict[str, int]:
        """Batch, length, width, layers and vocabulary."""
        x = self.config
        return {
            "B": self.batch, "L": x.max_seq_len, "D": x.d_model, "layers": x.n_layers,
            "V": x.vocab_size,
        }  # fmt: skip


GPT2 = ModelConfig(vocab_size=50304, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024)
SMALL = ModelConfig(vocab_size=512, n_layers=2, d_model=64, n_heads=4, max_seq_len=64)
SHAPES = {"cuda": Shape(GPT2, 64), "cpu": Shape(SMALL, 8)}


def tritium_step(shape: Shape, device: torch.device, micro_batches: int, graph: bool) -> Step:
    """Make a model, and return its step, which returns loss and gradient norm."""
    model = Transformer(shape.config)
    arithmetic = ComputeConfig(precision="bfloat16").apply(model, device)
    optimizer = OptimizerConfig(max_grad_norm=MAX_NORM).make(model)
    set_rate(optimizer, RATE)  # rounded, as training rounds it
    size = shape.batch // micro_batches
    batch = _batch(shape)

    def gradients(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return train.accumulate_gradients(model, parts, size, arithmetic.cast)

    take = training_step(gradients, optimizer, graph=graph, log=lambda line: None)
    return lambda: take(batch)


def _plain(shape: Shape, device: torch.device, micro_batches: int, compiled: bool) -> Step:
    x = shape.config
    model: nn.Module = PlainGPT(x.vocab_size, x.max_seq_len, x.n_layers, x.d_model, x.n_heads)
    model.to(device)
    call = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, targets = (part.to(device) for part in _batch(shape))
    size = shape.batch // micro_batches

    def step() -> None:
        for parts in zip(tokens.split(size), targets.split(size), strict=True):
            with torch.autocast(device.type, torch.bfloat16):
                loss = call(*parts) / micro_batches
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _batch(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    x = shape.config
    tokens, targets = torch.randint(x.vocab_size, (2, shape.batch, x.max_seq_len))
    return tokens, targets


STEPS: dict[str, Callable[[Shape, torch.device], Step]] = {
    "Tritium, 2 micro-batches, CUDA graph": lambda s, d: tritium_step(s, d, 2, graph=True),
    "PyTorch modules, torch.compile, 2": lambda s, d: _plain(s, d, 2, compiled=True),
    "Tritium, 4 micro-batches, CUDA graph": lambda s, d: tritium_step(s, d, 4, graph=True),
    "Tritium, 4 micro-batches": lambda s, d: tritium_step(s, d, 4, graph=False),
    "PyTorch modules, 4": lambda s, d: _plain(s, d, 4, compiled=False),
}
"""The steps by name, the most important first."""


def row_of(name: str, device: torch.device, rates: Device) -> Row:
    """Time a step, by the wall's clock: what waits for the host counts."""
    cuda = device.type == "cuda"
    shape = SHAPES[device.type]
    torch.manual_seed(0)
    if cuda:  # from here on: what a CUDA graph holds is counted once, when it is captured
        torch.cuda.reset_peak_memory_stats()
    step = STEPS[name](shape, device)
    for _ in range(WARM_UP + 2):
        step()
    timing = summary(list(_seconds(step, cuda)))
    floor = sum(x.milliseconds for x in floors(shape.config, shape.batch, rates).values())
    return Row(
        "GPT-2 124M" if cuda else "small", shape.dims, name, "step", timing.median,
        timing.lower_quartile, timing.upper_quartile,
        percent_of_bound=100 * floor / timing.median,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )  # fmt: skip


def _seconds(step: Step, cuda: bool) -> Iterator[float]:
    for _ in range(SAMPLES):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def tokens_per_second(row: Row) -> float:
    """Tokens that a step's row handles in a second."""
    return row.dims["B"] * row.dims["L"] / (row.milliseconds or math.inf) * 1e3
