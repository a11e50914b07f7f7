"""Fixtures of the bench's tests."""

import pytest

from tritium.kernels import runtime


@pytest.fixture
def references(monkeypatch):
    """The kernels themselves are tested elsewhere, and slow in the interpreter."""
    monkeypatch.setattr(runtime, "REFERENCE", True)
