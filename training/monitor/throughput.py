"""Throughput of a run: tokens per second, model FLOPs utilization (MFU), memory.

    MFU = tokens per second · FLOPs per token / rate

FLOPs are counted as in `tritium.model.shapes`. The rate is that of the device's datasheet for dense
products in the dtype of the run's, and, in `mfu_measured`, the one that a large product reached on
this device when the run began.
"""

from __future__ import annotations

import resource
import time
from math import inf

import torch

from tritium.kernels.roofline import MATRIX_SHARE, find_device
from tritium.kernels.units import quantity
from tritium.model.shapes import flops_per_token
from tritium.model.transformer import ModelConfig
from tritium.training.self_check_cases import Random

GIB = 1 << 30


class Meter:
    """Measures a run between the readings of its losses.

    Args:
        config: shape of the model.
        tokens_per_step: tokens of a step, over all micro-batches.
        device: device of the run.
        dtype: dtype of the matrix products.
        devices: number of devices like it that share a step.
        flops_added: to those that a token takes, such as `lora.flops_added` of the model.
    """

    def __init__(
        self, config: ModelConfig, tokens_per_step: int, device: torch.device, dtype: torch.dtype,
        devices: int = 1, flops_added: int = 0,
    ):  # fmt: skip
        self._flops = flops_per_token(config) + flops_added
        self._tokens_per_step = tokens_per_step
        self._device, self._dtype, self._devices = device, dtype, devices
        self._measured, self._datasheet = matrix_rate(device, dtype), datasheet_rate(device, dtype)
        self._tokens, self._started = 0, time.perf_counter()
        self._resumed = self._started

    def __str__(self) -> str:
        """Format the rates that utilization refers to."""
        rate = self._datasheet
        beside = f", {quantity(rate, 'FLOP/s')} by the datasheet" if rate else ""
        return (
            f"Matrix products in {str(self._dtype).removeprefix('torch.')}: "
            f"{quantity(self._measured, 'FLOP/s')} measured{beside}; a token takes "
            f"{quantity(self._flops, 'FLOP')}"
        )

    def start(self) -> None:
        """Start the clock, just before the first step."""
        self._tokens, self._started = 0, time.perf_counter()
        self._resumed = self._started

    def read(self, entries: list[dict]) -> None:
        """Add the speed of the steps since `resume` to their entries.

        Call it when their losses have been read, so that the device has come so far. Adds
        `tokens_per_s`, of the steps alone; `tokens_per_s_overall`, since `start`, with validation,
        saving and everything else; `mfu`, where the datasheet is known, and `mfu_measured`, of the
        steps alone; `memory_gib`.
        """
        now, tokens = time.perf_counter(), len(entries) * self._tokens_per_step
        self._tokens += tokens
        rate = tokens / (now - self._resumed)
        added: dict[str, float] = {
            "tokens_per_s": round(rate),
            "tokens_per_s_overall": round(self._tokens / (now - self._started)),
        }
        if self._datasheet is not None:
            added["mfu"] = self._share(rate, self._datasheet)
        added["mfu_measured"] = self._share(rate, self._measured)
        added["memory_gib"] = round(memory_in_use(self._device) / GIB, 3)
        for entry in entries:
            entry |= added

    def _share(self, tokens_per_s: float, rate: float) -> float:
        return round(tokens_per_s * self._flops / (rate * self._devices), 4)

    def resume(self) -> None:
        """Restart the clock of the steps, after validation and saving."""
        self._resumed = time.perf_counter()


def figures_of(entry: dict) -> dict[str, str]:
    """Return what the progress display shows of an entry: utilization and memory, with units."""
    shown = {}
    if "mfu" in entry:
        shown["MFU"] = f"{entry['mfu']:.1%}"
    elif "mfu_measured" in entry:
        shown["MFU"] = f"{entry['mfu_measured']:.1%} of measured"
    if "memory_gib" in entry:
        shown["memory"] = f"{entry['memory_gib']:.2f} GiB"
    return shown


def datasheet_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of dense products in a GPU's datasheet, None for a device not known."""
    if device.type != "cuda":
        return None
    try:
        found = find_device(None)
    except ValueError:
        return None
    return (found.matrix_16 if dtype.itemsize == 2 else found.matrix_32) / MATRIX_SHARE


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large product: the best of those that fit in some 20 milliseconds.

    Of random numbers, because a GPU multiplies constants faster than it ever does a model's.
    """
    n = 4096 if device.type == "cuda" else 512
    random = Random(device)
    a, b = random((n, n), dtype), random((n, n), dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    began, best = time.perf_counter(), inf
    while time.perf_counter() - began < 0.02:
        best = min(best, _seconds(a, b, out))
    return 2 * n**3 / best


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if not a.is_cuda:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 4e3


def memory_in_use(device: torch.device) -> int:
    """Return peak bytes: of tensors on a GPU; of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * resource.getpagesize()
