"""Every test runs everywhere: on a GPU when there is one, in Triton's interpreter when not."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, hence before anything of ours is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import strict_interpreter

    strict_interpreter.install()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Make `torch.empty` return NaN, so a kernel that leaves an element unwritten cannot pass."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
