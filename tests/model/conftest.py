"""The model's own logic is tested on the references, as the interpreter is slow.

That the kernels serve the model is shown by tests/train.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def references(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr("kernels._runtime.REFERENCE", True)
