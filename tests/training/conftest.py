"""The model's own logic is tested on the references, as the interpreter is slow.

That the kernels serve the model is shown by tests/train.
"""

import pytest


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setattr("tritium.kernels.runtime.CPU_KERNELS", False)
