"""AdamW is torch's at rounding level, clips as torch does, and skips what is not finite."""

import copy

import pytest
import torch
from small_training import (
    SMALL,
    assert_equal,
    assert_no_worse,
    bits,
    gradients,
    parameters,
    programs_in,
    train,
)
from torch import nn

from tritium.kernels.optimizers.adamw import AdamW

pytestmark = pytest.mark.usefixtures("pointer_tables")

SIZES = [(0,), (1,), (3,), (127,), (4097,), (16385,), (8, 16)]
OPTIONS = [
    {},
    {"maximize": True, "weight_decay": 0.3},
    {"betas": (0.0, 0.5), "weight_decay": 0.0},
    {"betas": (0.95, 0.9999), "eps": 1e-3},
    {"lr": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_torch(options, path, device):
    check_against_torch(SMALL, 30, options, device)


def test_matches_torch_at_every_size(path, device):
    check_against_torch(SIZES, 50, {"lr": 1e-2}, device)


def check_against_torch(shapes, steps, options, device, max_grad_norm=None):
    actual = parameters(shapes, device)
    torch_result, exact = copy.deepcopy(actual), [nn.Parameter(p.detach().double()) for p in actual]
    train(lambda ps: AdamW(ps, max_grad_norm=max_grad_norm, **options), actual, steps)

    def torch_adamw(ps):
        return torch.optim.AdamW(ps, **options)

    train(torch_adamw, torch_result, steps, clip=max_grad_norm)
    train(torch_adamw, exact, steps, clip=max_grad_norm)
    assert_no_worse(actual, torch_result, exact)


@pytest.mark.parametrize("max_grad_norm", [1e-3, 50.0, 1e9])
def test_clips_as_torch_does(max_grad_norm, path, device):
    check_against_torch(SMALL, 20, {}, device, max_grad_norm)


def test_groups_keep_their_own_options(path, device):
    def groups(ps):
        slow = {"params": ps[1:2], "lr": 1e-4, "betas": (0.5, 0.6), "eps": 0.1}
        return [{"params": ps[:1]}, slow, {"params": []}, {"params": ps[2:], "weight_decay": 0.9}]

    actual = parameters(SMALL, device)
    torch_result, exact = copy.deepcopy(actual), [nn.Parameter(p.detach().double()) for p in actual]
    train(lambda ps: AdamW(groups(ps)), actual, 20)
    for ps in (torch_result, exact):
        train(lambda ps: torch.optim.AdamW(groups(ps)), ps, 20)
    assert_no_worse(actual, torch_result, exact)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("step", [0, 1, 9, 999, 123456, 2**24 - 1])
def test_bias_correction_is_exact(step, beta, path, device):
    # From moments of zero, a gradient of one moves a parameter by this much, whatever the step.
    p = nn.Parameter(torch.zeros(1, device=device))
    optimizer = AdamW([p], lr=1.0, betas=(beta, beta), eps=1e-12)
    p.grad = torch.zeros(1, device=device)
    optimizer.step()
    optimizer.state[p]["step"].fill_(step)
    p.grad.fill_(1.0)
    optimizer.step()
    t = step + 1
    expected = -(1 - beta) / (1 - beta**t) / ((1 - beta) / (1 - beta**t)) ** 0.5
    assert p.item() == pytest.approx(expected, rel=1e-6)
    assert optimizer.state[p]["step"].item() == t


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_skips_a_step_that_is_not_finite(bad, path, device):
    ps = parameters(SMALL, device)
    optimizer = train(lambda ps: AdamW(ps, max_grad_norm=1.0), ps, 3)
    before = [x.clone() for x in bits(optimizer)]
    gradients(ps, seed=3)
    ps[1].grad[100] = bad
    optimizer.step()
    assert_equal(bits(optimizer), before)
    assert not optimizer.grad_norm.isfinite()
    assert optimizer.skipped.item() == 1
    gradients(ps, seed=4)
    optimizer.step()
    assert optimizer.grad_norm.isfinite()
    assert optimizer.skipped.item() == 1
    assert not torch.equal(ps[1], before[1])


def test_skips_even_the_first_step(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], max_grad_norm=1.0)
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert p.eq(1).all()
    assert optimizer.state[p]["step"].item() == 0


def test_reports_the_norm_and_leaves_gradients_alone(path, device):
    ps = parameters(SMALL, device)
    optimizer = AdamW(ps, max_grad_norm=0.1)
    assert optimizer.grad_norm is None
    gradients(ps, seed=1)
    before = [p.grad.clone() for p in ps]
    optimizer.step()
    norm = torch.cat([g.flatten() for g in before]).double().norm()
    assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert optimizer.grad_norm.dtype == torch.float32
    assert_equal([p.grad for p in ps], before)
    first = optimizer.grad_norm
    optimizer.step()
    assert optimizer.grad_norm is not first


def test_counts_as_a_change_in_place(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_is_bitwise_repeatable(path, device):
    runs = []
    for order in ("forward", "reverse", "shuffled"):
        torch.manual_seed(0)
        ps = parameters(SIZES, device)
        with programs_in(order):
            runs.append(bits(train(lambda ps: AdamW(ps, max_grad_norm=1.0), ps, 3)))
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


def test_learning_rate_may_be_a_tensor(path, device):
    actual = parameters(SMALL, device)
    torch_result = copy.deepcopy(actual)
    lr = torch.tensor(0.1, device=device)
    a, b = AdamW(actual, lr=lr), AdamW(torch_result, lr=0.1)
    for value in (0.1, 0.01, 0.001):
        lr.fill_(value)
        b.param_groups[0]["lr"] = lr.item()
        train(None, actual, 1, optimizer=a, start=1)
        train(None, torch_result, 1, optimizer=b, start=1)
    assert_equal(actual, torch_result)


def test_follows_a_schedule(path, device):
    actual = parameters(SMALL, device)
    torch_result, exact = copy.deepcopy(actual), [nn.Parameter(p.detach().double()) for p in actual]
    for ps, make in (
        (actual, AdamW),
        (torch_result, torch.optim.AdamW),
        (exact, torch.optim.AdamW),
    ):
        optimizer = make(ps, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for seed in range(5):
            train(None, ps, 1, optimizer=optimizer, start=seed)
            schedule.step()
    assert_no_worse(actual, torch_result, exact)
