"""The device of a run: its choice, threads, memory, and dtype of matrix products."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from triton import knobs

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """Return the device that "cpu", "cuda" or "auto" names.

    Raises:
        ValueError: "cuda" where "no GPU was found".
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU was found; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_threads(wanted: int) -> int:
    """Set the number of CPU threads: `wanted`, else as many cores as this process may use."""
    torch.set_num_threads(wanted or min(torch.get_num_threads(), usable_cores()))
    return torch.get_num_threads()


def usable_cores() -> int:
    """Return how many CPUs this process may use, by its affinity and its container's quota."""
    return max(1, min(len(os.sched_getaffinity(0)), _cgroup_cores()))


def keep_freed_memory() -> None:
    """Keep what this process frees, instead of handing it back to the system at every step.

    A step of a model on a CPU frees and takes the same tensors as the one before, and every page
    that comes back from the system is zeroed first: some 5 % of the time. Up to 1 GiB is kept, of
    tensors up to 32 MiB, which is as far as glibc goes; elsewhere nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products; "auto" is bfloat16 where it is native."""
    if name == "auto":
        name = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    return getattr(torch, name)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) << 10
    try:
        limit, used = (int(_cgroup(f"memory.{name}")) for name in ("max", "current"))
        stat = dict(line.split() for line in _cgroup("memory.stat").splitlines())
        return max(0, min(available, limit - used + int(stat["inactive_file"])))
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return available


def describe(device: torch.device) -> str:
    """Name the hardware that decides rounding: the GPU's model, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _cgroup_cores() -> int:
    """The whole cores that a container's quota allows; every core where there is none."""
    try:
        quota, period = _cgroup("cpu.max").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or the quota is "max"
        return os.cpu_count() or 1


def _cgroup(file: str) -> str:
    return Path("/sys/fs/cgroup", file).read_text()


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; Triton's interpreter has not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"}) and not knobs.runtime.interpret
