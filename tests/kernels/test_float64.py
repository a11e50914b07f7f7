"""Prove on compiled kernels that float64 tensors are computed in float64, options included.

Triton's interpreter passes a Python float as it is; a compiled kernel gets it in float32 unless its
argument is declared float64. So every kernel is compiled here, and its first listing read.
"""

import os
import re
import subprocess
import sys

import pytest

LAUNCH = """
import sys
import torch, triton
from tritium import kernels
from tritium.bench.compiled._stub_driver import StubDriver
from tritium.kernels import runtime

triton.runtime.driver.set_active(driver := StubDriver(90))
runtime.CPU_KERNELS = True
def tensor(*shape):
    return torch.ones(*shape, dtype=torch.float64, requires_grad=True)
x, w, q, classes = tensor(4, 32), tensor(32), torch.ones(4, 32).double() / 32, torch.zeros(4).long()
odd = dict(label_smoothing=0.1, z_loss=0.1, softcap=0.7, logit_scale=0.3)
rows = torch.ones(4, 16, dtype=torch.float64)
calls = {
    "cross_entropy": [
        lambda: kernels.cross_entropy(x, classes, **odd),
        lambda: kernels.cross_entropy(x, q, weight=w.detach(), **odd),
        lambda: kernels.cross_entropy(x * 1, classes, inplace=True, **odd),
    ],
    "linear_cross_entropy": [
        lambda: kernels.linear_cross_entropy(x, tensor(8, 32), classes, **odd)
    ],
    "linear_kl_div": [
        lambda beta=beta: kernels.linear_kl_div(
            x, tensor(8, 32), x.detach(), tensor(8, 32).detach(), beta=beta, temperature=0.3,
            softcap=0.7, teacher_softcap=0.9,
        )
        for beta in (0.0, 1.0, 0.1)
    ],
    "linear_topk_kl_div": [
        lambda beta=beta: kernels.linear_topk_kl_div(
            x, tensor(8, 32), classes[:, None], x[:, :1].detach(), beta=beta, temperature=0.3,
            softcap=0.7, tail=True,
        )
        for beta in (0.0, 1.0, 0.1)
    ],
    "info_nce": [lambda: kernels.info_nce(x, tensor(4, 32), temperature=0.07)],
    "softmax": [lambda n=n: kernels.softmax(tensor(2, n), -1, scale=0.3) for n in (8, 40000)],
    "log_softmax": [
        lambda n=n: kernels.log_softmax(tensor(2, n), -1, scale=0.3) for n in (8, 40000)
    ],
    "mse_loss": [lambda: kernels.mse_loss(x, tensor(4, 32))],
    "rms_norm": [lambda: kernels.rms_norm(x, (32,), w, 1e-5),
                 lambda: kernels.rms_norm(tensor(2, 20000), (20000,), tensor(20000), 1e-5)],
    "layer_norm": [lambda: kernels.layer_norm(x, (32,), w, w, 1e-5)],
    "add_rms_norm": [lambda: kernels.add_rms_norm(x, tensor(4, 32), w, 1e-5)[0]],
    "swiglu": [lambda: kernels.swiglu(x)],
    "geglu": [lambda: kernels.geglu(x)],
    "relu_squared": [lambda: kernels.relu_squared(x)],
    "rope": [lambda: kernels.rope(tensor(1, 4, 2, 32), rows, rows)],
    "dropout_add": [lambda: kernels.dropout_add(x, tensor(4, 32), 0.1)],
}
for call in calls[sys.argv[1]]:
    y = call()
    y.backward(torch.ones_like(y))
for launched in {x.cubin: x for x in driver.launches}.values():
    print(launched.ttir)
"""
OPS = re.findall(r'^    "(\w+)": \[', LAUNCH, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_rounded_to_float32(op):
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, op], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = re.findall(r"tt\.func public @(\w+)\((.*?)\) attributes", done.stdout, re.DOTALL)
    assert kernels
    for name, arguments in kernels:
        scalars = re.findall(r"%(\w+): f(?:32|16)\b", arguments)
        assert not scalars, f"{name} gets {scalars} in float32"
    rounded = [line.strip() for line in done.stdout.splitlines() if "f64 to " in line or (
        "f64> to " in line and "f32" in line)]  # fmt: skip
    assert not rounded, rounded
