"""Prove that single operations can be sent to their references, and all others stay."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tritium import kernels
from tritium.kernels import fall_back, runtime
from tritium.kernels.runtime import OPERATIONS, SHARED, fallen_back, references

TARGET = torch.tensor([1, 0, 3])


def parameter():
    p = torch.nn.Parameter(torch.ones(4, 8))
    p.grad = torch.ones(4, 8)
    return p


def angles():
    return torch.ones(3, 2), torch.zeros(3, 2)


CALLS = {
    "softmax": lambda f, x: f(x),
    "log_softmax": lambda f, x: f(x),
    "cross_entropy": lambda f, x: f(x, TARGET),
    "linear_cross_entropy": lambda f, x: f(x, torch.ones(5, 4), TARGET),
    "linear_log_prob": lambda f, x: f(x, torch.ones(5, 4), TARGET),
    "linear_kl_div": lambda f, x: f(x, torch.ones(5, 4), x.detach(), torch.ones(5, 4)),
    "linear_topk_kl_div": lambda f, x: f(x, torch.ones(5, 4), TARGET[:, None], x[:, :1].detach()),
    "info_nce": lambda f, x: f(x, x),
    "mse_loss": lambda f, x: f(x, torch.zeros_like(x)),
    "rms_norm": lambda f, x: f(x, 4),
    "add_rms_norm": lambda f, x: f(x, x, None),
    "layer_norm": lambda f, x: f(x, 4, torch.ones(4)),
    "add_layer_norm": lambda f, x: f(x, x, torch.ones(4)),
    "rope": lambda f, x: f(x[:, None], *angles()),
    "qk_norm_rope": lambda f, x: f(x[:, None].expand(3, 3, 4), *angles()),
    "swiglu": lambda f, x: f(x, x),
    "geglu": lambda f, x: f(x, x),
    "relu_squared": lambda f, x: f(x),
    "dropout_add": lambda f, x: f(x, x, 0.5, seed=1),
    "embedding": lambda f, x: f(TARGET[:2], x),
    "clip_grad_norm_": lambda f, x: f([parameter()], 1.0),
    "clip_grad_norms_": lambda f, x: f([parameter()], 1.0),
    **dict.fromkeys(
        ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Lion", "Muon"),
        lambda f, x: f([parameter()], lr=0.1).step(),
    ),
}


@contextmanager
def launches(patch):
    """Count what Triton launches in the interpreter."""
    from triton.runtime.interpreter import GridExecutor

    launched, launch = [], GridExecutor.__call__

    def counting(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", counting)
    yield launched


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(runtime, "_fallen", frozenset())


def test_every_operation_is_known():
    assert set(kernels.__all__) - {"explain", "fall_back"} == OPERATIONS | SHARED.keys()
    assert CALLS.keys() == OPERATIONS | SHARED.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize("op", CALLS)
def test_its_kernel_is_not_launched(op, monkeypatch, pointer_tables):
    x = torch.linspace(-1, 1, 12).view(3, 4)
    with launches(monkeypatch) as launched:
        call = partial(CALLS[op], getattr(kernels, op), x)
        call()
        assert launched
        launched.clear()
        fall_back(*(OPERATIONS - {SHARED.get(op, op)}))
        call()
        assert launched, "fell back with the others"
        launched.clear()
        fall_back(op)
        call()
        assert not launched
    assert fallen_back() == OPERATIONS


def test_the_reference_runs_only_in_the_block():
    with references("rope", "AdamW"):
        assert fallen_back() == {"rope", "AdamW"}
        with references("info_nce"):
            assert fallen_back() == {"rope", "AdamW", "cross_entropy"}
    assert not fallen_back()


def test_refuses_an_unknown_operation():
    with pytest.raises(ValueError, match=r"there is no kernel of 'ropes'; name some of .*rope"):
        fall_back("swiglu", "ropes")
    assert not fallen_back()
