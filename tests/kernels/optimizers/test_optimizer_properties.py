"""Whatever a model looks like and whatever its gradients hold, a step is torch's at rounding level.

The kernels and their references take the same steps; torch.optim takes them in float32, to see how
much rounding there is, and in float64, to measure it from.
"""

from math import inf
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import OPTIONS, PENALTIES, THEIRS, regularize
from torch import nn

from tritium.kernels import SGD, Lion, runtime

pytestmark = pytest.mark.usefixtures("pointer_tables")

STEPS = 2
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(0,), (1,), (3,), (127,), (0, 4), (3, 5), (17, 241)]
FIXED = (2301,)  # in every model, to see how much rounding there is


class Spec(NamedTuple):
    """One parameter: its memory layout, that of its gradients, and which gradients there are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    offset: int
    """Elements past a multiple of 16 bytes."""
    transposed: bool
    grad_transposed: bool
    missing: tuple[bool, ...]
    """By step; a frozen parameter misses all."""


class Run(NamedTuple):
    """A model, an optimizer, and what its gradients hold."""

    rule: type
    options: dict
    penalties: list[dict]
    specs: list[Spec]
    clip: float | None
    scale: float
    infinite: int | None
    """The step in which the first gradient there is has an infinity."""
    seed: int


def specs(shapes):
    return st.builds(
        Spec, st.sampled_from(shapes), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
        st.sampled_from([0, 0, 1, 3]), st.booleans(), st.booleans(),
        st.tuples(*[st.sampled_from([False, False, True])] * STEPS),
    )  # fmt: skip


@st.composite
def runs(draw):
    rule, options = draw(st.sampled_from(OPTIONS))
    options = options | {"weight_decay": 0.0, "lr": draw(st.sampled_from([0.0, 1e-3, 0.02]))}
    everywhere = specs([FIXED]).map(lambda spec: spec._replace(missing=(False,) * STEPS))
    return Run(
        rule, options, draw(st.lists(st.sampled_from(PENALTIES), min_size=2, max_size=2)),
        [*draw(st.lists(specs(SHAPES), max_size=3)), draw(everywhere)],
        draw(st.sampled_from([None, 0.01, 1e4])), draw(st.sampled_from([1.0, 1.0, 1e-4, 0.0])),
        draw(st.sampled_from([None, None, *range(STEPS)])), draw(st.integers(0, 1000)),
    )  # fmt: skip


def groups_of(ps, penalties):
    """Two groups; the second has the last two parameters."""
    return [
        {"params": own, "maximize": kind.get("maximize", False)}
        for own, kind in zip((ps[:-2], ps[-2:]), penalties, strict=True)
    ]


def laid_out(x, offset, transposed):
    """A copy of `x`, dense in memory, at an offset and in the order asked for."""
    memory = x.new_empty(x.numel() + offset)[offset:]
    if transposed and x.dim() == 2:
        return memory.view(x.shape[::-1]).T.copy_(x)
    return memory.view(x.shape).copy_(x)


def gradients_of(run, device):
    """By step and parameter: float32 numbers that the dtype of the gradient can hold, or None."""
    by_step = []
    for step in range(STEPS):
        grads = [
            None if s.missing[step] else run.scale * torch.randn(s.shape).to(s.grad_dtype).float()
            for s in run.specs
        ]
        if run.infinite == step:
            next(g for g in grads if g is not None and g.numel()).view(-1)[0] = inf
        by_step.append([None if g is None else g.to(device) for g in grads])
    return by_step


def trained(run, values, grads):
    """The float32 parameters, or masters, that Tritium's optimizer ends with."""
    ps = []
    for value, spec in zip(values, run.specs, strict=True):
        ps.append(nn.Parameter(laid_out(value.to(spec.dtype), spec.offset, spec.transposed)))
        ps[-1].grad_dtype = spec.grad_dtype
    groups = groups_of(ps, run.penalties)
    groups = [group | kind for group, kind in zip(groups, run.penalties, strict=True)]
    optimizer = run.rule(groups, max_grad_norm=run.clip, **run.options)
    for step in range(STEPS):
        for p, g, spec in zip(ps, grads[step], run.specs, strict=True):
            p.grad = g if g is None else laid_out(
                g.to(spec.grad_dtype), spec.offset, spec.grad_transposed
            )  # fmt: skip
        optimizer.step()
    masters = [optimizer.state[p].get("master", p.float()).detach() for p in ps]
    for p, master in zip(map(torch.detach, ps), masters, strict=True):
        torch.testing.assert_close(p, master.to(p.dtype), rtol=0, atol=0, equal_nan=True)
    return masters


@torch.no_grad()
def trained_by_torch(run, values, grads, dtype):
    qs = [nn.Parameter(value.to(dtype, copy=True)) for value in values]
    optimizer = THEIRS[run.rule](groups_of(qs, run.penalties), **run.options)
    for step in range(STEPS):
        for q, g in zip(qs, grads[step], strict=True):
            q.grad = None if g is None else g.to(dtype, copy=True)
        if run.clip is not None and not nn.utils.clip_grad_norm_(qs, run.clip).isfinite():
            continue
        for group, kind in zip(optimizer.param_groups, run.penalties, strict=True):
            regularize(group, kind)
        optimizer.step()
    return [q.detach() for q in qs]


def error(xs, exact):
    """The largest error, in units of the last place of the largest number of its tensor."""
    errors = [0.0]
    for x, e in zip(xs, exact, strict=True):
        if x.numel():
            ulp = torch.finfo(torch.float32).eps * e.abs().max()
            errors.append(((x - e).abs().max() / ulp).item())
    return max(errors)


@settings(
    max_examples=settings.default.max_examples // 4,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(run=runs())
def test_any_model_is_updated_as_by_torch(run, monkeypatch, device):
    torch.manual_seed(run.seed)
    values = [torch.randn(s.shape).to(s.dtype).float().to(device) for s in run.specs]
    grads = gradients_of(run, device)
    expected = trained_by_torch(run, values, grads, torch.float32)
    exact = trained_by_torch(run, values, grads, torch.float64)
    kept = [e.isfinite() & t.isfinite() for t, e in zip(expected, exact, strict=True)]
    if run.rule is Lion and run.infinite is not None and run.clip is None:
        # An infinite momentum has a sign for torch, and none here: Lion's alone stays finite.
        for i, g in enumerate(grads[run.infinite]):
            kept[i] &= True if g is None else g.isfinite()

    def finite(xs):
        return [x[mask] for x, mask in zip(xs, kept, strict=True)]

    bound = 2 * error(finite(expected), finite(exact)) + 1
    for reference in (False, True):
        monkeypatch.setattr(runtime, "REFERENCE", reference)
        actual = trained(run, values, grads)
        for x, mask in zip(actual, kept, strict=True):
            assert x[mask].isfinite().all()
            assert run.rule is Lion or not x[~mask].isfinite().any()
        assert error(finite(actual), finite(exact)) <= bound


def test_a_model_may_have_thousands_of_parameters(path, device):
    # Most have no elements: in the interpreter the others take far longer.
    sizes = [(i % 3 + 1) * (i % 500 == 499) for i in range(5000)]
    ps = [nn.Parameter(torch.ones(n, device=device)) for n in sizes]
    for p in ps:
        p.grad = torch.full_like(p, 0.5)
    SGD(ps, lr=0.25).step()
    assert all(p.eq(0.875).all() for p in ps)
