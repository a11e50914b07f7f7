"""Every update rule is torch's at rounding level: alone, in groups, clipped, saved and loaded."""

import copy
import io

import pytest
import torch
from small_training import (
    MOMENTUM,
    OPTIONS,
    THEIRS,
    assert_equal,
    assert_no_worse,
    bits,
    gradients,
    model_and_batch,
    parameters,
    train,
)
from torch import nn

from tritium.kernels import SGD, Adagrad, Adam, AdamW, Lion, Muon, RMSprop, runtime
from tritium.kernels.optimizers import _step_kernels

pytestmark = pytest.mark.usefixtures("pointer_tables")

SHAPES = [(5,), (8, 16)]
BY_OPTIONS = pytest.mark.parametrize(("actual", "options"), OPTIONS, ids=str)


def copies(ps):
    return copy.deepcopy(ps), [nn.Parameter(p.detach().double()) for p in ps]


# With the last options of each rule, which have the most in them.
@pytest.mark.parametrize(("actual", "options"), dict(OPTIONS).items(), ids=str)
def test_follows_torch_for_many_steps_of_a_model(actual, options, path, device):
    # All three see the gradients of torch's model, so that differences do not feed on themselves.
    model, batch = model_and_batch(device)
    expected = list(model.parameters())
    mine, exact = copies(expected)
    optimizers = [
        actual(mine, **options),
        *(THEIRS[actual](ps, **options) for ps in (expected, exact)),
    ]
    losses = []
    interpreted = runtime.CPU_KERNELS and not runtime.REFERENCE
    for _ in range(60 if interpreted else 200):  # kernels equal references elsewhere, step by step
        model.zero_grad()
        losses.append(batch())
        losses[-1].backward()
        for p, q, e in zip(expected, mine, exact, strict=True):
            q.grad, e.grad = p.grad, p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]
    assert_no_worse(mine, expected, exact)


@pytest.mark.parametrize(("actual", "options"), dict(OPTIONS).items(), ids=str)
def test_losses_do_not_notice_a_reload(actual, options, path, device):
    def losses(*segments):
        torch.manual_seed(0)
        model, batch = model_and_batch(device)
        saved, seen = None, []
        for cls, steps in segments:
            optimizer = cls(model.parameters(), **options)
            if saved is not None:
                optimizer.load_state_dict(copy.deepcopy(saved))
            for _ in range(steps):
                model.zero_grad()
                seen.append(batch())
                seen[-1].backward()
                optimizer.step()
            saved = optimizer.state_dict()
        return [loss.item() for loss in seen]

    expected = THEIRS[actual]
    whole = losses((actual, 6))
    assert whole[-1] < whole[0]
    assert losses((actual, 3), (expected, 0), (actual, 3)) == whole
    whole = pytest.approx(losses((expected, 6)), rel=1e-5)
    assert losses((actual, 3), (expected, 3)) == whole
    assert losses((expected, 3), (actual, 3)) == whole


@BY_OPTIONS
def test_clips_as_torch_does(actual, options, path, device):
    mine = parameters(SHAPES, device)
    expected, exact = copies(mine)
    optimizer = train(lambda ps: actual(ps, max_grad_norm=0.01, **options), mine, 4)
    for ps in (expected, exact):
        train(lambda ps: THEIRS[actual](ps, **options), ps, 4, clip=0.01)
    assert_no_worse(mine, expected, exact)
    assert optimizer.grad_norm is not None


@BY_OPTIONS
def test_skips_a_step_that_is_not_finite(actual, options, path, device):
    # The second one as well, and even the first, with which some rules begin differently.
    ps = parameters(SHAPES, device)
    qs = copy.deepcopy(ps)
    a, b = (actual(x, max_grad_norm=1.0, **options) for x in (ps, qs))
    for seed in (1, 2):
        gradients(ps, seed)
        ps[1].grad[0] = float("nan")
        a.step()
        train(None, ps, 1, start=seed, optimizer=a)
        train(None, qs, 1, start=seed, optimizer=b)
    assert a.skipped.item() == 2
    assert_equal(bits(a), bits(b))


@BY_OPTIONS
@pytest.mark.parametrize(
    ("first", "second"),
    [("tritium", "tritium"), ("tritium", "torch"), ("torch", "tritium")],
)
def test_state_dict_is_torchs(first, second, actual, options, device):
    def make(whose):
        cls = actual if whose == "tritium" else THEIRS[actual]
        return lambda ps: cls(ps, **options)

    mine = parameters(SHAPES, device)
    expected, exact = copies(mine)
    names = [
        {n: {*s} for n, s in train(make("torch"), ps, 6).state_dict()["state"].items()}
        for ps in (expected, exact)
    ]
    file = io.BytesIO()
    torch.save(train(make(first), mine, 3).state_dict(), file)
    file.seek(0)
    optimizer = make(second)(mine)
    optimizer.load_state_dict(torch.load(file))
    train(None, mine, 3, start=3, optimizer=optimizer)
    assert_no_worse(mine, expected, exact)
    assert {n: {*s} for n, s in optimizer.state_dict()["state"].items()} == names[0]


@pytest.mark.parametrize("actual", THEIRS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: loaded(x)], ids=["copy", "load"])
def test_copies_continue_alike(copied, actual, path, device):
    options = {"momentum": 0.9, "dampening": 0.4} if actual is SGD else {}
    optimizer = train(lambda ps: actual(ps, lr=0.01, **options), parameters(SHAPES, device), 3)
    twin = copied(optimizer)
    for x in (optimizer, twin):
        train(None, x.param_groups[0]["params"], 3, start=3, optimizer=x)
    for a, b in zip(*(x.param_groups[0]["params"] for x in (optimizer, twin)), strict=True):
        assert torch.equal(a, b)


def loaded(optimizer):
    ps = copy.deepcopy(optimizer.param_groups[0]["params"])
    twin = type(optimizer)(ps, lr=1.0)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin


GROUPS = {
    SGD: [{"momentum": 0.9}, {}, {"momentum": 0.5, "nesterov": True}, {"maximize": True}],
    RMSprop: [{"centered": True}, {}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    Adam: [{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"lr": 0.1}, {"maximize": True}],
    Adagrad: [{"lr_decay": 0.5}, {"eps": 0.1}, {"lr": 0.1}, {"maximize": True}],
    Lion: [{"betas": (0.5, 0.6)}, {"weight_decay": 0.5}, {"lr": 0.1}, {"maximize": True}],
}


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("actual", GROUPS)
def test_groups_keep_their_own_options(actual, max_grad_norm, path, device):
    def groups(ps):
        own = zip(ps, GROUPS[actual], strict=True)
        return [{"params": []}, *({"params": [p], **options} for p, options in own)]

    mine = parameters([(130,), (7,), (8, 16)], device)
    expected, exact = copies(mine)
    train(lambda ps: actual(groups(ps), lr=0.01, max_grad_norm=max_grad_norm), mine, 6)
    for ps in (expected, exact):
        train(lambda ps: THEIRS[actual](groups(ps), lr=0.01), ps, 6, clip=max_grad_norm)
    assert_no_worse(mine, expected, exact)


def test_every_kind_of_state_is_updated_in_one_launch(monkeypatch, device):
    launches = []

    def launch(grid, tensors, numbers, constants, **options):
        before = len(tensors) + len(numbers)
        names = _step_kernels._optimizer_update_kernel.arg_names[before:]
        launches.append(dict(zip(names, constants, strict=True))["FORMATS"])

    monkeypatch.setattr(_step_kernels, "_update", launch)
    ps = parameters([(7,), *SHAPES], device)
    gradients(ps, seed=1)
    own = zip(ps, GROUPS[RMSprop], strict=True)
    RMSprop([{"params": [p], **options} for p, options in own]).step()
    assert len(launches) == 1
    assert len(set(launches[0])) == 4


@pytest.mark.parametrize(
    ("actual", "options", "names"),
    [
        (SGD, {}, []),
        (SGD, {"momentum": 0.9, "dampening": 0.4}, ["momentum_buffer"]),
        (RMSprop, {}, ["step", "square_avg"]),
        (RMSprop, {"momentum": 0.9}, ["step", "square_avg", "momentum_buffer"]),
        (RMSprop, {"centered": True}, ["step", "square_avg", "grad_avg"]),
        (Adam, {"amsgrad": True}, ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (Lion, {}, ["exp_avg"]),
    ],
    ids=str,
)
def test_keeps_no_state_that_it_does_not_need(actual, options, names, path, device):
    ps = parameters(SHAPES, device)
    optimizer = train(lambda ps: actual(ps, lr=0.1, **options), ps, 3)
    assert optimizer.state.keys() == ({*ps} if names else set())
    assert all({*state} == {*names} for state in optimizer.state.values())


def test_momentum_may_begin_later(path, device):
    mine = parameters(SHAPES, device)
    expected, exact = copies(mine)
    for ps, make in ((mine, SGD), (expected, torch.optim.SGD), (exact, torch.optim.SGD)):
        optimizer = train(lambda ps, make=make: make(ps, lr=0.1, dampening=0.5), ps, 3)
        optimizer.param_groups[0]["momentum"] = 0.9
        train(None, ps, 3, start=3, optimizer=optimizer)
    assert_no_worse(mine, expected, exact)


def test_momentum_that_no_step_reached_is_not_saved(path, device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = SGD([p], momentum=0.9, dampening=0.5, max_grad_norm=1.0)
    p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"] == {0: {"momentum_buffer": None}}
    other = SGD([p], momentum=0.9, lr=1.0)
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    p.grad = torch.ones_like(p)
    other.step()
    assert other.state_dict()["state"][0]["momentum_buffer"].eq(1).all()


def test_adagrad_has_its_state_from_the_start(device):
    ps = parameters(SHAPES, device)
    a, b = (
        x([{"params": ps}], initial_accumulator_value=0.3).state_dict()["state"]
        for x in (Adagrad, torch.optim.Adagrad)
    )
    assert a.keys() == b.keys()
    for n in a:
        assert_equal([a[n]["step"].cpu(), a[n]["sum"]], [b[n]["step"].cpu(), b[n]["sum"]])


def test_variance_that_rounds_below_zero_counts_as_zero(path, device):
    p = nn.Parameter(torch.zeros(8, device=device))
    optimizer = RMSprop([p], lr=1.0, eps=0.5, centered=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["square_avg"].fill_(1 - 1e-6)
    optimizer.state[p]["grad_avg"].fill_(1.0)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - p, torch.full_like(p, 2.0))


def test_lion_does_not_move_without_a_gradient(path, device):
    p = nn.Parameter(torch.ones(300, device=device))
    p.grad = torch.zeros_like(p)
    Lion([p], lr=0.1).step()
    assert p.eq(1).all()


W = nn.Parameter(torch.ones(4))
ARGUMENTS = [
    (Adam, {"betas": (1.0, 0.9)}, r"Adam: betas must be in \[0, 1\)"),
    (Adam, {"eps": -1.0}, "Adam: eps must be at least 0"),
    (Adam, {"max_grad_norm": 0.0}, "Adam: max_grad_norm must be positive"),
    (SGD, {"lr": -1.0}, "SGD: lr must be at least 0"),
    (SGD, {"momentum": -0.1}, "SGD: momentum must be at least 0"),
    (SGD, {"nesterov": True}, "SGD: nesterov must have momentum"),
    (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "SGD: nesterov must have"),
    (SGD, {"dampening": "0"}, "SGD: dampening must be a number, got '0'"),
    (Muon, {"momentum": "0.9"}, r"Muon: momentum must be in \[0, 1\), got '0.9'"),
    (Muon, {"ns_steps": 2.5}, "Muon: ns_steps must be at least 1, got 2.5"),
    (Lion, {"seed": "1"}, r"Lion: seed must be in \[0, 2\^32\), got '1'"),
    (Lion, {"ema_decay": "0.9"}, r"Lion: ema_decay must be in \[0, 1\), got '0.9'"),
    (RMSprop, {"alpha": float("nan")}, "RMSprop: alpha must be at least 0"),
    (RMSprop, {"momentum": -1.0}, "RMSprop: momentum must be at least 0"),
    (Adagrad, {"lr_decay": -1.0}, "Adagrad: lr_decay must be at least 0"),
    (Adagrad, {"initial_accumulator_value": -1.0}, "Adagrad: initial_accumulator_value must be"),
    (Lion, {"betas": (0.9, 1.0)}, r"Lion: betas must be in \[0, 1\)"),
    (Lion, {"weight_decay": -1.0}, "Lion: weight_decay must be at least 0"),
]


@pytest.mark.parametrize(("actual", "options", "message"), ARGUMENTS, ids=str)
def test_rejects_arguments(actual, options, message):
    with pytest.raises(ValueError, match=message):
        actual([W], **options)


LIONS = ("foreach", "capturable", "differentiable", "fused")  # of no class of torch's


@pytest.mark.parametrize("actual", THEIRS)
def test_takes_the_arguments_of_torch(actual):
    expected = THEIRS[actual]([W]).param_groups[0]
    mine = actual([W]).param_groups[0]
    own = {"params", "l1", "decoupled_weight_decay", *(LIONS if actual is Lion else ())}
    for name in mine.keys() - own - ({"fused"} if actual is RMSprop else set()):
        assert expected[name] == mine[name]


@pytest.mark.parametrize("actual", THEIRS)
def test_rejects_the_state_of_another_rule(actual, device):
    ps = parameters(SHAPES, device)
    options = MOMENTUM if actual is SGD else {}
    for other in THEIRS.keys() - {actual, *({Adam, AdamW} if actual in (Adam, AdamW) else ())}:
        state = train(THEIRS[other], ps, 2).state_dict()
        with pytest.raises(ValueError, match="must hold"):
            actual(ps, **options).load_state_dict(state)
        state["param_groups"] = actual(ps, **options).state_dict()["param_groups"]
        state["state"] = {0: {"total": torch.ones(5)}}
        with pytest.raises(ValueError, match="the state of a parameter must hold"):
            actual(ps, **options).load_state_dict(state)
