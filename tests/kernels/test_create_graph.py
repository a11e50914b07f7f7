"""First gradients are the same with a graph of their own as without, however inputs are connected.

And they are those of plain PyTorch in float64; second ones, too, where there are any.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian

from tritium.kernels import (
    add_layer_norm,
    add_rms_norm,
    dropout_add,
    geglu,
    layer_norm,
    qk_norm_rope,
    relu_squared,
    rms_norm,
    rope,
    runtime,
    swiglu,
)
from tritium.kernels.runtime import references

L, H, K = 3, 2, 4
D = H * K
ANGLES = torch.randn(9, K // 2, dtype=torch.float64)
COS, SIN = ANGLES.cos(), ANGLES.sin()


def heads(x: Tensor) -> Tensor:
    return x.view(-1, L, H, K)


def turned(x: Tensor) -> Tensor:
    """Rope in complex numbers."""
    x1, x2 = heads(x).chunk(2, -1)
    y = torch.complex(x1, x2) * torch.complex(COS, SIN)[2 : 2 + L, None]
    return torch.cat([y.real, y.imag], -1).view(x.shape)


def plain_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * (1 + w)


# An operation, the same in plain PyTorch, and which inputs are rows (r) or one vector (v).
OPERATIONS = {
    "swiglu": (swiglu, lambda a, b: F.silu(a) * b, "rr"),
    "rms_norm": (lambda x, w: rms_norm(x, (D,), w, 0.1, offset=1.0), plain_rms_norm, "rv"),
    "add_rms_norm": (
        lambda x, r, w: torch.cat(add_rms_norm(x, r, w, 0.1, offset=1.0)),
        lambda x, r, w: torch.cat([plain_rms_norm(x + r, w), x + r]),
        "rrv",
    ),
    "rope": (lambda x: rope(heads(x), COS, SIN, offset=2).view(x.shape), turned, "r"),
    "layer_norm": (
        lambda x, w, b: layer_norm(x, D, w, b, 0.1),
        lambda x, w, b: F.layer_norm(x, (D,), w, b, 0.1),
        "rvv",
    ),
    "add_layer_norm": (
        lambda x, r, w, b: torch.cat(add_layer_norm(x, r, w, b, 0.1)),
        lambda x, r, w, b: torch.cat([F.layer_norm(x + r, (D,), w, b, 0.1), x + r]),
        "rrvv",
    ),
    "geglu": (geglu, lambda a, b: F.gelu(a) * b, "rr"),
    "relu_squared": (relu_squared, lambda a: F.relu(a).square(), "r"),
    "dropout_add": (lambda x, r: dropout_add(x, r, 0.0), lambda x, r: x + r, "rr"),
}
# How an input comes from the one before it, the first from a leaf.
WAYS = {
    "a leaf": None,  # of its own
    "itself": lambda x: x,
    "a view": lambda x: x.view_as(x),
    "reversed": lambda x: x.flip(0),
    "scaled": lambda x: 2 * x,
    "tanh": torch.tanh,
    "square": torch.square,
}


def connected(kinds: str, ways: list[str], leaves: list[Tensor]) -> list[Tensor]:
    """The inputs of an operation, each a leaf or computed from what came before it."""
    inputs = []
    for kind, way, leaf in zip(kinds, ways, leaves, strict=True):
        before = inputs[-1] if inputs else leaf
        if WAYS[way] is not None:
            x = WAYS[way](before)
            leaf = x if x.shape == leaf.shape else x.mean(0) if kind == "v" else x.expand(L, D)
        inputs.append(leaf)
    return inputs


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("path", ["kernel", "reference"])
@settings(max_examples=30)
@given(
    ways=st.lists(st.sampled_from(list(WAYS)), min_size=4, max_size=4),
    deep=st.booleans(),
    frozen=st.integers(-1, 3),
    seed=st.integers(0, 1 << 30),
)
def test_gradients_with_a_graph(name, path, ways, deep, frozen, seed):
    op, plain, kinds = OPERATIONS[name]
    ways = ways[: len(kinds)]
    device = "cuda" if torch.cuda.is_available() and path == "kernel" else "cpu"
    torch.manual_seed(seed)
    shapes = [(L, D) if kind == "r" else (D,) for kind in kinds]
    drawn = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
    leaves = [x.requires_grad_(i != frozen or i == 0) for i, x in enumerate(drawn)]
    wanted = [x for x in leaves if x.requires_grad]

    def run(f, create_graph):
        inputs = connected(kinds, ways, leaves)
        y = f(*inputs)
        y = f(y[:L], *inputs[1:]) if deep else y
        weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view_as(y)
        return torch.autograd.grad(
            (y.sin() * weight).sum(), wanted, create_graph=create_graph, materialize_grads=True
        )

    expected = run(plain, True)
    with references(name) if path == "reference" else nullcontext():
        without, found = run(op, False), run(op, True)
    torch.testing.assert_close(without, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    if path == "reference":
        torch.testing.assert_close(
            second(found, wanted), second(expected, wanted), atol=1e-9, rtol=1e-9
        )


def second(first, leaves):
    """The gradients of what the first ones weigh."""
    total = sum(g.square().sum() for g in first)
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("name", [*OPERATIONS, "qk_norm_rope"])
@pytest.mark.parametrize("path", ["kernel", "cpu", "reference"])
def test_many_gradients_at_once_are_refused_in_a_sentence_or_right(name, path, monkeypatch):
    """As `vectorize=True` and vmap ask; the references, to which the message points, take them."""
    monkeypatch.setattr(runtime, "CPU_KERNELS", path == "kernel")
    monkeypatch.setattr(runtime, "REFERENCE", path == "reference")
    if name == "qk_norm_rope":
        scale = torch.ones(K, dtype=torch.float64)
        angles = COS[:L], SIN[:L]

        def op(x):
            return torch.cat(qk_norm_rope(x.view(L, 3, K), *angles, scale, 2 * scale), -2)

        shapes = [(L, 3 * K)]
    else:
        op, _, kinds = OPERATIONS[name]
        shapes = [(L, D) if kind == "r" else (D,) for kind in kinds]
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    leaves = [x.requires_grad_() for x in inputs]
    y = op(*leaves)

    def gradients(dy):
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    for at_once, one_by_one in (
        (lambda: jacobian(op, inputs, vectorize=True), lambda: jacobian(op, inputs)),
        (
            lambda: torch.func.vmap(gradients)(torch.stack((y.detach(), y.sin().detach()))),
            lambda: tuple(map(torch.stack, zip(gradients(y), gradients(y.sin()), strict=True))),
        ),
    ):
        try:
            found = at_once()
        except RuntimeError as error:
            assert path != "reference"
            assert "one incoming gradient at a time; leave out is_grads_batched" in str(error)  # noqa: PT017 (or right)
        else:
            torch.testing.assert_close(found, one_by_one())
