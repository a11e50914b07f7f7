"""Fixtures of kernels that find their tensors by address."""

import pytest
from paths import follow_tables

from tritium.kernels import runtime
from tritium.kernels.launcher import Launcher, Plan, dtype_of


@pytest.fixture(scope="session", autouse=True)
def plans():
    """Fail where one plan is launched on other dtypes, or without a tensor that it had before."""
    seen: dict[Plan, tuple] = {}
    launch = Launcher.launch

    def checked(launcher, plan, *tensors, **grid):
        dtypes = tuple(map(dtype_of, tensors))
        assert seen.setdefault(plan, dtypes) == dtypes
        launch(launcher, plan, *tensors, **grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "launch", checked)
        yield


@pytest.fixture
def pointer_tables(monkeypatch):
    """Give a small model more chunks than programs, and let the interpreter follow addresses."""
    follow_tables(monkeypatch)


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Run a test twice: through the kernels, and through their references."""
    monkeypatch.setattr(runtime, "REFERENCE", request.param == "reference")
