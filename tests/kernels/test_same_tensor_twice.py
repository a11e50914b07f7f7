"""Prove that one tensor may be given twice where torch.compile traces, as anywhere else."""

import pytest
import torch

from tritium import kernels
from tritium.kernels import runtime

W, ANGLES, CLASSES = torch.randn(5, 12), torch.rand(3, 2), torch.arange(4)
CALLS = {
    "swiglu": lambda x: kernels.swiglu(x, x),
    "add_rms_norm": lambda x: kernels.add_rms_norm(x, x, x[0])[0],
    "qk_norm_rope": lambda x: kernels.qk_norm_rope(
        x.view(1, 4, 3, 4)[:, :3], ANGLES, ANGLES, *(x[0, :4],) * 2
    )[0],
    "linear_kl_div": lambda x: kernels.linear_kl_div(x, W, x.detach() * 2, W),
    "linear_kl_div of rows": lambda x: kernels.linear_kl_div(
        x, W, x.detach() * 2, W, reduction="none"
    ),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, x, CLASSES),
    "linear_cross_entropy of rows": lambda x: kernels.linear_cross_entropy(
        x, x, CLASSES, reduction="none"
    ),
    "linear_log_prob": lambda x: kernels.linear_log_prob(x, x, CLASSES),
}


@pytest.mark.slow
def test_one_tensor_given_twice_compiles(monkeypatch):
    """One for each place where an autograd function is applied to several tensors."""
    monkeypatch.setattr(runtime, "CPU_KERNELS", True)
    x = torch.randn(4, 12, requires_grad=True)

    def outputs(x):
        return [call(x) for call in CALLS.values()]

    torch._dynamo.reset()
    compiled = torch.compile(outputs, fullgraph=True, backend="eager")
    for name, found, expected in zip(CALLS, compiled(x), outputs(x), strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
        pair = [
            torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for y in (found, expected)
        ]
        torch.testing.assert_close(*pair, msg=lambda text, name=name: f"{name}: {text}")
