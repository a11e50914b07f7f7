"""Prove that a launch without Triton's choice is of the kernel that Triton would have chosen."""

import ast
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import _activation, _norm_launch, launcher
from tritium.kernels._cross_entropy_options import LossOptions
from tritium.kernels.launcher import KEPT, Launcher, Plan
from tritium.kernels.runtime import cdiv, power_of_2
from tritium.kernels.swiglu import swiglu

LOSS = sys.modules["tritium.kernels.cross_entropy"]  # the package's attribute is the function
ROOT = Path(__file__).parents[2]
FUSED = {"enable_fp_fusion": True}  # said in every launch: Triton 3.10 changes the default


@pytest.mark.parametrize("most", [KEPT, 2])
def test_launches_what_triton_would_choose(most):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches", str(most)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, kernels = map(int, done.stdout.split())
    assert kept > 20
    assert kernels > 10


class Kernel:
    """A kernel that records how it is launched, by Triton's choice or without."""

    def __init__(self, log: list):
        self.log = log

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.log.append(("triton", grid, args, options))
            return Compiled(self.log)

        return launch


class Compiled:
    """Stand-in for a compiled `Kernel`."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list):
        self.log = log

    def run(self, x, y, z, stream, function, metadata, *rest):
        assert (stream, function, metadata) == ("stream", "function", "metadata")
        assert rest[:3] == (None, None, None)
        self.log.append(("kept", (x, y, z), rest[3:], {}))

    def __getitem__(self, grid):
        return lambda *args: self.log.append(("hooked", grid, args, {}))


@pytest.fixture
def device(monkeypatch):
    device = [0]
    stubs = SimpleNamespace(
        get_current_stream=lambda _: "stream", get_current_device=lambda: device[0]
    )  # fmt: skip
    monkeypatch.setattr(launcher, "_INTERPRETED", False)
    monkeypatch.setattr(launcher, "_minds_size", lambda device: device == "amd")
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=stubs))
    return device


X = torch.empty(64)
FIRST = (X, None), (16, 0.5), (8, True)


@pytest.mark.parametrize(
    ("tensors", "numbers", "constants", "num_warps"),
    [
        ((X[1:], None), *FIRST[1:], 4),
        ((X[2:6], X), *FIRST[1:], 4),
        ((X.double(), None), *FIRST[1:], 4),
        (FIRST[0], (17, 0.5), FIRST[2], 4),
        (FIRST[0], (16.0, 0.5), FIRST[2], 4),
        (*FIRST[:2], (16, True), 4),
        (*FIRST[:2], (8, False), 4),
        (*FIRST[:2], (8, 1), 4),
        (*FIRST, 8),
    ],
)
def test_asks_triton_where_an_argument_differs_and_keeps_both(
    tensors, numbers, constants, num_warps, device
):
    log = []
    launch = Launcher(Kernel(log))
    launch((2,), *FIRST)
    launch((3,), *FIRST)
    for _ in range(2):
        launch((3, 4), tensors, numbers, constants, num_warps)
        launch((3,), *FIRST)
    assert [by for by, *_ in log] == ["triton", "kept", "triton", "kept", "kept", "kept"]
    args = X, None, 16, 0.5, 8, True
    assert log[0][1:] == ((2,), args, {"num_warps": 4, **FUSED})
    assert log[1][1:] == ((3, 1, 1), (X.data_ptr(), *args[1:]), {})
    # A kernel that is kept is handed addresses.
    handed = [x if x is None else x.data_ptr() for x in tensors]
    assert log[4][1:] == ((3, 4, 1), (*handed, *numbers, *constants), {})


def test_asks_triton_on_another_device(device):
    log = []
    launch = Launcher(Kernel(log))
    for device[0] in (0, 0, 1, 1, 0):
        launch((1,), (X,), (), ())
    assert [by for by, *_ in log] == ["triton", "kept", "triton", "kept", "kept"]


def test_asks_triton_where_memory_is_larger_than_2_gib_on_amd(device, monkeypatch):
    log, sizes = [], iter([1 << 31, (1 << 31) - 1, 1 << 31, 0])
    monkeypatch.setattr(
        torch.Tensor, "untyped_storage", lambda x: SimpleNamespace(nbytes=lambda: next(sizes))
    )
    launch = Launcher(Kernel(log))
    for device[0] in ("amd", "amd", "amd", "amd", 0, 0):
        launch((1,), (X,), (), ())
    assert [by for by, *_ in log] == ["triton", "triton", "kept", "kept", "triton", "kept"]


def test_keeps_a_bounded_number(device):
    log = []
    launch = Launcher(Kernel(log))
    for n in range(3 * KEPT):
        launch((1,), (X,), (n,), ())
    assert len(launch._kept) <= KEPT
    assert len(launch._plans) <= KEPT
    log.clear()
    for n in (*range(KEPT), *range(KEPT)):
        launch((1,), (X,), (n,), ())
    assert sum(by == "kept" for by, *_ in log) >= KEPT


def test_a_profiler_of_triton_hears_of_every_launch(device, monkeypatch):
    log = []
    launch = Launcher(Kernel(log))
    launch((1,), *FIRST)
    hooks = SimpleNamespace(calls=[print])
    monkeypatch.setattr(launcher.knobs.runtime, "launch_enter_hook", hooks)
    launch((5, 6), *FIRST)
    assert log[1] == ("hooked", (5, 6, 1), (X, None, 16, 0.5, 8, True), {})


@pytest.mark.parametrize("n", [*range(70), 2**20 - 1, 2**20, 2**20 + 1])
def test_sizes_are_those_of_triton(n):
    import triton

    assert power_of_2(n) == triton.next_power_of_2(max(n, 1))
    assert cdiv(n, 7) == triton.cdiv(n, 7)


def test_a_plan_is_launched_on_whatever_tensors_there_are(device):
    log = []
    launcher, plan = Launcher(Kernel(log)), Plan((7,), (16,), (8,), num_warps=2, num_stages=3)
    places = X, X[16:], X[4:], X[1:], X[17:]
    for x in places:
        launcher.launch(plan, x, None)
    assert log[0] == ("triton", (7,), (X, None, 16, 8), {"num_warps": 2, "num_stages": 3, **FUSED})
    assert [by for by, *_ in log] == ["triton", "kept", "kept", "triton", "kept"]
    for x, (by, grid, handed, _) in zip(places, log, strict=True):
        if by == "kept":
            assert (grid, handed) == ((7, 1, 1), (x.data_ptr(), None, 16, 8))
    launcher.launch(Plan((7,), (16,), (8,), num_warps=2, num_stages=3), X, None)
    assert log[-1][0] == "triton"


def test_a_tensor_that_outlived_its_transform_is_refused_or_unwrapped_as_pytorch_does():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    gate, dead = torch.randn(3, 4, device=where), []
    torch.func.grad(lambda x: dead.append(x) or x.sum())(gate)
    torch.testing.assert_close(swiglu(dead[0], gate), swiglu(gate, gate))


def test_results_that_are_not_needed_come_back_empty_from_an_operator():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 4, device=where)
    y, s, m, r = _norm_launch._forward.overload(x, None, None, None, 1e-6, 0.0, False)
    assert (y.shape, s.shape, m.shape, r.shape) == (x.shape, (0,), (0,), (3,))
    assert _norm_launch._forward(x, None, None, None, 1e-6, 0.0, False)[1:3] == (None, None)


class Seen(TorchDispatchMode):
    """Notes the operators of Tritium that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tritium":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    """A tensor that notes the operators of Tritium that are called on it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace == "tritium":
            cls.names.append(func.__name__)
        return torch.zeros(3, 4)


def test_whoever_watches_operators_sees_them():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up = torch.randn(2, 3, 4, device=where)
    expected = swiglu(gate, up)
    with Seen() as seen:
        assert torch.equal(swiglu(gate, up), expected)
    assert seen.names == ["activation_forward.default"]
    with torch.profiler.profile() as profile:
        assert torch.equal(swiglu(gate, up), expected)
    assert "tritium::activation_forward" in {event.name for event in profile.events() or ()}
    Sub.names.clear()
    with torch.no_grad():
        _activation._forward(gate.as_subclass(Sub), up, "silu")
        _activation._forward(gate, up.as_subclass(Sub), "silu")
    assert Sub.names == ["activation_forward.default"] * 2


def test_an_operator_that_is_watched_gets_its_options_as_it_does_unwatched():
    logits = torch.randn(3, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.tensor([1, 0, 3], device=logits.device)
    options = dict(label_smoothing=0.1, z_loss=0.01, softcap=3.0, logit_scale=2.0)
    expected = LOSS.cross_entropy(logits, target, **options)
    with Seen() as seen:
        assert torch.equal(LOSS.cross_entropy(logits, target, **options), expected)
    assert seen.names == ["cross_entropy_forward.default"]


def test_a_negated_view_is_negated():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    gate = torch.randn(3, 4, device=where)
    negated = torch._neg_view(gate)  # contiguous: a copy would have lost the sign before
    assert negated.is_neg()
    torch.testing.assert_close(swiglu(negated, gate), swiglu(-gate, gate))
    torch.testing.assert_close(swiglu(gate, negated), swiglu(gate, -gate))
    up = gate.clone().requires_grad_()
    grads = [torch.autograd.grad(swiglu(gate, up), up, dy)[0] for dy in (negated, -gate)]
    torch.testing.assert_close(*grads)


def test_zeros_that_have_no_memory_are_zeros():
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 4, device=where)
    zeros = torch._efficientzerotensor((3, 4), device=where)
    for gate, up in ((zeros, x), (x, zeros)):
        torch.testing.assert_close(swiglu(gate, up), torch.zeros_like(x))


@contextmanager
def dispatched(call):
    """Note what is dispatched by a function of an operator, which then returns nothing."""
    cell = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))["overload"]
    noted = []
    before, cell.cell_contents = cell.cell_contents, lambda *args: noted.append(args)
    try:
        yield noted
    finally:
        cell.cell_contents = before


def test_nobody_watching_launches_at_once():
    gate, up = torch.randn(2, 3, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.zeros(3, dtype=torch.int64, device=gate.device)
    with dispatched(_activation._forward) as noted:
        swiglu(gate, up)
        assert not noted
    with dispatched(LOSS._forward) as noted, torch.no_grad():
        LOSS.cross_entropy(gate, target)
        assert not noted


def test_an_option_of_another_type_is_left_to_the_dispatcher():
    # It makes a number of it, or refuses. Options are one tuple here, and single there.
    logits = torch.randn(3, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.zeros(3, dtype=torch.int64, device=logits.device)
    options = LossOptions(np.int64(-100), 0.0, 0.0, 0.0, 1.0)  # pyright: ignore[reportArgumentType]
    with dispatched(LOSS._forward) as noted:
        LOSS._forward(logits, target, None, "mean", options)
    assert noted[0][4:] == tuple(options)


def test_every_launch_says_whether_products_and_sums_are_fused():
    """No launch takes the compiler's default, which Triton 3.10 changes; `Plan` says it for its."""
    silent, seen = [], 0
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = node.func.value
                if not isinstance(kernel, ast.Name) or not kernel.id.endswith("kernel"):
                    continue
                seen += 1
                if "enable_fp_fusion" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{file.name}:{node.lineno}")
    assert seen >= 9
    assert not silent
