"""Targets of `static`, with what one multiprocessor of each can hold and issue."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Device:
    """A target of the compiler, and the GPU that stands for it: figures of its datasheet."""

    target: GPUTarget
    name: str
    program_shared: int
    """Most bytes of shared memory that one program may use."""
    shared: int
    """Bytes of shared memory in one multiprocessor."""
    registers: int = 65536
    """32-bit registers of one multiprocessor, over all lanes."""
    granularity: int = 8
    """Registers per thread are given out in multiples of this."""
    warps: int = 64
    programs: int = 32
    """Most that one multiprocessor holds at a time."""
    threads: int = 1024
    """Most threads of one program."""
    issue: float = 0.0
    """Warp instructions a second: multiprocessors · 4 schedulers · boost clock; 0 if not known."""
    copy: float = 0.0
    """Bytes a second that a copy moves: 0.9 of the bandwidth of the datasheet."""

    def resident_warps(self, registers: int, shared: int, threads: int) -> int:
        """Warps of a kernel that one multiprocessor holds at a time."""
        lanes = self.target.warp_size
        warps = -(-threads // lanes)
        each = -(-max(registers, 1) // self.granularity) * self.granularity * lanes
        # Each of the four schedulers owns a quarter of the registers.
        by_registers = min(self.registers // 4 // each * 4, self.warps) // warps
        by_shared = self.shared // (shared + self.reserved)
        return min(by_registers, by_shared, self.programs) * warps

    @property
    def reserved(self) -> int:
        """Bytes of shared memory that CUDA takes for itself, per program."""
        return 1024 if self.target.backend == "cuda" else 1


# Boost clocks follow from the float32 rates: TFLOP/s = multiprocessors · 256 · GHz / 1000.
DEVICES = {
    "sm_80": Device(  # 108 multiprocessors, 19.5 TFLOP/s: 1.41 GHz; 2,039 GB/s
        GPUTarget("cuda", 80, 32), "A100", 166_912, 164 * 1024,
        issue=108 * 4 * 1.41e9, copy=0.9 * 2.039e12,
    ),
    "sm_90": Device(  # 132 multiprocessors, 67 TFLOP/s: 1.98 GHz; 4,800 GB/s
        GPUTarget("cuda", 90, 32), "H200", 232_448, 228 * 1024,
        issue=132 * 4 * 1.98e9, copy=0.9 * 4.8e12,
    ),
    "sm_100": Device(  # 148 multiprocessors, 75 TFLOP/s: 1.98 GHz; 8,000 GB/s
        GPUTarget("cuda", 100, 32), "B200", 232_448, 228 * 1024,
        issue=148 * 4 * 1.98e9, copy=0.9 * 8e12,
    ),
    # A wave has 64 lanes, a SIMD holds 8 waves and 512 registers per lane; a compute unit has 4.
    "gfx942": Device(
        GPUTarget("hip", "gfx942", 64), "MI300X", 65_536, 65_536,
        registers=4 * 512 * 64, warps=32, programs=16,
    ),
}  # fmt: skip
