"""Steps by PyTorch's kernels for CPUs are those of the reference, whatever is mixed with them."""

import copy

import pytest
import torch
from small_training import gradients
from torch import nn

from tritium.kernels import Adam, AdamW, runtime
from tritium.kernels.optimizers import _step_torch
from tritium.kernels.runtime import references

SHAPES = [(7,), (0,), (), (40, 50), (3001,), (2, 3, 4)]


def parameters(dtype=torch.float32):
    ps = [torch.randn(shape) for shape in SHAPES]
    ps += [torch.randn(30, 50).T, torch.randn(40, 8, 3).permute(2, 0, 1)]
    return [nn.Parameter(p.to(dtype)) for p in ps]


@pytest.fixture(params=[500, 1 << 18], ids=["sliced", "whole"], autouse=True)
def size(request, monkeypatch):
    monkeypatch.setattr(_step_torch, "SLICE", request.param)


@pytest.fixture
def calls(monkeypatch):
    """The number of parts of each step of PyTorch's kernels."""
    parts = []
    for kind in (Adam, AdamW):
        fused = kind.fused

        def counted(group, ps, *others, fused=fused):
            parts.append(len(ps))
            fused(group, ps, *others)

        monkeypatch.setattr(kind, "fused", staticmethod(counted))
    return parts


def trained(kind, options, ps, *, by_definition, steps=6, dtype=torch.float32):
    """Train groups of different options, some without a gradient in some steps."""
    groups = [
        {"params": ps[:3], "weight_decay": 0.3},
        {"params": ps[3:6], "maximize": True, "betas": (0.7, 0.9)},
        {"params": ps[6:], "lr": torch.tensor(0.03), "eps": 1e-4},
    ]
    optimizer = kind(groups, lr=0.01, **options)
    with pytest.MonkeyPatch.context() as patch, references("Adam", "AdamW"):
        patch.setattr(runtime, "REFERENCE", by_definition)
        for seed in range(steps):
            gradients(ps, seed)
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1e9}, {"record_norms": True}], ids=str
)
def test_steps_equal_the_reference(kind, options, calls):
    mine = parameters()
    torch_result = copy.deepcopy(mine)
    actual = trained(kind, options, mine, by_definition=False)
    assert calls
    calls.clear()
    definition = trained(kind, options, torch_result, by_definition=True)
    assert not calls
    torch.testing.assert_close(mine, torch_result, rtol=1e-5, atol=1e-7)
    for p, q in zip(mine, torch_result, strict=True):
        assert actual.state[p].keys() == definition.state[q].keys()
        for name, x in actual.state[p].items():
            torch.testing.assert_close(x, definition.state[q][name], rtol=1e-5, atol=1e-7)
    if options.get("record_norms"):
        found, expected = actual.norms(), definition.norms()
        for x, y in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_norms_change_nothing():
    mine = parameters()
    torch_result = copy.deepcopy(mine)
    trained(AdamW, {"max_grad_norm": 1.0, "record_norms": True}, mine, by_definition=False)
    trained(AdamW, {"max_grad_norm": 1.0}, torch_result, by_definition=False)
    assert all(map(torch.equal, mine, torch_result))


def test_gradients_stay_as_they_are():
    mine = parameters()
    trained(AdamW, {"max_grad_norm": 1e-3}, mine, by_definition=False, steps=1)
    kept = [p.grad.clone() for p in mine if p.grad is not None]
    gradients(mine, 0)
    assert all(map(torch.equal, kept, [p.grad for p in mine if p.grad is not None]))


@pytest.mark.parametrize(
    "options", [{"l1": 0.1}, {"ema_decay": 0.9}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_unsupported_options_use_the_reference(options, calls):
    mine = parameters()
    torch_result = copy.deepcopy(mine)
    trained(AdamW, options, mine, by_definition=False)
    assert not calls
    trained(AdamW, options, torch_result, by_definition=True)
    assert all(map(torch.equal, mine, torch_result))


def test_bfloat16_parameters_use_the_reference():
    mine = [*parameters()[:5], *parameters(torch.bfloat16)[5:]]
    torch_result = copy.deepcopy(mine)
    trained(AdamW, {"max_grad_norm": 1.0}, mine, by_definition=False)
    trained(AdamW, {"max_grad_norm": 1.0}, torch_result, by_definition=True)
    torch.testing.assert_close(mine, torch_result, rtol=1e-5, atol=1e-7)


def test_a_nonfinite_norm_changes_nothing():
    ps = parameters()
    optimizer = AdamW(ps, max_grad_norm=1.0)
    with references("AdamW"):
        gradients(ps, 0)
        optimizer.step()
        before = copy.deepcopy([ps, *map(dict, optimizer.state.values())])
        gradients(ps, 0)
        ps[3].grad[5, 5] = torch.inf
        optimizer.step()
    torch.testing.assert_close([ps, *map(dict, optimizer.state.values())], before, rtol=0, atol=0)
    assert optimizer.skipped == 1
