"""Fixtures of kernels that find their tensors by address."""

import pytest
from paths import follow_tables

from tritium.kernels import runtime


@pytest.fixture
def pointer_tables(monkeypatch):
    """Give a small model more chunks than programs, and let the interpreter follow addresses."""
    follow_tables(monkeypatch)


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Run a test twice: through the kernels, and through their references."""
    monkeypatch.setattr(runtime, "REFERENCE", request.param == "reference")
