"""Prove that how a step is computed changes no setting of the process that it does not put back."""

import contextlib
import os

import pytest
import torch

from tritium.model import ModelConfig, Transformer
from tritium.training.precision import WORKSPACE, ComputeConfig

CONFIG = ModelConfig(vocab_size=23, n_layers=1, d_model=16, n_heads=2, max_seq_len=16)
PRECISIONS = "float32", "bfloat16", "bfloat16-true"


def settings():
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "environment": dict(os.environ),
    }


@pytest.fixture(params=["highest", "high", "medium"])
def chosen(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_leaves_the_process_as_it_found_it(precision, chosen, device):
    before, compute = settings(), ComputeConfig(precision=precision)
    model = Transformer(CONFIG)
    arithmetic = compute.apply(model, torch.device(device))
    assert settings() == before
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
    expected = "highest" if precision == "float32" else "medium"
    with compute.matmul_precision(torch.device(device)):
        assert torch.get_float32_matmul_precision() == expected
        with arithmetic.cast:
            model(tokens, tokens).backward()
    assert settings() == before
    with pytest.raises(KeyError), compute.matmul_precision(torch.device(device)):
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_of_the_dtype_that_they_are_trained_in(precision, device):
    model = Transformer(CONFIG)
    ComputeConfig(precision=precision).apply(model, torch.device(device))
    expected = torch.bfloat16 if precision == "bfloat16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.cos_LK.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("given", [None, ":16:8"])
def test_algorithms_are_deterministic_inside_the_block_alone(fails, given, monkeypatch):
    """Without filling memory that is about to be written; what was set before comes back."""
    if given is None:
        monkeypatch.delenv(WORKSPACE, raising=False)
    else:
        monkeypatch.setenv(WORKSPACE, given)

    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            os.environ.get(WORKSPACE),
        )

    before = state()
    with (
        contextlib.suppress(ZeroDivisionError), ComputeConfig(deterministic=True).determinism()
    ):  # fmt: skip
        assert state() == (True, False, False, given or ":4096:8")
        assert not fails or 1 / 0
    assert state() == before
    with ComputeConfig().determinism():
        assert state() == before
