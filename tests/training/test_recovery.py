"""Prove which losses are bad, that they change nothing, and what a checkpoint's health means."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer
from tritium.training.optim import OptimizerConfig
from tritium.training.recovery import NO_LIMIT, Recovery, RecoveryConfig, all_finite

CONFIG = ModelConfig(vocab_size=40, n_layers=1, d_model=16, n_heads=2, max_seq_len=8)
WINDOW, Z = 8, 4.0


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


def entry(step, loss, norm=1.0):
    # As the optimizer leaves it: a loss above the limit has made the gradient NaN.
    return {"step": step, "loss": float(np.float32(loss)), "grad_norm": norm}


def cast(model, dtype):
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def ladder(model, told=None, **options):
    config = RecoveryConfig(**{"spike_window": WINDOW, "spike_zscore": Z, **options})
    return Recovery(config, model, 4, (lambda _: None) if told is None else told.append)


usual = st.floats(1, 2, width=32)
losses = st.lists(usual | usual | st.sampled_from([math.nan, math.inf, 2.5, 9.0]), max_size=60)


@settings(max_examples=100)
@given(losses=losses, reads=st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_bad_is_not_finite_or_far_above_the_last_good_ones(losses, reads, model):
    recovery, good, step = ladder(model, max_skips=1000), [], 0
    while step < len(losses):
        n = reads.pop() if reads else 3
        entries = [entry(step + 1 + i, x) for i, x in enumerate(losses[step : step + n])]
        limit, last = math.inf, np.array(good[-WINDOW:])
        if len(last) == WINDOW:
            limit = last.mean() + Z * max(last.std(), 0.02)
        recovery.detect_bad_steps(entries, 100 + 4 * (step + len(entries)))
        for x in entries:
            near = abs(x["loss"] - limit) < 1e-5
            bad = not math.isfinite(x["loss"]) or x["loss"] > limit
            assert near or ("skipped" in x) == bad
            if "skipped" in x:
                start = 100 + 4 * (x["step"] - 1)
                assert x["windows"] == [start, start + 4]
            else:
                good.append(x["loss"])
        step += len(entries)
        assert recovery.healthy(model, torch.optim.SGD([torch.zeros(1)])) == (
            "skipped" not in entries[-1]
        )


@pytest.mark.parametrize("loss", [1.0, 2.0, math.nan, math.inf, 9.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_above_the_limit_is_skipped_and_no_other_changed(loss, dtype, device):
    model = Transformer(CONFIG).to(device)
    recovery = ladder(model)
    recovery.detect_bad_steps([entry(i, 1 + i % 2) for i in range(1, WINDOW + 1)], 4 * WINDOW)
    cast(model, dtype)
    optimizer = OptimizerConfig().make(model)
    tokens = torch.randint(40, (2, 8), device=device)
    model(tokens, tokens).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    recovery.mark_spike(torch.tensor(loss, device=device))
    bad = not loss <= 2
    if not bad:
        assert all(torch.equal(p.grad, before[name][1]) for name, p in model.named_parameters())
    optimizer.step()
    assert optimizer.skipped.item() == bad
    assert all(torch.equal(p, before[n][0]) for n, p in model.named_parameters()) == bad
    (read,) = [entry(9, loss, optimizer.grad_norm.item())]
    recovery.detect_bad_steps([read], 4 * WINDOW + 4)
    assert ("skipped" in read) == bad


def test_a_gradient_that_is_not_finite_is_bad(model):
    told = []
    recovery = ladder(model, told)
    read = [entry(1, 1.0), entry(2, 1.0, math.nan), entry(3, 1.0, math.inf), entry(4, 1.0)]
    recovery.detect_bad_steps(read, 16)
    assert [x.get("skipped") for x in read] == [None, *["gradient not finite"] * 2, None]
    assert told == ["Skipped step 2 (windows 4 to 7): gradient not finite; 1 more until step 4"]


def test_off_it_climbs_nowhere(model):
    recovery = ladder(model, recovery=False)
    entries = [entry(i, 1.0 + i % 2) for i in range(1, WINDOW + 1)]
    entries += [entry(i, math.nan) for i in range(20, 40)]
    recovery.detect_bad_steps(entries, 4 * len(entries))
    assert not recovery.due
    assert not recovery.healthy(model, torch.optim.SGD([torch.zeros(1)]))
    one = [entry(41, 1e6)]
    recovery.detect_bad_steps(one, 400)
    assert "skipped" not in one[0]


@pytest.mark.parametrize("max_skips", [1, 3])
def test_climbs_at_the_end_of_a_streak_that_goes_on(max_skips, model):
    recovery = ladder(model, max_skips=max_skips)
    over = [entry(i, math.nan) for i in range(1, 6)]
    recovery.detect_bad_steps([*over, entry(6, 1.0)], 24)
    assert not recovery.due
    for i in range(max_skips - 1):
        recovery.detect_bad_steps([entry(7 + i, math.nan)], 28 + 4 * i)
        assert not recovery.due
    recovery.detect_bad_steps([entry(20, math.nan)], 80)
    assert recovery.due


def test_the_state_decides_the_same(model):
    first, second = ladder(model), ladder(model)
    rng = np.random.default_rng(0)
    for step in range(1, 15):
        first.detect_bad_steps(
            [entry(step, math.nan if step in (3, 14) else rng.uniform(1, 2))], 4 * step
        )
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for step in range(15, 20):
        loss = rng.uniform(1, 4)
        a, b = entry(step, loss), entry(step, loss)
        first.detect_bad_steps([a], 4 * step)
        second.detect_bad_steps([b], 4 * step)
        assert (a, first.due) == (b, second.due)


def test_losses_of_other_data_are_forgotten(model):
    first, second = ladder(model), ladder(model)
    first.detect_bad_steps([entry(i, 1.0) for i in range(1, 20)], 76)
    second.load_state(first.state(), same_data=False)
    read = [entry(20, 5.0)]
    second.detect_bad_steps(read, 80)
    assert "skipped" not in read[0]
    assert second.state()["losses"] == [5.0]


@pytest.mark.parametrize("where", ["weight", "moment", "nowhere"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_means_every_weight_and_moment(where, value, dtype, device):
    model = cast(Transformer(CONFIG).to(device), dtype)
    optimizer = OptimizerConfig().make(model)
    tokens = torch.randint(40, (2, 8), device=device)
    model(tokens, tokens).backward()
    optimizer.step()
    p = list(model.parameters())[int(torch.randint(len(list(model.parameters())), ()))]
    moments = [x for x in optimizer.state[p].values() if x.is_floating_point() and x.dim()]
    places = {"weight": [p.detach()], "moment": moments, "nowhere": []}[where]
    for x in places[-1:]:
        x.view(-1)[-1] = value
    assert all_finite(model, optimizer) == (where == "nowhere")


def test_there_is_no_limit_before_the_window_is_full(model):
    recovery = ladder(model)
    recovery.detect_bad_steps([entry(i, 1.0) for i in range(1, WINDOW)], 4 * WINDOW - 4)
    read = [entry(WINDOW, NO_LIMIT)]
    recovery.detect_bad_steps(read, 4 * WINDOW)
    assert "skipped" not in read[0]
