"""Options beyond torch.optim's arguments do what they document, and nothing else."""

import copy
import gc
import io
import weakref
from math import inf, nan

import pytest
import torch
from small_training import (
    OPTIONS,
    PENALTIES,
    SMALL,
    THEIRS,
    assert_equal,
    assert_no_worse,
    bits,
    gradients,
    parameters,
    regularize,
    train,
)
from torch import nn

from tritium.kernels import SGD, Adagrad, Adam, AdamW, Lion, runtime
from tritium.kernels.optimizers import _base, _pointer_table

pytestmark = pytest.mark.usefixtures("pointer_tables")

SHAPES = [(0,), (1,), (8, 16), (5000,)]  # and 2301 elements; 5000 have two chunks
BF16 = torch.bfloat16
EVERY_RULE = pytest.mark.parametrize(("actual", "options"), dict(OPTIONS).items(), ids=str)
READS = ("item", "tolist", "cpu", "__bool__", "__float__", "__int__")


@EVERY_RULE
def test_adds_penalties_and_decays(actual, options, path, device):
    options = options | {"lr": 0.01, "weight_decay": 0.0}
    mine = parameters([(5,), (130,), (8, 16)], device)
    for p in mine:
        p.data.view(-1)[1::3] = 0  # whose sign is 0
    expected, exact = copy.deepcopy(mine), [nn.Parameter(p.detach().double()) for p in mine]
    optimizer = actual(
        [{"params": [p], **kind} for p, kind in zip(mine, PENALTIES, strict=True)], **options
    )
    train(None, mine, 3, optimizer=optimizer)
    for ps in (expected, exact):
        climbing = [{"params": [p], "maximize": i >= 2} for i, p in enumerate(ps)]
        plain = THEIRS[actual](climbing, **options)
        for seed in range(3):
            gradients(ps, seed)
            with torch.no_grad():
                for group, penalties in zip(plain.param_groups, PENALTIES, strict=True):
                    regularize(group, penalties)
            plain.step()
    assert_no_worse(mine, expected, exact)


@pytest.mark.parametrize("actual", THEIRS)
def test_penalties_are_options_of_a_group_that_are_saved(actual, device):
    ps = parameters([(5,)], device)
    groups = [{"params": ps[:1], "l1": 0.5, "decoupled_weight_decay": False}, {"params": ps[1:]}]
    optimizer = actual(groups, l1=0.1, decoupled_weight_decay=True)
    other = actual([{"params": [p]} for p in ps])
    other.load_state_dict(optimizer.state_dict())
    for x in (optimizer, other):
        assert [group["l1"] for group in x.param_groups] == [0.5, 0.1]
        assert [group["decoupled_weight_decay"] for group in x.param_groups] == [False, True]
    decoupled = actual(ps).param_groups[0]["decoupled_weight_decay"]
    assert decoupled == (actual in (AdamW, Lion))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("actual", [AdamW, SGD, Lion])
def test_keeps_a_moving_average(actual, dtype, path, device):
    ps = parameters(SHAPES, device, dtype)
    optimizer = actual(ps, lr=0.1, max_grad_norm=1e3, ema_decay=0.9)
    means = [p.detach().double() for p in ps]
    for seed in range(4):
        train(None, ps, 1, optimizer=optimizer, start=seed)
        for i, p in enumerate(ps):
            if p.grad is not None:
                now = optimizer.state[p].get("master", p).detach().double()
                means[i] += (1 - 0.9) * (now - means[i])
            if "ema" in optimizer.state[p]:
                mean = optimizer.state[p]["ema"]
                assert mean.dtype == torch.float32
                torch.testing.assert_close(mean.double(), means[i], rtol=1e-6, atol=1e-6)
    before = bits(optimizer)
    ps[-1].grad = torch.full_like(ps[-1], nan)
    optimizer.step()
    assert optimizer.skipped.item() == 1
    assert_equal(bits(optimizer), before)


@pytest.mark.parametrize("actual", [AdamW, SGD])
def test_a_moving_average_is_saved_and_begins_at_the_parameter(actual, path, device):
    ps = parameters(SMALL, device)
    first = train(lambda ps: actual(ps, lr=0.1, ema_decay=0.9), ps, 3)
    qs = copy.deepcopy(ps)
    second = actual(qs, ema_decay=0.9)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for x in (first, second):
        train(None, x.param_groups[0]["params"], 3, start=3, optimizer=x)
    assert_equal(bits(first), bits(second))
    third = actual(ps, lr=0.0, weight_decay=0.0, ema_decay=0.9)
    third.load_state_dict(train(lambda ps: THEIRS[actual](ps, lr=0.1), ps, 1, start=1).state_dict())
    third.param_groups[0] |= {"lr": 0.0, "weight_decay": 0.0}
    train(None, ps, 2, start=1, optimizer=third)
    for p in filter(lambda p: p.grad is not None, ps):
        torch.testing.assert_close(third.state[p]["ema"], p.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("bad", [0.0, inf])
def test_zeroes_gradients(bad, grad_dtype, path, device):
    def run(**options):
        torch.manual_seed(0)
        ps = [*parameters(SHAPES, device), nn.Parameter(torch.randn(8, 3, device=device))]
        ps.append(nn.Parameter(torch.randn(3, device=device)))
        optimizer = AdamW(ps, lr=0.1, max_grad_norm=1.0, **options)
        for p in ps[:-1]:
            p.grad_dtype = grad_dtype
            p.grad = torch.randn_like(p).to(grad_dtype)
        ps[-2].grad = ps[-2].grad.T.contiguous().T  # of other strides: copied before it is read
        ps[3].grad[4500] += bad
        kept = [p.grad for p in ps]
        versions = [g._version for g in kept[:-1]]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ps, kept, strict=True))
        assert optimizer.skipped.item() == (bad != 0)
        if options:
            assert all(g._version > v for g, v in zip(kept, versions, strict=False))
        return ps, optimizer

    ps, optimizer = run(zero_grads=True)
    qs, other = run()
    assert_equal(bits(optimizer), bits(other))
    assert ps[-1].grad is None
    assert all(p.grad.eq(0).all() for p in ps[:-1])
    assert all(q.grad.ne(0).any() for q in qs[1:-1])


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("actual", [AdamW, SGD])
def test_records_norms(actual, dtype, max_grad_norm, path, device):
    ps = parameters(SHAPES, device, dtype)
    qs = copy.deepcopy(ps)
    options = {"lr": 0.3, "weight_decay": 0.5, "max_grad_norm": max_grad_norm}
    optimizer, other = actual(ps, record_norms=True, **options), actual(qs, **options)
    assert optimizer.norms() is None
    for seed in (2, 1, 3):  # in the first one the last parameter has no gradient, then all have
        gradients(ps, seed + 1)
        before = [exact(optimizer, p) for p in ps]
        optimizer.step()
        norms = optimizer.norms()
        assert list(map(id, norms.params)) == [id(p) for p in ps if p.grad is not None]
        for i, p in enumerate(norms.params):
            old = next(x for x, q in zip(before, ps, strict=True) if q is p)
            new = exact(optimizer, p)
            slack = 1e-7 * new.norm().item()  # of a parameter, rounded once
            assert norms.grad[i].item() == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
            assert norms.weight[i].item() == pytest.approx(new.norm().item(), rel=1e-6)
            change = (new - old).norm().item()
            assert norms.update[i].item() == pytest.approx(change, rel=1e-5, abs=slack)
        train(None, qs, 1, optimizer=other, start=seed + 1)
    assert other.norms() is None
    assert_equal(bits(optimizer), bits(other))


def exact(optimizer, p):
    return optimizer.state[p].get("master", p).detach().double()


@pytest.mark.parametrize("bad", [inf, nan])
def test_norms_show_where_a_step_was_not_finite(bad, path, device):
    ps = parameters(SHAPES, device)
    optimizer = AdamW(ps, max_grad_norm=1.0, record_norms=True)
    gradients(ps, seed=1)
    optimizer.step()
    weight = optimizer.norms().weight.clone()
    ps[3].grad[4999] = bad
    optimizer.step()
    norms = optimizer.norms()
    assert norms.grad.isfinite().tolist() == [True, True, True, False, True]
    assert norms.update.eq(0).all()
    assert torch.equal(norms.weight, weight)
    plain = AdamW(ps, record_norms=True)
    plain.step()
    assert plain.norms().grad.isfinite().tolist() == [True, True, True, False, True]
    assert plain.norms().update[3].isnan()


RULES_THAT_READ_LR = [(AdamW, {}), (SGD, {"momentum": 0.9}), (Adagrad, {"lr_decay": 0.1})]


@pytest.mark.parametrize(("actual", "options"), RULES_THAT_READ_LR, ids=str)
def test_a_learning_rate_on_the_device_is_read_there(actual, options, monkeypatch, device):
    mine = parameters(SMALL, device)
    expected = copy.deepcopy(mine)
    lr = torch.tensor(0.1, device=device)
    groups = [{"params": ps[:2], "weight_decay": 0.1} for ps in (mine, expected)]
    a = actual([groups[0], {"params": mine[2:]}], lr=lr, **options)
    b = actual([groups[1], {"params": expected[2:]}], lr=0.1, **options)
    gradients(mine, seed=1)
    a.step()
    with monkeypatch.context() as patched:
        for module in (_pointer_table, _base):
            patched.setattr(module, "upload", None)
        for name in READS:
            patched.setattr(torch.Tensor, name, None)
        for value in (0.01, 0.0, 0.5):
            lr.fill_(value)
            a.step()
    for value in (0.1, 0.01, 0.0, 0.5):
        for group in b.param_groups:
            group["lr"] = torch.tensor(value).item()
        train(None, expected, 1, optimizer=b, start=1)
    assert_equal(bits(a), bits(b))
    a.param_groups[1]["lr"] = torch.tensor(0.25, device=device)  # at another address
    b.param_groups[1]["lr"] = 0.25
    for x in (a, b):
        x.step()
    assert_equal(bits(a), bits(b))


def test_a_learning_rate_of_float64_is_refused_by_kernels(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], lr=torch.tensor(0.1, dtype=torch.float64, device=device))
    p.grad = torch.ones_like(p)
    if runtime.REFERENCE:
        optimizer.step()
        assert p.ne(1).all()
    else:
        with pytest.raises(
            TypeError, match=r"lr on the device must be float32, got torch\.float64"
        ):
            optimizer.step()


@pytest.mark.parametrize(
    ("actual", "options"),
    [(Adam, {}), (Adagrad, {"lr_decay": 1e-9}), (SGD, {"momentum": 0.9, "dampening": 0.5})],
    ids=str,
)
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**31, 2**33])
def test_counts_of_any_size(count, actual, options, path, device):
    mine = parameters(SMALL, device)
    state = train(lambda ps: THEIRS[actual](ps, lr=0.1, **options), mine, 2, start=1).state_dict()
    expected, exact = copy.deepcopy(mine), [nn.Parameter(p.detach().double()) for p in mine]
    for ps, make in ((mine, actual), (expected, THEIRS[actual]), (exact, THEIRS[actual])):
        for own in state["state"].values():
            if actual is not SGD:
                own["step"] = torch.tensor(float(count))
        optimizer = make(ps, lr=0.1, **options)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(None, ps, 2, optimizer=optimizer, start=1)
        steps = [own["step"].item() for own in optimizer.state.values() if "step" in own]
        assert actual is SGD or all(count <= step <= count + 2 for step in steps)
    assert_no_worse(mine, expected, exact)


@pytest.mark.parametrize("count", [0, 2**24, 2**31, 2**32 - 2**12])
def test_random_bits_of_counts_of_any_size(count, monkeypatch, device):
    # 1 - 2^-10 is exact in float32, so that both paths round the same number.
    results = []
    for reference in (False, True):
        monkeypatch.setattr(runtime, "REFERENCE", reference)
        p = nn.Parameter(torch.ones(5000, dtype=BF16, device=device))
        p.grad = torch.full_like(p, 2**-10)
        optimizer = SGD([p], lr=1.0, master=None)
        state = {0: {"step": torch.tensor(float(count))}}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
    assert results[0].double().mean().item() == pytest.approx(1 - 2**-10, abs=2e-4)


@pytest.mark.parametrize("actual", THEIRS)
def test_gradients_may_be_bfloat16(actual, path, device):
    mine = parameters(SHAPES, device)
    expected = copy.deepcopy(mine)
    a, b = (actual(ps, lr=0.1, max_grad_norm=1.0) for ps in (mine, expected))
    for i, p in enumerate(mine):
        p.grad_dtype = torch.float32 if i == 2 else BF16  # of one model
    for seed in (1, 2):
        gradients(expected, seed)
        for p, q in zip(mine, expected, strict=True):
            p.grad = None if q.grad is None else q.grad.to(p.grad_dtype)
            q.grad = None if q.grad is None else p.grad.float()
        a.step()
        b.step()
    assert_equal(bits(a), bits(b))


def test_gradients_of_float16_are_refused(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    p.grad_dtype, p.grad = torch.float16, torch.ones(4, dtype=torch.float16, device=device)
    with pytest.raises(TypeError, match="gradients must be float32 or bfloat16"):
        AdamW([p]).step()


def test_step_releases_gradients(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], max_grad_norm=1.0, record_norms=True)
    p.grad = torch.ones_like(p)
    gone = weakref.ref(p.grad)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert gone() is None


def test_norms_are_paused(path, device):
    ps = parameters(SMALL, device)
    optimizer = train(lambda ps: AdamW(ps, max_grad_norm=1.0, record_norms=True), ps, 1)
    before = optimizer.norms()
    optimizer.records_norms = False
    train(None, ps, 1, start=1, optimizer=optimizer)
    ps[0].grad.fill_(torch.inf)
    optimizer.step()
    for x, y in zip(optimizer.norms()[1:], before[1:], strict=True):
        assert torch.equal(x, y)
    optimizer.records_norms = True
    gradients(ps, seed=1)
    optimizer.step()
    grads = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in optimizer.norms().params]
    torch.testing.assert_close(list(optimizer.norms().grad.unbind()), grads)


@EVERY_RULE
def test_everything_at_once_is_never_read_back(actual, options, monkeypatch, device):
    ps = [*parameters(SMALL, device), *parameters(SMALL, device, BF16)]
    gradients(ps, seed=1)
    options = options | {"lr": torch.tensor(1e-3, device=device)}
    optimizer = actual(
        ps, **options, l1=0.1, max_grad_norm=1.0, master=None, state_dtype=BF16, ema_decay=0.9,
        zero_grads=True, record_norms=True,
    )  # fmt: skip
    optimizer.step()
    for module in (_pointer_table, _base):
        monkeypatch.setattr(module, "upload", None)
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, None)
    optimizer.step()
    optimizer.norms()


BAD = [
    ({"nesterow": True}, TypeError, r"options must be among \[.*\], got \['nesterow'\]"),
    ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
    ({"ema_decay": nan}, ValueError, r"ema_decay must be in \[0, 1\)"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^32\)"),
    ({"master": "half"}, ValueError, "master must be one of"),
    ({"state_dtype": torch.float16}, ValueError, "state_dtype must be one of"),
    ({"l1": -0.1}, ValueError, "l1 must be at least 0"),
    ({"l1": nan}, ValueError, "l1 must be at least 0"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
]


@pytest.mark.parametrize("actual", THEIRS)
@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=str)
def test_rejects_options(options, error, message, actual):
    with pytest.raises(error, match=f"{actual.__name__}: {message}"):
        actual([nn.Parameter(torch.ones(4))], **options)


def test_rejects_a_penalty_of_a_group(device):
    with pytest.raises(ValueError, match="l1 must be at least 0, got -1"):
        AdamW([{"params": parameters([], device), "l1": -1.0}])
