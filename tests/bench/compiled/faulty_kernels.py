"""Kernels that each break one limit of `bench static`: run to print, as JSON, what it finds."""

import json
from typing import Any

import torch
import triton
import triton.language as tl

from tritium.bench.compiled._case import Case, Limit
from tritium.bench.compiled._figures import Row, make_row
from tritium.bench.compiled._stub_driver import StubDriver
from tritium.bench.compiled.static import read_codes

N = 16384


@triton.jit
def sound(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * 2)


@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x / tl.sum(x))


@triton.jit
def narrow(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + 1))


@triton.jit
def masked(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs), mask=offs < n)


@triton.jit
def masked_loop(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    # Its loads outside the loop are wide: only the loop tells.
    offs = tl.arange(0, BLOCK)
    total = tl.load(y_ptr + offs)
    for start in range(0, n, BLOCK):
        total += tl.load(x_ptr + start + offs, mask=start + offs < n, other=0.0)
    tl.store(y_ptr + offs, total)


@triton.jit
def peeled_loop(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    # The first loop backward is the masked tail; the second reads, the third reads and writes.
    offs = tl.arange(0, BLOCK)
    x_ptr += tl.program_id(0).to(tl.int64) * stride
    y_ptr += tl.program_id(0).to(tl.int64) * stride
    full = n // BLOCK * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(full, n, BLOCK):
        total += tl.load(x_ptr + start + offs, mask=start + offs < n, other=0.0)
    for start in range(0, full, BLOCK):
        total += tl.load(x_ptr + start + offs)
    mean = tl.sum(total)
    for start in range(0, full, BLOCK):
        tl.store(y_ptr + start + offs, tl.load(x_ptr + start + offs) * mean)


@triton.jit
def atomic(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def double(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.float64) * 1.1)


def row(kernel, *arguments, target="sm_90", block=2048, wide=True, limit=None, **options) -> Row:
    triton.runtime.driver.set_active(StubDriver(target))
    kernel[1,](torch.empty(N), torch.empty(N), *arguments, BLOCK=block, **options)
    (compiled,) = StubDriver.launches
    case = Case("", kernel, wide, {compiled.name: limit or Limit()})
    code = read_codes([compiled], target)[compiled.cubin]
    return make_row("", target, case, compiled, code)


def figures(found: Row) -> dict[str, Any]:
    return {
        "loads": [dict(x) for x in found.loads],
        "stores": [dict(x) for x in found.stores],
        "bits": found.bits,
        "bytes": found.bytes,
        "few instructions": 1 < found.instructions < 8,
        "warps": found.warps,
    }


if __name__ == "__main__":
    both = {
        "sound": lambda **on: row(sound, **on),
        "spilling": lambda **on: row(spilling, block=N * 8, **on),
        "narrow": lambda **on: row(narrow, **on),
        "narrow, and expected so": lambda **on: row(narrow, wide=False, **on),
        "small": lambda **on: row(narrow, block=128, **on),
        "masked": lambda **on: row(masked, 1001, **on),
        "masked loop": lambda **on: row(masked_loop, 1001, **on),
        "peeled loop": lambda **on: row(peeled_loop, 10001, N, **on),
        "atomic": lambda **on: row(atomic, **on),
        "atomic, and said so": lambda **on: row(atomic, limit=Limit(atomics=True), **on),
        "double": lambda **on: row(double, **on),
        "double, and single": lambda **on: row(double, limit=Limit(single=True), **on),
        "more bytes": lambda **on: row(sound, limit=Limit(bytes=7), **on),
        "more instructions": lambda **on: row(sound, limit=Limit(instructions=1), **on),
        "many threads": lambda **on: row(sound, num_warps=32, **on),
    }
    found: dict[str, Any] = {
        target: {name: list(make(target=target).problems) for name, make in both.items()}
        for target in ("sm_90", "gfx942")
    }
    found["figures"] = {
        target: {name: figures(both[name](target=target)) for name in ("sound", "peeled loop")}
        for target in ("sm_90", "gfx942")
    }
    print(json.dumps(found))
