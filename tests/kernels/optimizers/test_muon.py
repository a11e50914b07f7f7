"""Muon's step is its formula's at rounding level, and a matrix in a stack is as one alone.

The formula is written here once more, one matrix at a time, in float64; as torch.optim.Muon rounds
it, in bfloat16; and in float32. A step errs at most twice as much as that.
"""

import copy
import io
from math import inf, nan, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import assert_equal, assert_no_worse, bits
from torch import nn

from tritium.kernels import AdamW, Muon, runtime
from tritium.kernels.optimizers import _matrices, _orthogonalize
from tritium.kernels.optimizers._orthogonalize import (
    POLAR_EXPRESS,
    QUINTIC,
    orthogonalize_reference,
    triples,
)

pytestmark = pytest.mark.usefixtures("pointer_tables")

# Of one or two singular values a single rounding decides how far the iteration carries an error.
SHAPES = [(8, 8), (36, 18), (3, 24)]


def newton_schulz(u, group, dtype):
    """Orthogonalize one matrix, products rounded to `dtype`."""
    x = u.to(dtype)
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=group["eps"])
    for a, b, c in triples(group["ns_coefficients"], group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(u) > u.shape[1] else x


class Plain:
    """Muon of matrices, one after another; in float64 if they are, else products in `dtype`."""

    def __init__(self, groups, dtype, clip=None, cautious=False):
        self.groups, self.dtype, self.clip, self.cautious = groups, dtype, clip, cautious
        self.state = {}

    @torch.no_grad()
    def step(self):
        ps = [p for group in self.groups for p in group["params"]]
        if self.clip is not None:
            nn.utils.clip_grad_norm_(ps, self.clip)
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)

    def update(self, p, group):
        wide = torch.promote_types(p.dtype, torch.float32)
        m, v = self.state.setdefault(
            p, (torch.zeros_like(p, dtype=wide), p.new_zeros(len(p), 1, dtype=wide))
        )
        g = p.grad.to(wide) * (-1 if group["maximize"] else 1)
        m += (1 - group["momentum"]) * (g - m)
        u = g + group["momentum"] * (m - g) if group["nesterov"] else m
        rows = group["splits"] or [len(p)]
        os = []
        for part, v_part in zip(u.split(rows), v.split(rows), strict=True):
            o = newton_schulz(
                part, group, torch.float64 if p.dtype == torch.float64 else self.dtype
            )
            o = o.to(wide)
            if group["beta2"] is not None:
                v_part += (1 - group["beta2"]) * ((o * o).mean(1, keepdim=True) - v_part)
                y = o / v_part.clamp(min=1e-20).sqrt()
                o = y * o.norm() / y.norm().clamp(min=1e-20)
                o = o if p.dtype == torch.float64 else o.to(self.dtype).to(wide)
            R, C = part.shape
            scale = sqrt(max(1, R / C))
            if group["adjust_lr_fn"] == "match_rms_adamw":
                scale = 0.2 * sqrt(max(R, C))
            os.append(o * scale)
        o = torch.cat(os)
        decayed = ((o * p >= 0) if self.cautious else 1.0) * p.to(wide)
        p -= group["lr"] * (group["weight_decay"] * decayed + o)


def matrices(shapes, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def gradients(ps, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        size = 10.0 ** torch.randint(-3, 2, (), generator=generator).item()
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p)


def follow(groups_of, options, device, steps=2, shapes=SHAPES, **plain):
    """Take steps by Muon, by the formula in lower precision, and by it in float64."""
    mine = matrices(shapes, device)
    expected, exact = copy.deepcopy(mine), [nn.Parameter(p.detach().double()) for p in mine]
    optimizer = Muon(groups_of(mine), **options)
    rounded = torch.float32 if products(device) else torch.bfloat16
    theirs = []
    for ps in (expected, exact):
        filled = [
            {k: x for k, x in own.items() if k != "params"} | {"params": given["params"]}
            for own, given in zip(optimizer.param_groups, groups_of(ps), strict=True)
        ]
        theirs.append(Plain(filled, rounded, **plain))
    for seed in range(steps):
        for ps, step in ((mine, optimizer), (expected, theirs[0]), (exact, theirs[1])):
            gradients(ps, seed)
            step.step()
    return optimizer, mine, expected, exact


def products(device):
    """Whether products are in float32: those of the reference, on a CPU."""
    return device == "cpu" and (runtime.REFERENCE or not runtime.CPU_KERNELS)


def test_polar_express_is_nearest_to_one_step_by_step():
    # Of the best odd polynomial of degree 5 the error has its largest size four times, with signs
    # in turn. The first three steps stay off it on purpose, and err alike at both ends.
    low, high = 1e-3, 1.0
    for i, (a, b, c) in enumerate(_orthogonalize._OPTIMAL[:6]):
        x = np.linspace(low, high, 100_001)
        y = a * x + b * x**3 + c * x**5
        inner = np.flatnonzero(np.diff(np.sign(np.diff(y)))) + 1
        errors = np.array([y[0], *y[inner], y[-1]]) - 1
        assert len(errors) == 4
        assert errors[-1] == pytest.approx(-errors[0], rel=1e-6)
        assert errors.max() == pytest.approx(errors[1], rel=1e-6)
        if i >= 3:
            assert np.abs(errors) == pytest.approx(np.abs(errors[0]), rel=1e-5)
            assert list(np.sign(errors)) == [-1, 1, -1, 1]
        low, high = y.min(), y.max()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from(["q", "p"]))
def test_maps_singular_values_and_keeps_vectors(R, C, N, kind):
    coefficients = triples({"q": "quintic", "p": "polar_express"}[kind], 5)
    u = torch.randn(N, R, C, dtype=torch.float64)
    o = orthogonalize_reference(u, coefficients, 1e-7, torch.float64)
    left, x, right = torch.linalg.svd(u, full_matrices=False)
    x = x / x.square().sum(1, keepdim=True).sqrt()
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(o, left * x[:, None] @ right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("quintic", 0.67, 1.21), ("polar_express", 0.85, 1.13)]
)
def test_five_steps_bring_singular_values_near_one(name, low, high):
    x = torch.logspace(-2, 0, 1000, dtype=torch.float64)
    for a, b, c in triples(name, 5):
        x = a * x + b * x**3 + c * x**5
    assert low < x.min()
    assert x.max() < high


def test_named_coefficients_serve_every_step():
    assert triples("quintic", 3) == (QUINTIC,) * 3
    assert triples("polar_express", 9) == (*POLAR_EXPRESS, POLAR_EXPRESS[-1])
    assert triples((1, 2, 3), 2) == ((1.0, 2.0, 3.0),) * 2
    assert triples([(1, 2, 3), (4, 5, 6)], 3) == ((1, 2, 3), (4, 5, 6), (4, 5, 6))


OPTIONS = [
    {},
    {"ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw", "beta2": 0.9},
    {"nesterov": False, "momentum": 0.5, "maximize": True, "ns_steps": 3},
    {"ns_coefficients": [(3.0, -3.0, 1.0), (1.5, -0.5, 0.0)], "beta2": 0.0, "weight_decay": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_follows_the_formula(options, clip, path, device):
    options = options | {"lr": 0.05}
    clipped = {} if clip is None else {"max_grad_norm": clip}
    optimizer, *ps = follow(lambda ps: [{"params": ps}], options | clipped, device, clip=clip)
    assert_no_worse(*ps)
    assert (optimizer.grad_norm is None) == (clip is None)


@pytest.mark.parametrize("size", [0.0, 1e-9])
@pytest.mark.parametrize("beta2", [None, 0.9])
def test_a_gradient_below_the_least_norm_moves_little(size, beta2, path, device):
    ps = matrices([(8, 8)], device)
    twins = [nn.Parameter(ps[0].detach().double())]
    optimizer = Muon(ps, lr=0.05, weight_decay=0.5, eps=1e-2, beta2=beta2)
    exact = Plain([optimizer.param_groups[0] | {"params": twins}], torch.float64)
    ps[0].grad = size * torch.ones_like(ps[0])
    twins[0].grad = ps[0].grad.double()
    optimizer.step()
    exact.step()
    torch.testing.assert_close(ps[0].detach().double(), twins[0].detach(), rtol=0.0, atol=1e-4)


def test_groups_keep_their_own_options(path, device):
    def groups(ps):
        own = [
            {"lr": 0.1},
            {"splits": (8, 8, 8), "beta2": 0.5},
            {"splits": (3, 5)},
            {"momentum": 0.1},
        ]
        return [{"params": [p], **options} for p, options in zip(ps, own, strict=False)]

    shapes = [(8, 8), (24, 8), (8, 20), (9, 7)]
    assert_no_worse(*follow(groups, {"lr": 0.05}, device, shapes=shapes)[1:])


def test_decays_cautiously(path, device):
    options = {"lr": 0.05, "weight_decay": 0.5, "cautious_decay": True}
    assert_no_worse(
        *follow(lambda ps: [{"params": ps}], options, device, steps=1, cautious=True)[1:]
    )


def test_second_moments_of_rows_are_means_over_their_elements(path, device):
    # Rows are divided by them and the norm is restored: their scale is seen in the state alone.
    ps = matrices([(20, 36), (36, 8)], device)
    twins = [nn.Parameter(p.detach().double()) for p in ps]
    optimizer = Muon(ps, beta2=0.9)
    exact = Plain([optimizer.param_groups[0] | {"params": twins}], torch.float64)
    for seed in range(2):
        for each, step in ((ps, optimizer), (twins, exact)):
            gradients(each, seed)
            step.step()
    for p, twin in zip(ps, twins, strict=True):
        actual, expected = optimizer.state[p]["row_second_moment"], exact.state[twin][1]
        torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_errs_no_more_than_torch_does(adjust_lr_fn, path, device):
    options = {"lr": 0.05, "adjust_lr_fn": adjust_lr_fn}
    _, mine, expected, exact = follow(lambda ps: [{"params": ps}], options, device)
    expected = matrices(SHAPES, device)
    theirs = torch.optim.Muon(expected, **options)
    for seed in range(2):
        gradients(expected, seed)
        theirs.step()
    assert_no_worse(mine, expected, exact)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 30), st.booleans())
def test_a_stack_is_updated_as_its_matrices_alone(rows, columns, normalizes):
    beta2 = 0.9 if normalizes else None
    stack = nn.Parameter(torch.randn(sum(rows), columns))
    alone = [nn.Parameter(x.clone()) for x in stack.detach().split(rows)]
    a = Muon([stack], splits=rows, beta2=beta2, lr=0.1)
    b = Muon(alone, beta2=beta2, lr=0.1)
    for _ in range(2):
        stack.grad = torch.randn_like(stack)
        for p, g in zip(alone, stack.grad.split(rows), strict=True):
            p.grad = g.clone()
        with runtime.references("Muon"):  # the kernels, far slower here, take stacks above
            a.step()
            b.step()
    torch.testing.assert_close(stack.detach(), torch.cat([p.detach() for p in alone]))


def mixed(device, **options):
    """An optimizer of matrices, of a stack of two, and of what AdamW updates."""
    first, second, *others = matrices([(8, 24), (24, 8), (5, 3), (7,)], device)
    groups = [
        {"params": [first]},
        {"params": [second], "splits": (8, 16), "beta2": 0.9},
        {"params": others, "use_muon": False, "lr": 0.01, "weight_decay": 0.2},
    ]
    return Muon(groups, lr=0.05, **options), [first, second, *others]


def steps(optimizer, seeds):
    for seed in seeds:
        gradients([p for group in optimizer.param_groups for p in group["params"]], seed)
        optimizer.step()


@pytest.mark.parametrize("flags", [{}, {"cautious_decay": True}], ids=str)
def test_other_groups_are_adamws(flags, path, device):
    follow_adamw(flags, device)


def test_other_groups_are_adamws_on_a_cpu(device):
    # There PyTorch's own kernel steps them.
    with runtime.references("Muon", "AdamW"):
        follow_adamw({}, device)


def follow_adamw(flags, device):
    optimizer, ps = mixed(device, adamw_eps=0.1, **flags)
    others = [nn.Parameter(p.detach().clone()) for p in ps[2:]]
    theirs = AdamW(others, lr=0.01, weight_decay=0.2, eps=0.1, **flags)
    for seed in range(3):
        steps(optimizer, [seed])
        for p, q in zip(ps[2:], others, strict=True):
            q.grad = p.grad
        theirs.step()
    assert_equal(ps[2:], others)


STORAGES = [
    {},
    {"max_grad_norm": 1.0, "ema_decay": 0.9, "cautious_decay": True, "record_norms": True},
    {"state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", STORAGES, ids=str)
@pytest.mark.parametrize("copied", ["copy", "load"])
def test_resumes_exactly(options, copied, path, device):
    optimizer, ps = mixed(device, **options)
    steps(optimizer, range(2))
    if copied == "copy":
        twin = copy.deepcopy(optimizer)
    else:
        twin, qs = mixed(device, **options)
        with torch.no_grad():
            for p, q in zip(ps, qs, strict=True):
                q.copy_(p)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file))
    for each in (optimizer, twin):
        steps(each, range(2, 4))
    assert_equal(bits(optimizer), bits(twin))


def test_skips_a_step_that_is_not_finite(path, device):
    (a, ps), (b, _) = (mixed(device, max_grad_norm=1.0, state_dtype=torch.bfloat16) for _ in "ab")
    for seed, bad in ((0, nan), (1, inf)):
        gradients(ps, seed)
        ps[seed].grad[0, 0] = bad
        a.step()
        steps(a, [seed])
        steps(b, [seed])
    assert a.skipped.item() == 2
    assert_equal(bits(a), bits(b))


def test_state_is_torchs(device):
    ps = matrices(SHAPES, device)
    theirs = torch.optim.Muon(copy.deepcopy(ps), lr=0.3)
    mine = Muon(ps, lr=0.1)
    steps(mine, range(2))
    theirs.load_state_dict(mine.state_dict())
    steps(theirs, range(2, 3))
    mine.load_state_dict(theirs.state_dict())
    assert_equal(
        [s["momentum_buffer"] for s in mine.state.values()],
        [s["momentum_buffer"] for s in theirs.state.values()],
    )


def test_groups_keep_options_that_torch_has_not(device):
    p = matrices([(24, 8)], device)[0]
    theirs = torch.optim.Muon([p], lr=0.3)
    steps(theirs, [0])
    mine = Muon([{"params": [p], "splits": (8, 16)}], lr=0.1)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["splits"] == (8, 16)
    assert mine.param_groups[0]["lr"] == 0.3


def test_keeps_no_state_that_it_does_not_need(path, device):
    optimizer, ps = mixed(device)
    steps(optimizer, [0])
    names = [{*optimizer.state[p]} for p in ps]
    adamws = {"step", "exp_avg", "exp_avg_sq"}
    assert names == [{"momentum_buffer"}, {"momentum_buffer", "row_second_moment"}, adamws, adamws]
    assert optimizer.state[ps[1]]["row_second_moment"].shape == (24, 1)
    assert optimizer.state_bytes(ps[0]) == 4 * 8 * 24


def test_reports_norms(path, device):
    optimizer, ps = mixed(device, record_norms=True)
    before = [p.detach().clone() for p in ps]
    steps(optimizer, [0])
    norms = optimizer.norms()
    for i, (p, old) in enumerate(zip(ps, before, strict=True)):
        for actual, x in ((norms.grad, p.grad), (norms.update, p - old), (norms.weight, p)):
            torch.testing.assert_close(actual[i], x.detach().norm(), rtol=1e-4, atol=1e-6)


P = nn.Parameter(torch.ones(6, 4))
ERRORS = [
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
    ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
    ({"eps": -1.0}, "eps must be at least 0"),
    ({"ns_steps": 0}, "ns_steps must be at least 1"),
    ({"ns_coefficients": "cubic"}, "ns_coefficients must be 'quintic' or 'polar_express'"),
    ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be a name"),
    ({"ns_coefficients": []}, "ns_coefficients must be a name"),
    ({"adjust_lr_fn": "square"}, "adjust_lr_fn must be one of"),
    ({"splits": (2, 3)}, "splits must be positive and must add up to the rows"),
    ({"splits": (0, 6)}, "splits must be positive and must add up to the rows"),
    ({"l1": 0.1}, "l1 must be 0"),
    ({"lr": -1.0}, "Muon: lr must be at least 0"),
    ({"params": [nn.Parameter(torch.ones(6))]}, "must be contiguous matrices"),
    ({"params": [nn.Parameter(torch.ones(4, 6).T)]}, "must be contiguous matrices"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=str)
def test_rejects_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(**{"params": [P]} | options)


@pytest.mark.parametrize(
    ("native", "shape", "dtype"),
    [(True, (128, 160), torch.bfloat16), (True, (160, 128), torch.bfloat16),
     (True, (127, 160), torch.float32), (False, (128, 160), torch.float32)],
)  # fmt: skip
def test_a_cpu_multiplies_in_bfloat16_what_it_speeds_up(monkeypatch, native, shape, dtype):
    """Large matrices, where there are instructions for it; the result is that of the formula."""
    monkeypatch.setattr(_matrices, "multiplies_bfloat16", lambda: native)
    u, coefficients = torch.randn(shape), triples("polar_express", 5)
    recipe = _matrices.Recipe(None, coefficients, 1e-7, lambda rows, columns: 1.0, None)
    expected = orthogonalize_reference(u[None], coefficients, 1e-7, dtype)[0].float()
    exact = orthogonalize_reference(u[None].double(), coefficients, 1e-7, torch.float64)[0]
    _matrices.orthogonalize_all({0: u}, {0: recipe}, {})
    assert torch.equal(u, expected)
    assert (u - exact).norm() < (0.05 if dtype == torch.bfloat16 else 1e-4) * exact.norm()
