"""Prove that the check at start finds kernels that are wrong or do not run, and nothing else."""

import itertools
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from paths import path
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import runtime
from tritium.kernels.runtime import fallen_back
from tritium.model import ModelConfig, Transformer
from tritium.training import self_check, self_check_cases
from tritium.training.optim import OptimizerConfig
from tritium.training.precision import Arithmetic, ComputeConfig
from tritium.training.self_check import check

CONFIG = ModelConfig(
    vocab_size=50, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=16
)
BATCH = 3
FLOAT32 = Arithmetic(torch.float32, nullcontext())
EXPECTED = {
    "embedding",
    "rms_norm", "add_rms_norm", "dropout_add", "qk_norm_rope", "swiglu", "linear_cross_entropy",
    "softmax",
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """Go through the kernels, in the interpreter or on a GPU, and forget what fell back."""
    monkeypatch.setattr(runtime, "_fallen", frozenset())
    if torch.cuda.is_available():
        yield
        return
    with path(False):
        yield


def trial(device, monkeypatch):
    """Check a small run; return the findings, and what was printed."""
    model = Transformer(CONFIG, dropout=0.1, label_smoothing=0.1).to(device)
    config, findings, said = OptimizerConfig(), [], []
    optimizer, table = config.make(model), self_check.table

    def noted(found, *rest):
        findings.extend(found)
        return table(found, *rest)

    monkeypatch.setattr(self_check, "table", noted)
    before = torch.get_rng_state()
    check(model, optimizer, config, batch=BATCH, arithmetic=FLOAT32, samples=True, log=said.append)
    assert torch.equal(before, torch.get_rng_state()), "the run would draw other numbers"
    return findings, said


def test_without_a_gpu_it_says_so_and_takes_no_time(monkeypatch):
    monkeypatch.setattr(runtime, "REFERENCE", False)
    monkeypatch.setattr(runtime, "CPU_KERNELS", False)
    started = time.perf_counter()
    _, said = trial("cpu", monkeypatch)
    assert time.perf_counter() - started < 0.05
    assert said == ["Kernels: none, every operation runs on its PyTorch reference (no GPU)"]


def test_right_kernels_stay(device, monkeypatch):
    findings, said = trial(device, monkeypatch)
    assert {finding.op for finding in findings} == EXPECTED | {"AdamW"}
    for finding in findings:
        assert not finding.reason
        assert 0 < finding.error <= finding.allowed
        assert min(finding.seconds, finding.reference_seconds) > 0
    assert len(said) == 1
    assert not fallen_back()


OPTIMIZERS = [
    OptimizerConfig("lion"),
    OptimizerConfig("sgd", momentum=0.9, max_grad_norm=0.1),
    OptimizerConfig("adagrad"),
    OptimizerConfig("rmsprop", state_dtype="bfloat16"),
    *(OptimizerConfig(master_weights=kept) for kept in ("float32", "split", "stochastic")),
    OptimizerConfig(master_weights="stochastic", state_dtype="uint8"),
    OptimizerConfig("muon"),
    OptimizerConfig("muon", master_weights="split", row_beta2=0.95, max_grad_norm=0.1),
    OptimizerConfig("muon", master_weights="stochastic", nesterov=False, adjust_lr_fn="original"),
]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: f"{c.name} {c.master_weights}")
def test_right_steps_stay(config, device):
    model = Transformer(replace(CONFIG, vocab_size=300, n_layers=1)).to(device)
    if config.master_weights:
        model.bfloat16()
    finding = self_check.compare_step(config.make(model), config)
    assert not finding.reason


def test_a_muon_of_other_products_falls_back(device, monkeypatch):
    # One step of the iteration too few: 40 % of the largest change, where rounding makes 4 %.
    module = import_module("tritium.kernels.optimizers.muon")
    make = module.make_plan

    def other(ps, recipes, *rest):
        fewer = {i: x._replace(coefficients=x.coefficients[:-1]) for i, x in recipes.items()}
        return make(ps, fewer, *rest)

    monkeypatch.setattr(module, "make_plan", other)
    model, config = Transformer(CONFIG).to(device), OptimizerConfig("muon")
    finding = self_check.compare_step(config.make(model), config)
    assert re.match(r"its value of parameter \d+ errs by", finding.reason)


def test_steps_are_right_in_tritons_own_interpreter(device):
    # As TRITON_INTERPRET=1 runs them for a user, without what these tests make stricter.
    script = """
from tritium.model import ModelConfig, Transformer
from tritium.training import self_check
from tritium.training.optim import OptimizerConfig

for name in ("muon", "adamw", "lion"):
    for master in (None, "split"):
        model = Transformer(ModelConfig(vocab_size=50, n_layers=1, d_model=32, n_heads=4))
        config = OptimizerConfig(name, master_weights=master)
        optimizer = config.make(model.bfloat16() if master else model)
        print(self_check.compare_step(optimizer, config).reason or "right")
"""
    if device != "cpu":
        pytest.skip("a GPU runs the kernels themselves")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == 6 * "right\n", done.stderr


class _Launched(TorchDispatchMode):
    """Notes the kernels that run, with the widths and dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tritium":
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            shapes = tuple((x.dtype, tuple(x.shape)) for x in tensors)
            self.calls.add((func.__name__, shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16-true"])
def test_what_a_step_launches_has_been_checked(precision, device):
    model = Transformer(CONFIG, dropout=0.1, label_smoothing=0.1)
    arithmetic = ComputeConfig(precision=precision).apply(model, torch.device(device))
    tokens = torch.randint(50, (BATCH, 16), device=device)
    with _Launched() as run, arithmetic.cast:
        model(tokens, tokens).backward()
        with torch.no_grad():
            model.eval()(tokens, tokens)
    with _Launched() as checked:
        for case in self_check_cases.cases(model, BATCH, arithmetic, samples=True):
            assert not self_check.compare(case).reason
    assert run.calls
    assert run.calls <= checked.calls, sorted(map(str, run.calls - checked.calls))


def scaled(module, name, factor, patch):
    launch = getattr(import_module(module), name)
    patch.setattr(import_module(module), name, lambda *args: factor * launch(*args))


def out_of_memory_on_the_chip(*_, **__):
    raise RuntimeError("out of resource: shared memory\nReduce block sizes")


def wrong_clipping(patch):
    launch = import_module("tritium.kernels.optimizers._base").launch_update

    def clipping_less(*args):
        launch(*args[:7], 1.01 * args[7], *args[8:])

    patch.setattr(import_module("tritium.kernels.optimizers._base"), "launch_update", clipping_less)


def unlaunchable(module, name, patch):
    patch.setattr(import_module(module), name, out_of_memory_on_the_chip)


def wrong_heads(patch):
    module = import_module("tritium.kernels.qk_norm_rope")
    launch = module._backward

    def larger(*args):
        dqkv, *dweights = launch(*args)
        return 1.00001 * dqkv, *dweights

    patch.setattr(module, "_backward", larger)


DOES_NOT_RUN = r"it does not run \(RuntimeError: out of resource: shared memory\)"
FAULTS = {
    "swiglu": (
        partial(scaled, "tritium.kernels.swiglu", "activate_packed", 1.00001),
        r"its (output 0|gradient \d) errs by \d",
    ),
    "qk_norm_rope": (wrong_heads, r"its gradient 0 errs by \d"),
    "add_rms_norm": (partial(unlaunchable, "tritium.kernels.rms_norm", "add_norm"), DOES_NOT_RUN),
    "linear_cross_entropy": (
        partial(unlaunchable, "tritium.kernels._cross_entropy_launch", "launch_rows"), DOES_NOT_RUN,
    ),
    "AdamW": (wrong_clipping, r"its \w+ of parameter \d+ errs by"),
}  # fmt: skip


@pytest.mark.parametrize("op", FAULTS)
def test_a_wrong_kernel_falls_back_and_says_why(op, monkeypatch, device):
    plant, reason = FAULTS[op]
    plant(monkeypatch)
    findings, (table, *said) = trial(device, monkeypatch)
    assert {finding.op for finding in findings if finding.reason} == {op}
    assert fallen_back() == {runtime.SHARED.get(op, op)}
    assert re.search(f"^{op} falls back to its reference: {reason}", said[0])
    on_references = {line.split()[0] for line in table.splitlines() if line.endswith(" reference")}
    assert on_references == {op}


def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch, device):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(import_module("tritium.kernels.swiglu"), "activate_packed", full)
    with pytest.raises(torch.OutOfMemoryError):
        trial(device, monkeypatch)
    assert not fallen_back()


@pytest.mark.parametrize("cast", [False, True])
def test_takes_no_more_memory_than_a_step(cast, monkeypatch):
    monkeypatch.setattr(self_check_cases, "ROOM", 0)
    monkeypatch.setattr(self_check, "time_of", lambda _: 0.0)
    monkeypatch.setattr(runtime, "REFERENCE", True)  # whose float64 takes the most
    config = ModelConfig(vocab_size=512, n_layers=8, d_model=64, n_heads=4, max_seq_len=64)
    model = Transformer(config, dropout=0.1, label_smoothing=0.1)
    dtype = torch.bfloat16 if cast else torch.float32
    arithmetic = Arithmetic(dtype, torch.autocast("cpu", torch.bfloat16, enabled=cast))
    for case in self_check_cases.cases(model, 16, arithmetic, samples=False):
        inputs = sum(x.numel() * x.element_size() for x in case.inputs)
        peak = peak_of(lambda case=case: self_check.compare(case))
        assert inputs + peak <= self_check_cases.step_memory(model, 16), case.op


def peak_of(call) -> int:
    """Most bytes that were allocated at once in a call."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in changes))
