"""Kernels that each break one limit of `bench static`: run to print, as JSON, what it finds."""

import json

import torch
import triton
import triton.language as tl

from bench._stub_driver import StubDriver
from bench.cases import Case
from bench.static import _row

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
def atomic(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def double(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(tl.float64) * 1.1)


def problems(kernel, *arguments, block=2048, **case) -> list[str]:
    driver = StubDriver(90)
    triton.runtime.driver.set_active(driver)
    kernel[1,](torch.empty(N), torch.empty(N), *arguments, BLOCK=block)
    case = Case("", kernel, **case)
    return list(_row("", 90, case, driver.launches[0]).problems)


if __name__ == "__main__":
    found = {
        "sound": problems(sound),
        "spilling": problems(spilling, block=N * 4),
        "narrow": problems(narrow),
        "narrow, and expected so": problems(narrow, wide=False),
        "small": problems(narrow, block=256),
        "masked": problems(masked, 1001),
        "atomic": problems(atomic),
        "double": problems(double),
        "double, and exempt": problems(double, exempt=("double",)),
    }
    print(json.dumps(found))
