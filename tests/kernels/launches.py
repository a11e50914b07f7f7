"""Launches of a launcher on stubs of GPUs, beside Triton with the same arguments."""

import random
import sys

import torch
import triton
import triton.language as tl

from tritium.bench.compiled._stub_driver import StubDriver
from tritium.kernels import launcher
from tritium.kernels.launcher import Launcher


@triton.jit
def fill(x_ptr, y_ptr, value, n, A: tl.constexpr, B: tl.constexpr):
    offs = tl.arange(0, B)
    tl.store(x_ptr + offs, value + A, mask=offs < n)
    if y_ptr is not None:
        tl.store(y_ptr + offs, value + A, mask=offs < n)


class Huge(torch.Tensor):
    """A tensor that says its memory is larger than it is."""

    def untyped_storage(self):
        return type("Storage", (), {"nbytes": lambda _: 1 << 31, "size": lambda _: 1 << 31})()


X = torch.empty(4096)
HALF = torch.empty(4096, dtype=torch.bfloat16)
LARGE = torch.empty(64).as_subclass(Huge)
CHOICES = [
    (X, X[4:], X[2:], X[1:], HALF, LARGE), (X, X[1:], None, HALF[1:]), (0.0, 1.0, 1, 2.0, 2, 16),
    (1, 2, 16, 17, 2**31, 2**40), (0, 1, 0.5), (128, 256), (1, 2, 4),
]  # fmt: skip

if __name__ == "__main__":
    launcher.KEPT = int(sys.argv[1])
    drivers = StubDriver(80), StubDriver(90), StubDriver("gfx942")
    launch, now = Launcher(fill), [X, X, 0.0, 16, 0, 128, 1]
    asked, triton_launch = [], fill.run
    fill.run = lambda *args, **options: asked.append(1) or triton_launch(*args, **options)
    kept, kernels, before = 0, set(), tuple(now)
    for _ in range(600):
        triton.runtime.driver.set_active(random.choice(drivers))
        place = random.randrange(2 * len(CHOICES))
        if place < len(CHOICES):
            before = tuple(now)
            now[place] = random.choice(CHOICES[place])
        elif place == len(CHOICES):
            now[:], before = before, tuple(now)
        StubDriver.launches.clear()
        asked.clear()
        *args, warps = now
        launch((3,), tuple(args[:2]), tuple(args[2:4]), tuple(args[4:]), warps)
        kept += not asked
        fill[(3,)](*args, num_warps=warps, enable_fp_fusion=True)
        own, chosen = StubDriver.launches
        assert own is chosen, now
        kernels.add(id(own))
        assert len(launch._kept) <= launcher.KEPT
    print(kept, len(kernels))
