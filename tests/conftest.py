"""Every test runs everywhere: on a GPU when there is one, in Triton's interpreter when not."""

import os

import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, hence before anything of Tritium's is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    import strict_interpreter

    strict_interpreter.install()

# The same examples on every run, so that a change alone can turn a test red. More, and fresh ones:
# TRITIUM_EXAMPLES=10000 pytest.
EXAMPLES = os.environ.get("TRITIUM_EXAMPLES")
settings.register_profile(
    "tritium",
    max_examples=int(EXAMPLES or 200),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
)
# For tests.mutants, which asks whether an example fails, not for the smallest that does.
settings.register_profile(
    "mutants", settings.get_profile("tritium"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("tritium")


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
