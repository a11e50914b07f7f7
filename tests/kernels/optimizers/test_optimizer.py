"""Optimizers follow torch.optim's interface: state, groups, layouts, launches, errors."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from recorded import record_launches
from small_training import (
    SMALL,
    assert_equal,
    assert_no_worse,
    bits,
    gradients,
    parameters,
    train,
)
from torch import nn

from tritium.kernels.optimizers import (
    _base,
    _pointer_table,
    _step_kernels,
    clip_grad_norm,
    grad_norm,
)
from tritium.kernels.optimizers.adamw import AdamW
from tritium.kernels.optimizers.muon import Muon
from tritium.kernels.optimizers.sgd import SGD

pytestmark = pytest.mark.usefixtures("pointer_tables")


@pytest.mark.parametrize("shapes", [[(5,)], [(5000,), (0,), *SMALL]], ids=str)
@pytest.mark.parametrize(("max_grad_norm", "launches"), [(None, 2), (1.0, 3)])
def test_launches_do_not_depend_on_the_model(max_grad_norm, launches, shapes, monkeypatch, device):
    grids = record_launches(monkeypatch, _step_kernels, grad_norm, clip_grad_norm)
    train(lambda ps: AdamW(ps, max_grad_norm=max_grad_norm), parameters(shapes, device), 1)
    assert len(grids) == launches


def test_uploads_nothing_while_addresses_stay(monkeypatch, device):
    ps = parameters(SMALL, device)
    gradients(ps, seed=1)
    optimizer = AdamW(ps, max_grad_norm=1.0)
    optimizer.step()
    for module in (_pointer_table, _base):
        monkeypatch.setattr(module, "upload", None)
    optimizer.step()


def test_never_reads_back(monkeypatch, device):
    # What a CUDA graph could not capture, and what would make the host wait.
    ps = parameters(SMALL, device)
    gradients(ps, seed=1)
    optimizer = AdamW(ps, lr=torch.tensor(1e-3, device=device), max_grad_norm=1.0)
    optimizer.step()
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    optimizer.step()


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [AdamW, torch.optim.AdamW])
def test_state_dict_is_torchs(first, second, path, device):
    actual = parameters(SMALL, device)
    expected, exact = copy.deepcopy(actual), [nn.Parameter(p.detach().double()) for p in actual]
    for ps in (expected, exact):
        train(torch.optim.AdamW, ps, 12)
    file = io.BytesIO()
    torch.save(train(first, actual, 6).state_dict(), file)
    file.seek(0)
    optimizer = second(actual)
    optimizer.load_state_dict(torch.load(file))
    train(None, actual, 6, start=6, optimizer=optimizer)
    assert_no_worse(actual, expected, exact)


def test_state_loads_from_other_layouts_and_dtypes(path, device):
    ps = [nn.Parameter(torch.randn(8, 16, device=device)) for _ in range(2)]
    optimizer = train(AdamW, ps, 2, start=1)
    state = copy.deepcopy(optimizer.state_dict())
    shared = torch.tensor(2.0, dtype=torch.float64)
    for saved in state["state"].values():
        saved["step"] = shared
        for name in ("exp_avg", "exp_avg_sq"):
            saved[name] = saved[name].double().T.contiguous().T
    qs = copy.deepcopy(ps)
    other = AdamW(qs)
    other.load_state_dict(state)
    train(None, ps, 1, start=3, optimizer=optimizer)
    train(None, qs, 1, start=3, optimizer=other)
    assert_equal(bits(optimizer), bits(other))
    assert shared.item() == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue_alike(copied, path, device):
    ps = parameters(SMALL, device)
    optimizer = train(lambda ps: AdamW(ps, max_grad_norm=1.0), ps, 3)
    twin = copied(optimizer)
    qs = twin.param_groups[0]["params"]
    assert twin.max_grad_norm == 1.0
    train(None, ps, 3, start=3, optimizer=optimizer)
    train(None, qs, 3, start=3, optimizer=twin)
    assert_equal(bits(optimizer), bits(twin))


def test_group_added_and_parameters_frozen_later(path, device):
    actual = parameters(SMALL, device)
    expected, exact = copy.deepcopy(actual), [nn.Parameter(p.detach().double()) for p in actual]
    for ps, make in ((actual, AdamW), (expected, torch.optim.AdamW), (exact, torch.optim.AdamW)):
        optimizer = train(make, ps[:2], 4)
        optimizer.add_param_group({"params": ps[2:], "lr": 0.1})
        ps[0].requires_grad_(False)
        ps[0].grad = None
        train(None, ps[1:], 4, start=4, optimizer=optimizer)
    assert_no_worse(actual, expected, exact)


def test_follows_tensors_that_move(path, device):
    actual = parameters(SMALL, device)
    expected = copy.deepcopy(actual)
    a, b = train(AdamW, actual, 2), train(AdamW, expected, 2)
    for p in actual:
        p.data = p.data.clone()
        a.state[p]["exp_avg"] = a.state[p]["exp_avg"].clone()
    train(None, actual, 2, start=2, optimizer=a)
    train(None, expected, 2, start=2, optimizer=b)
    assert_equal(actual, expected)


@pytest.mark.parametrize("transposed", ["parameter", "gradient", "both"])
def test_memory_may_be_in_any_order(transposed, path, device):
    p = nn.Parameter(torch.randn(8, 16, device=device))
    g = torch.randn(8, 16, device=device)
    q = nn.Parameter(p.detach().clone())
    p.data = p.data if transposed == "gradient" else p.data.T.contiguous().T
    p.grad = g if transposed == "parameter" else g.T.contiguous().T
    q.grad = g
    for parameter in (p, q):
        AdamW([parameter]).step()
    assert torch.equal(p, q)


def test_trains_through_a_closure(path, device):
    model = nn.Linear(3, 1).to(device)
    optimizer = AdamW(model.parameters(), lr=0.1)
    x = torch.randn(16, 3, device=device)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_step_without_gradients_does_nothing(path, device):
    optimizer = AdamW(parameters(SMALL, device), max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.grad_norm is None


def test_all_parameters_may_be_empty(path, device):
    p = nn.Parameter(torch.empty(0, 4, device=device))
    p.grad = torch.empty_like(p)
    optimizer = AdamW([p], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    assert optimizer.state[p]["step"].item() == 1


W = nn.Parameter(torch.ones(4))
ARGUMENTS = [
    (([W], -1.0), ValueError, "lr must be at least 0"),
    (([W], float("nan")), ValueError, "lr must be at least 0"),
    (([W], torch.ones(2)), ValueError, "a tensor of one element"),
    (([W], 0.1, (1.0, 0.9)), ValueError, r"betas must be in \[0, 1\)"),
    (([W], 0.1, (0.9, 0.9), -1.0), ValueError, "eps must be at least 0"),
    (([W], 0.1, (0.9, 0.9), 0.1, float("nan")), ValueError, "weight_decay must be at least 0"),
    (([W], "1e-3"), ValueError, "lr must be at least 0, .*, got '1e-3'"),
    (([W], 0.1, 0.9), ValueError, "betas must be two floats, .*, got 0.9"),
    (([W], 0.1, (0.9,)), ValueError, r"betas must be two floats, .*, got \(0.9,\)"),
    (([W], 0.1, (0.9, 0.9, 0.9)), ValueError, "betas must be two floats"),
    (([W], 0.1, ("0.9", "0.9")), ValueError, "betas must be two floats"),
    (([W], 0.1, (0.9, 0.9), "1e-8"), ValueError, "eps must be at least 0, got '1e-8'"),
    (([W], 0.1, (0.9, 0.9), 0.1, None), ValueError, "weight_decay must be at least 0, got None"),
    (([],), ValueError, "empty parameter list"),
    (([nn.Parameter(torch.ones(2).half())],), TypeError, "float32 or bfloat16, got torch.float16"),
    (([nn.Parameter(torch.ones(2).double())],), TypeError, "float32 or bfloat16, got torch.float6"),
    (([nn.Parameter(torch.ones(8)[::2])],), ValueError, "must be dense"),
    (([nn.Parameter(torch.ones(8, device="meta"))],), ValueError, "must hold their own memory"),
    (([{"params": [W]}, {"params": [W]}],), ValueError, "more than one parameter group"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=str)
def test_rejects_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AdamW(*arguments)


@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, float("nan"), "1"])
def test_rejects_max_grad_norm(max_grad_norm):
    with pytest.raises(ValueError, match="max_grad_norm must be positive"):
        AdamW([W], max_grad_norm=max_grad_norm)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_rejects_duplicates():
    with pytest.raises(ValueError, match="must appear once"):
        AdamW([W, W])


def test_rejects_sparse_gradients(path, device):
    table = nn.Embedding(4, 2, sparse=True, device=device)
    table(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(ValueError, match=r"must be dense, .* got a torch\.sparse_coo"):
        AdamW(table.parameters()).step()


def test_rejects_a_dtype_that_changed_later(path, device):
    p = nn.Parameter(torch.ones(2, device=device))
    optimizer = AdamW([p])
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"must be float32 or bfloat16, got torch\.float16"):
        optimizer.step()


def test_rejects_several_devices(path, device):
    p, q = (nn.Parameter(torch.ones(2, device=d)) for d in (device, "meta"))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = AdamW([p])
    optimizer.param_groups[0]["params"].append(q)
    with pytest.raises(ValueError, match="must be on one device"):
        optimizer.step()


def test_rejects_a_shape_that_changed_later(path, device):
    p = nn.Parameter(torch.ones(2, device=device))
    optimizer = train(AdamW, [p], 2, start=1)
    p.data = torch.ones(3, device=device)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"must have the shape \[3\] of its parameter"):
        optimizer.step()


def test_rejects_moments_in_another_order(path, device):
    p = nn.Parameter(torch.randn(8, 16, device=device))
    optimizer = train(AdamW, [p], 2, start=1)
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].T.contiguous().T
    with pytest.raises(ValueError, match=r"strides \(16, 1\), got \[8, 16\] and \(1, 8\)"):
        optimizer.step()


@pytest.mark.parametrize("shared", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("rule", [AdamW, SGD, partial(Muon, use_muon=False)])
def test_rejects_shared_memory(rule, shared, path, device):
    """Nothing is moved twice: neither tied weights that a load has parted, nor by one gradient."""
    p = nn.Parameter(torch.ones(2, device=device))
    q = nn.Parameter(torch.ones_like(p) if shared == "gradient" else p.detach())
    p.grad = torch.ones_like(p)
    q.grad = torch.ones_like(p) if shared == "parameter" else p.grad
    with pytest.raises(ValueError, match=r"must not share an address, .*; pass each tensor once"):
        rule([p, q], lr=0.1).step()
    assert (p == 1).all()


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adagrad])
def test_rejects_the_state_of_another_rule(other, device):
    ps = parameters(SMALL, device)
    state = train(lambda ps: other(ps, lr=0.1), ps, 2).state_dict()
    with pytest.raises(ValueError, match="groups must hold"):
        AdamW(ps).load_state_dict(state)
    state["param_groups"] = AdamW(ps).state_dict()["param_groups"]
    state["state"] = {0: {"sum": torch.ones(5)}} | state["state"]
    with pytest.raises(ValueError, match="the state of a parameter must hold"):
        AdamW(ps).load_state_dict(state)


def test_rejects_the_state_of_another_model(device):
    state = train(AdamW, parameters([(5,)], device), 2).state_dict()
    with pytest.raises(ValueError, match=r"must have the shape \[6\]"):
        AdamW(parameters([(6,)], device)).load_state_dict(state)
