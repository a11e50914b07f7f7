"""Prove that rates and utilization are what the clock, the config and the device say."""

import mmap
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tritium.model import ModelConfig, Transformer, cpu_linear
from tritium.model.shapes import flops_per_token
from tritium.training.monitor import throughput
from tritium.training.monitor.throughput import (
    Meter,
    figures_of,
    matrix_rate,
    memory_in_use,
)

CONFIG = ModelConfig(vocab_size=96, n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, max_seq_len=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("tie", [True, False])
def test_flops_are_those_of_the_products(tie, monkeypatch):
    monkeypatch.setattr(
        cpu_linear, "_mkl_is_slow", lambda: False
    )  # oneDNN's products are not counted
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tie})
    model, tokens = Transformer(config), torch.randint(96, (2, 32))
    # The one attention on a CPU whose products are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    assert flops_per_token(config) * tokens.numel() == counter.get_total_flops()


def test_flops_of_a_known_model():
    # GPT-2 124M: 6 · 123.5M weights that multiply + 12 · 12 · 768 · 1024.
    config = ModelConfig(
        vocab_size=50257, n_layers=12, d_model=768, n_heads=12, d_ff=2048, max_seq_len=1024
    )
    assert flops_per_token(config) == 6 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 12 * 768 * 1024


def test_rates_leave_validation_and_saving_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    monkeypatch.setattr(throughput, "matrix_rate", lambda *_: 1e9)
    meter = Meter(CONFIG, 1000, CPU, torch.float32)
    now = 110.0
    meter.start()
    now = 112.0
    first = [{"step": 1}, {"step": 2}]
    meter.read(first)
    now = 115.0  # a validation
    meter.resume()
    now = 116.0
    second = [{"step": 3}]
    meter.read(second)
    assert [x["tokens_per_s"] for x in (*first, *second)] == [1000, 1000, 1000]
    assert [x["tokens_per_s_overall"] for x in (*first, *second)] == [1000, 1000, 500]
    expected = pytest.approx(1000 * flops_per_token(CONFIG) / 1e9, abs=1e-4)
    assert second[0]["mfu_measured"] == expected
    assert "mfu" not in second[0]


def test_utilization_is_of_the_datasheet_where_there_is_one(monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda *_: 800e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda")
    assert throughput.datasheet_rate(gpu, torch.bfloat16) == pytest.approx(989e12)
    assert throughput.datasheet_rate(gpu, torch.float32) == pytest.approx(67e12)
    said = str(Meter(CONFIG, 1000, gpu, torch.bfloat16))
    assert "in bfloat16: 800 TFLOP/s measured, 989 TFLOP/s by the datasheet" in said
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Toaster")
    assert throughput.datasheet_rate(gpu, torch.bfloat16) is None


def test_the_matrix_rate_is_measured_in_passing(device):
    device = torch.device(device)
    matrix_rate(device, torch.float32)
    state, started = torch.get_rng_state(), time.perf_counter()
    rate = matrix_rate(device, torch.float32)
    assert time.perf_counter() - started < 1
    assert 1e8 < rate < 1e16
    assert torch.equal(state, torch.get_rng_state())


def test_memory_grows_with_what_is_held(device):
    device = torch.device(device)
    before = memory_in_use(device)
    held = torch.empty(16 << 20, device=device)
    if device.type == "cpu":  # pages of its own: malloc may have as much left from other tests
        held = torch.frombuffer(mmap.mmap(-1, held.nbytes), dtype=torch.float32)
    held.fill_(1)
    assert memory_in_use(device) - before > 0.9 * held.nbytes


def test_figures_say_what_they_are_of():
    entry = {"mfu": 0.4123, "mfu_measured": 0.5, "memory_gib": 12.345}
    assert figures_of(entry) == {"MFU": "41.2%", "memory": "12.35 GiB"}
    assert figures_of({"mfu_measured": 0.5}) == {"MFU": "50.0% of measured"}
    assert figures_of({}) == {}
