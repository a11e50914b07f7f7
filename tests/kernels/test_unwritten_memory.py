"""Prove that the losses multiply and return no unwritten memory, for any number of classes.

What `torch.empty` returns is NaN here. A matrix product may read the memory between the rows of its
operands and multiply it by 0, as oneDNN does on CPUs with AMX: it must be finite, on every CPU.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import runtime
from tritium.kernels.cross_entropy import cross_entropy
from tritium.kernels.info_nce import info_nce
from tritium.kernels.linear_cross_entropy import linear_cross_entropy
from tritium.kernels.linear_kl_div import linear_kl_div
from tritium.kernels.linear_log_prob import linear_log_prob
from tritium.kernels.mse_loss import mse_loss
from tritium.kernels.softmax import log_softmax, softmax

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "linear", "matmul")


class Products(TorchDispatchMode):
    """Demand of every operand of a product that it is finite, between its rows, too."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "tritium":  # look into Tritium's operators
            key = torch._C.DispatchKey.CUDA if args[0].is_cuda else torch._C.DispatchKey.CPU
            with self:
                return func._op_dk(key, *args, **(kwargs or {}))
        if name.rstrip("_") in PRODUCTS:
            added = name.startswith(("addmm", "baddbmm", "addmv"))
            for x in args[added:]:
                if isinstance(x, torch.Tensor) and x.numel():
                    self.seen += 1
                    assert _span(x).isfinite().all(), f"{func} of {list(x.shape)} {x.stride()}"
        return func(*args, **(kwargs or {}))


def _span(x):
    """The memory of `x` as one vector: its elements, the gaps between them and after each row."""
    reach = [n * s for n, s in zip(x.shape, x.stride(), strict=True)]
    length = min(max(reach), x.untyped_storage().nbytes() // x.element_size() - x.storage_offset())
    return x.detach().as_strided((length,), (1,))


def test_sees_memory_between_the_rows():
    x = torch.full((3, 8), torch.nan)
    x[:, :5] = 1
    with Products() as products:
        x[:, :5].clone() @ torch.ones(5, 2)
    assert products.seen == 2
    with Products(), pytest.raises(AssertionError, match="mm"):
        x[:, :5] @ torch.ones(5, 2)


CALLS = {
    "cross_entropy": lambda x, w, t, **o: cross_entropy(x @ w.mT, t, **o),
    "cross_entropy, in place": lambda x, w, t, **o: cross_entropy(x @ w.mT, t, inplace=True, **o),
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy, in chunks": partial(linear_cross_entropy, chunk_bytes=500),
    "linear_log_prob, in chunks": lambda x, w, t, **o: linear_log_prob(
        x, w, t if t.dim() == 1 else t.argmax(-1), chunk_bytes=500
    ),
    "linear_kl_div, in chunks": lambda x, w, t, **o: linear_kl_div(
        x, w, x.detach() * 2, w.detach(), chunk_bytes=500, beta=0.5
    ),
    "info_nce": lambda x, w, t, **o: info_nce(x, x * 2, **o),
    "info_nce, in chunks": lambda x, w, t, **o: info_nce(x, x + 1, chunk_bytes=30, **o),
    "mse_loss": lambda x, w, t, **o: mse_loss(x, x.detach() * 2, **o),
    "softmax": lambda x, w, t, **o: softmax(x @ w.mT, -1).square().sum(),
    "log_softmax": lambda x, w, t, **o: log_softmax(x @ w.mT, -1).square().sum(),
}


@settings(max_examples=60)
@given(
    call=st.sampled_from(sorted(CALLS)),
    T=st.integers(1, 7),
    D=st.integers(1, 9),
    V=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    soft=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    path=st.sampled_from(["kernel", "rows", "reference"]),
)
def test_nothing_unwritten_is_read_or_returned(call, T, D, V, dtype, soft, reduction, path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    w = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    target = torch.randint(V, (T,), device=device)
    target = torch.randn(T, V, device=device).softmax(-1) if soft else target
    with pytest.MonkeyPatch.context() as patch, Products() as products:
        patch.setattr(runtime, "REFERENCE", path == "reference")
        if path == "rows":  # the rows' reference within the chunks
            patch.setattr(runtime, "_fallen", frozenset({"cross_entropy", "linear_kl_div"}))
        loss = CALLS[call](x, w, target, reduction=reduction)
        loss.sum().backward()
    assert products.seen or call == "mse_loss"
    assert loss.isfinite().all()
    for leaf in (x, w):
        assert leaf.grad is None or leaf.grad.isfinite().all()
