"""Launches of a Launcher on a stub of a GPU, and of Triton with the same arguments."""

import random

import torch
import triton
import triton.language as tl

from tritium.bench.compiled._stub_driver import StubDriver
from tritium.kernels.runtime import Launcher


@triton.jit
def fill(x_ptr, y_ptr, value, n, A: tl.constexpr, B: tl.constexpr):
    offs = tl.arange(0, B)
    tl.store(x_ptr + offs, value + A, mask=offs < n)
    if y_ptr is not None:
        tl.store(y_ptr + offs, value, mask=offs < n)


X = torch.empty(4096)
CHOICES = [
    (X, X[4:], X[2:], X[1:]), (X, X[1:], None), (0.0, 1.0, 1, 2.0, 2),
    (1, 2, 16, 17, 2**31, 2**40), (0, 1), (128, 256),
]  # fmt: skip

if __name__ == "__main__":
    drivers = StubDriver(80), StubDriver(90)
    launch, now = Launcher(fill), [X, X, 0.0, 16, 0, 128]
    kept, kernels = 0, set()
    for _ in range(300):
        triton.runtime.driver.set_active(random.choice(drivers))
        place = random.randrange(2 * len(CHOICES))
        if place < len(CHOICES):
            now[place] = random.choice(CHOICES[place])
        StubDriver.launches.clear()
        before = launch._key
        launch(3, tuple(now[:4]), tuple(now[4:]), num_warps=1)
        kept += launch._key is before
        fill[(3,)](*now, num_warps=1)
        actual, expected = StubDriver.launches
        assert actual is expected, now
        kernels.add(id(actual))
    print(kept, len(kernels))
