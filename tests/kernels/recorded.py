"""Recorder of kernel launches and their grids."""

from types import ModuleType

import pytest

from tritium.kernels.launcher import Launcher


class Recorder:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


def record_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[tuple[int, ...]]:
    """Return a list to which every launch from `modules` adds its grid.

    Of a `Launcher` it is the first that counts, and those for which Triton is asked again.
    """
    grids = []
    for module in modules:
        for name, x in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(x, grids))
            elif isinstance(x, Launcher):
                monkeypatch.setattr(module, name, Launcher(Recorder(x._kernel, grids)))
    return grids
