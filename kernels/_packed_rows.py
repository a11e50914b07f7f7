"""Blocks of a row of 16-bit numbers in registers, two to a 32-bit word, between two passes over it.

Left to itself the compiler keeps what the first pass converted to float32, twice as much, and
spills. Here it keeps words: the second pass exclusive-ors them with a number that is 0, which the
compiler does not know, and converts them once more.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from tritium.kernels.runtime import cdiv

WARPS = 16  # one program per multiprocessor, of up to 128 registers a thread
BLOCK = 512 * WARPS  # elements: 8 words a thread
BLOCKS = 8  # in registers, 64 words a thread; the last of a row that fits may be cut short
# Triton 3.6 and 3.7 spill 8 registers where a whole row is kept that begins at a multiple of 16
# elements; programs of 32 warps already read such rows twice at 91 % of the bound.
SPARES_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
SHORTEST = 3 * BLOCK  # rows of no more are served from the cache by programs of fewer registers


def keeps_rows(x_MN: Tensor) -> bool:
    """Return whether blocks of these rows may stay in registers."""
    if x_MN.element_size() != 2 or x_MN.data_ptr() % 16:
        return False
    if knobs.runtime.interpret:
        return True
    active: Any = driver.active
    return _has_registers(active.get_current_device())


@functools.cache
def _has_registers(device: Any) -> bool:
    # Seen in machine code: no spills for sm_90, nor for sm_100 under Triton 3.9 (3.8: not tried);
    # 18 for sm_100 under 3.7, up to 26 for sm_80. AMD was not tried.
    active: Any = driver.active
    target = active.get_current_target()
    return target.backend == "cuda" and (
        target.arch == 90 or (target.arch == 100 and SPARES_REGISTERS)
    )


def kept_blocks(N: int, lead: int) -> tuple[int, bool]:
    """Return how many full blocks of a row stay in registers, and whether one more is all the rest.

    `lead`: 16 where rows begin anywhere, 0 where they begin at multiples of 16 elements.
    """
    bulk = cdiv(N, 16) * 16 - 16 if lead else N // 16 * 16
    blocks = cdiv(bulk, BLOCK)
    if bulk <= SHORTEST or (blocks <= BLOCKS and not lead and not SPARES_REGISTERS):
        return 0, False
    return min(blocks, BLOCKS) - 1, blocks <= BLOCKS


@triton.jit
def packed_offsets(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return the words of a block as `[BLOCK / LANES, LANES / 2]`."""
    rows = tl.arange(0, BLOCK // LANES)[:, None] * (LANES // 2)
    return rows + tl.arange(0, LANES // 2)[None, :]


@triton.jit
def packed_load(x_ptr, start, offs_P, left):
    """Return the words from element `start` on, a multiple of 16, as far as `left` elements.

    They are read once: the cache need not keep them.
    """
    ptrs_P = (x_ptr + start).to(tl.pointer_type(tl.int32), bitcast=True) + offs_P
    if left is None:
        return tl.load(ptrs_P, eviction_policy="evict_first")
    else:
        return tl.load(ptrs_P, mask=offs_P < left // 2, other=0, eviction_policy="evict_first")


@triton.jit
def unpacked(word_P, hidden_0, x_ptr):
    """Return the numbers in the words, `[BLOCK / LANES, LANES]`, in the dtype of `x_ptr`.

    hidden_0 is 0 in the first pass, and in the second a 0 that only the launch knows.
    """
    word_P = word_P ^ hidden_0
    low_P = word_P.to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
    high_P = (word_P >> 16).to(tl.int16).to(x_ptr.dtype.element_ty, bitcast=True)
    return tl.interleave(low_P, high_P)
