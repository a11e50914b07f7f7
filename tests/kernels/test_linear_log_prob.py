"""Prove that linear_log_prob equals its reference, whatever its chunks, options and inputs.

Every case runs twice: with the kernels, and with their PyTorch stand-in that serves a CPU.
"""

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import linear_log_prob as op
from tritium.kernels import runtime
from tritium.kernels._cross_entropy_options import LossOptions
from tritium.kernels.linear_log_prob import (
    _backward,
    _launch_backward,
    _rows_backward,
    linear_log_prob,
    linear_log_prob_reference,
)
from tritium.model.activation_checkpointing import Ledger

IGNORE = -100


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def rows(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"cross_entropy"}))


def layer(T, D, V, device="cpu", dtype=torch.float32):
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    bias = torch.randn(V, device=device).to(dtype)
    return hidden, weight, bias, torch.randint(V, (T,), device=device)


@given(
    T=st.integers(1, 5),
    D=st.integers(1, 20),
    V=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    chunk_bytes=st.sampled_from([1, 700, None]),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    logit_scale=st.sampled_from([1.0, -0.5, 2.0]),
    results=st.sampled_from([(0,), (1,), (0, 1)]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    T, D, V, dtype, chunk_bytes, biased, softcap, logit_scale, results, seed
):
    """Log-probabilities, entropies and all gradients err no more than PyTorch's do."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *inputs, target = layer(T, D, V, device, dtype)
    target[1::3] = IGNORE
    inputs = inputs if biased else inputs[:2]
    options = dict(softcap=softcap, logit_scale=logit_scale)

    def chosen(pair):
        return tuple(pair[i] for i in results)

    def actual(h, w, b=None):
        return chosen(
            linear_log_prob(
                h, w, target, linear_bias=b, chunk_bytes=chunk_bytes, return_entropy=True, **options
            )
        )

    def definition(h, w, b=None):
        return chosen(linear_log_prob_reference(h, w, target, linear_bias=b, **options))

    # A gradient is a difference of terms: inputs times log-probabilities times what comes in.
    unit = 16 * max(x.abs().max().item() for x in inputs) * abs(logit_scale)
    check(actual, definition, *inputs, unit=unit)


@pytest.mark.parametrize("V", [4096, 4100, 4160])
def test_rows_longer_than_a_block(V, device):
    """Complete blocks, tails and padded columns all get their gradient."""
    *inputs, target = layer(3, 4, V, device)
    target[0], target[2] = V - 1, IGNORE
    check(
        lambda h, w, b: linear_log_prob(h, w, target, linear_bias=b, return_entropy=True),
        lambda h, w, b: linear_log_prob_reference(h, w, target, linear_bias=b),
        *inputs, unit=16.0,
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_excluded_and_certain_classes(softcap, device):
    """A class of -inf has probability 0, a certain one entropy 0, and neither makes a nan.

    A softcap bounds -inf as well.
    """
    hidden, weight, bias, target = layer(4, 3, 9, device)
    bias[5:] = -torch.inf
    bias[2], target[:] = 200.0, torch.tensor([2, 0, 1, 2], device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = dict(linear_bias=bias, softcap=softcap)
    pair = linear_log_prob(*leaves[:2], target, return_entropy=True, **options)
    excluded = linear_log_prob(*leaves[:2], torch.full_like(target, 7), **options)
    assert excluded.isinf().all() if softcap is None else excluded.isfinite().all()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    options["linear_bias"] = exact[2]
    expected = linear_log_prob_reference(*exact[:2], target, **options)
    grads = torch.autograd.grad(torch.stack(pair).sum(), leaves)
    wanted = torch.autograd.grad(torch.stack(expected).sum(), exact)
    for a, b in zip((*pair, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradient_in_float64(device):
    """Finite differences agree, in several chunks."""
    *inputs, target = layer(4, 3, 6, device, torch.float64)
    torch.autograd.gradcheck(
        lambda h, w, b: linear_log_prob(
            h, w, target, linear_bias=b, chunk_bytes=64, softcap=6.0, logit_scale=1.5,
            return_entropy=True,
        ),
        [x.requires_grad_() for x in inputs],
    )  # fmt: skip


def test_is_a_categorical_distribution_in_any_shape(device):
    """The results are those of torch.distributions, in the shape of the leading axes."""
    hidden, weight, _, target = layer(6, 4, 11, device)
    pair = linear_log_prob(
        hidden.view(2, 3, 4), weight, target.view(2, 3).int(), return_entropy=True
    )
    policy = torch.distributions.Categorical(logits=(hidden @ weight.T).view(2, 3, 11))
    torch.testing.assert_close(pair, (policy.log_prob(target.view(2, 3)), policy.entropy()))
    empty = linear_log_prob(hidden[:0], weight.requires_grad_(), target[:0])
    empty.sum().backward()
    assert empty.shape == (0,)
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_product(frozen, device, monkeypatch):
    """A head without gradient has no dweight, a hidden state without gradient no dhidden."""
    hidden, weight, _, target = layer(12, 4, 9, device)
    (weight if frozen == "hidden" else hidden).requires_grad_()
    shapes, product = [], op.__globals__["_product"]
    monkeypatch.setitem(
        op.__globals__, "_product",
        lambda a, b, out, **k: shapes.append(tuple(out.shape)) or product(a, b, out, **k),
    )  # fmt: skip
    linear_log_prob(hidden, weight, target, chunk_bytes=4 * 9 * 4).sum().backward()
    assert shapes == [(9, 4) if frozen == "hidden" else (4, 4)] * 3


def test_logits_exist_in_chunks_only(device, request):
    """The backward pass holds one chunk of logits beside the gradients and a little per token."""
    T, D, V, C = 64, 8, 640, 4
    hidden, weight, _, target = layer(T, D, V, device)
    kept = (hidden.new_zeros(T), hidden.new_ones(T), hidden.new_ones(T), hidden.new_ones(T), None)
    with Ledger([hidden, weight, target, *kept[:4]]) as ledger:
        _launch_backward(
            hidden, weight, None, target, *kept, C, True, True, False, IGNORE, 0.0, 1.0
        )
    gradients, logits = 4 * (T * D + V * D), 4 * C * V
    copies = 5 if "reference" in request.node.name else 1  # the kernel makes none
    assert gradients + logits <= ledger.peak <= gradients + copies * logits + 16 * C
    assert ledger.peak < 4 * T * V


def test_padding_stays_0(device):
    """Columns beyond the classes, which a product may read, get no gradient."""
    V = 70
    x = torch.zeros(3, 128, device=device)
    x[:, :V] = torch.randn(3, V, device=device) - 500
    m, log_s = x[:, :V].amax(1), torch.full((3,), 3.0, device=device)
    target = torch.tensor([0, V - 1, IGNORE], device=device)
    one = x.new_ones(3)
    _rows_backward(x, V, target, (m, log_s, one), one, one, LossOptions(IGNORE, 0.0, 0.0, 0.0, 1.0))
    assert (x[:, V:] == 0).all()
    assert (x[:2, :V] != 0).all()


def test_is_a_well_formed_operator(device):
    """It tells what it returns, for every gradient that is wanted or not."""
    hidden, weight, bias, target = layer(6, 8, 33, device, torch.bfloat16)
    kept = torch.rand(4, 6, device=device)
    for wants in ((True, True, True), (True, False, False)):
        for dentropy in (None, torch.rand(6, device=device)):
            torch.library.opcheck(
                _backward.overload,
                (hidden, weight, bias, target, *kept, dentropy, 4, *wants, IGNORE, 30.0, 2.0),
            )


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device):
    """torch.compile captures a policy gradient whole."""
    hidden, weight, bias, target = layer(6, 8, 33, device)

    def loss(log_prob, entropy):
        return -(log_prob.exp() + 0.01 * entropy).mean()

    compiled = torch.compile(
        lambda h, w, b: loss(
            *linear_log_prob(h, w, target, linear_bias=b, return_entropy=True)
        ),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    check(
        compiled,
        lambda h, w, b: loss(*linear_log_prob_reference(h, w, target, linear_bias=b)),
        hidden, weight, bias, unit=4.0,
    )  # fmt: skip


def test_refuses_a_second_derivative(device):
    """A gradient penalty raises; it is not dropped."""
    hidden, weight, _, target = layer(4, 3, 7, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    refuses_a_second_derivative(lambda h, w: linear_log_prob(h, w, target), *leaves)


def test_a_target_outside_the_vocabulary_is_never_a_number(device, request):
    """It raises in the reference; in the kernel its row is nan, gradient included."""
    hidden, weight, _, target = layer(4, 3, 7, device)
    target[2] = 7
    hidden.requires_grad_()
    if "reference" in request.node.name:
        with pytest.raises(IndexError):
            linear_log_prob(hidden, weight, target)
        return
    log_prob = linear_log_prob(hidden, weight, target)
    log_prob.sum().backward()
    assert log_prob.isnan().tolist() == [False, False, True, False]
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [False, False, True, False]


H, W, T = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "options", "message"),
    [
        (H, W[:, :2], T, {}, r"linear_weight must have shape \[V, 3\], got \[5, 2\]"),
        (H, W, T[:1], {}, r"target must have shape \[2\], got \[1\]"),
        (H, W, T.float(), {}, 'class indices, got torch.float32; .*reduction="none"'),
        (H, W, T, dict(linear_bias=torch.zeros(4)), r"linear_bias must have shape \[5\]"),
        (H, W, T, dict(softcap=0.0), "softcap must be above 0"),
        (H, W, T, dict(chunk_bytes=0), "chunk_bytes must be positive, got 0"),
        (H, W, T, dict(logit_scale=float("inf")), "logit_scale must be finite"),
    ],
)
def test_refuses_wrong_input(hidden, weight, target, options, message):
    """An error names the operation, what must hold and what came."""
    with pytest.raises(ValueError, match=f"linear_log_prob: .*{message}"):
        linear_log_prob(hidden, weight, target, **options)
