"""Prove that the norms of layers are those of their parameters, and the warnings what they say."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.kernels import AdamW
from tritium.model import ModelConfig, Transformer
from tritium.training.monitor.layer_stats import (
    CONSECUTIVE,
    HISTORY,
    MAX_RATIO,
    MIN_HISTORY,
    LayerStats,
    LayerWatch,
    layer_of,
)
from tritium.training.monitor.observer import ObserveConfig, Observer
from tritium.training.monitor.plot import plot_layers

CONFIG = ModelConfig(vocab_size=64, n_layers=3, d_model=32, n_heads=2, max_seq_len=16)
PARTS = "attention", "feed_forward"
LAYERS = ["embedding", *(f"blocks.{i}.{part}" for i in range(3) for part in PARTS), "norm"]


def batch():
    return torch.randint(64, (2, 16)), torch.randint(64, (2, 16))


def test_norms_are_those_of_the_parameters():
    model = Transformer(CONFIG)
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5, record_norms=True)
    norms, expected = LayerStats(model), []
    assert norms.read() == []
    norms.record(0, optimizer)  # before the first step there is nothing
    for step in (1, 2):
        model(*batch()).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        norms.record(step, optimizer)
        layers = {}
        for layer in LAYERS:
            own = [(name, p) for name, p in model.named_parameters() if layer_of(name) == layer]
            layers[layer] = [
                torch.cat([x.flatten() for x in tensors]).norm().item()
                for tensors in (
                    [gradients[name] for name, _ in own], [p - before[name] for name, p in own],
                    [p for _, p in own],
                )
            ]  # fmt: skip
        expected.append((step, layers))
    entries = norms.read()
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry, (_, layers) in zip(entries, expected, strict=True):
        assert list(entry["layers"]) == LAYERS  # by depth
        for layer, values in layers.items():
            assert entry["layers"][layer] == pytest.approx(values, rel=1e-4)
    assert norms.read() == []


def test_only_the_norms_that_are_taken_are_recorded(tmp_path):
    model = Transformer(CONFIG)
    optimizer = AdamW(model.parameters(), record_norms=True)
    config = ObserveConfig(layer_stats_every=3)
    tokenizer: Any = None
    observer = Observer(tmp_path, config, model, tokenizer, ("",), 0, {}, print)
    recorded = []
    for step in range(1, 8):
        observer.enable_norms(step, optimizer)
        recorded.append(optimizer.records_norms)
        model(*batch()).backward()
        optimizer.step()
        observer.record_norms(step, optimizer)
    observer.log([])
    assert [i for i, x in enumerate(recorded, 1) if x] == [1, 3, 6]
    lines = (tmp_path / "layers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 6]


def entry(step, scales, watch):
    sizes = watch._sizes
    return {"step": step, "layers": {k: [x * sizes[k] ** 0.5, 0, 1] for k, x in scales.items()}}


def judge(watch, *readings, first=1):
    return [
        watch.judge(entry(step, scales, watch)) for step, scales in enumerate(readings, start=first)
    ]


well = st.fixed_dictionaries({name: st.floats(0.2, 2.0) for name in LAYERS})


@settings(max_examples=50)
@given(st.lists(well, min_size=1, max_size=30))
def test_healthy_layers_are_left_in_peace(readings):
    assert not any(judge(LayerWatch(Transformer(CONFIG), []), *readings))


ILL = "blocks.1.feed_forward"


@pytest.mark.parametrize(
    ("value", "trouble"),
    [(0.0, "vanishes"), (1e-3, "vanishes"), (1e3, "explodes"), (float("nan"), "explodes"),
     (float("inf"), "explodes"), (None, "vanishes")],
)  # fmt: skip
def test_a_layer_far_from_the_others_is_named_once(value, trouble):
    watch = LayerWatch(Transformer(CONFIG), [])
    healthy = dict.fromkeys(LAYERS, 1.0)
    ill = {name: x for name, x in healthy.items() if name != ILL} | (
        {} if value is None else {ILL: value}
    )
    told = judge(watch, healthy, ill, ill, ill, ill, healthy, *[ill] * CONSECUTIVE)
    assert [len(warnings) for warnings in told] == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert f"Step 4: the gradient {trouble} in {ILL} (" in told[3][0]
    assert not any(judge(watch, healthy, ill, ill, healthy, ill, ill))  # never three in a row


def test_all_layers_at_once_are_judged_by_their_past_alone():
    watch = LayerWatch(Transformer(CONFIG), [])
    low, usual = (dict.fromkeys(LAYERS, x) for x in (0.5 / MAX_RATIO, 1.0))
    assert not any(judge(watch, *[usual] * (MIN_HISTORY - 1), *[low] * CONSECUTIVE))
    watch = LayerWatch(Transformer(CONFIG), [])
    told = judge(watch, *[usual] * MIN_HISTORY, *[low] * CONSECUTIVE)
    assert [len(x) for x in told] == [0] * (MIN_HISTORY + CONSECUTIVE - 1) + [1]
    assert all(name in told[-1][0] for name in LAYERS)
    slow = [dict.fromkeys(LAYERS, 0.9**step) for step in range(100)]
    assert not any(judge(LayerWatch(Transformer(CONFIG), []), *slow))


def test_a_resumed_run_remembers_its_past():
    model = Transformer(CONFIG)
    usual, low = (dict.fromkeys(LAYERS, x) for x in (1.0, 0.5 / MAX_RATIO))
    past = [entry(step, usual, LayerWatch(model, [])) for step in range(HISTORY + 5)]
    told = judge(LayerWatch(model, past), *[low] * CONSECUTIVE, first=50)
    assert [len(x) for x in told] == [0] * (CONSECUTIVE - 1) + [1]


def broken(part, factor):
    """A model whose second block multiplies what that part passes on by `factor`."""
    model = Transformer(CONFIG)
    layer = getattr(model.blocks[1], part)
    layer.register_forward_hook(lambda _, __, output: output * factor)
    return model


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (lambda: Transformer(CONFIG), None),
        (lambda: broken("feed_forward", 1e-5), "vanishes in blocks.1.feed_forward ("),
        (lambda: broken("attention", 0.0), "vanishes in blocks.1.attention ("),
        (lambda: broken("attention", float("nan")), "explodes in embedding"),
    ],
)
def test_a_broken_block_is_noticed(make, warning):
    torch.manual_seed(1)
    model = make()
    optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, record_norms=True)
    norms, watch, told = LayerStats(model), LayerWatch(model, []), []
    for step in range(12):
        model(*batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.record(step, optimizer)
        told += [text for each in norms.read() for text in watch.judge(each)]
    assert len(told) == (warning is not None), told
    assert warning is None or warning in told[0]


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_the_picture_of_any_run(steps, tmp_path):
    entries = [
        {"step": 10 * i + 1, "layers": {name: [i % 3, 1e-3, float("nan") if i % 5 else 1.0]
                                        for name in LAYERS[i == 0 :]}}
        for i in range(steps)
    ]  # fmt: skip
    plot_layers([*entries, *entries[steps // 2 :]], tmp_path / "layers.png", "test")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["layers.png"]
