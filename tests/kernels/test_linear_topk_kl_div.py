"""Prove that linear_topk_kl_div equals its reference, and linear_kl_div where all is known.

Every case runs twice: with the kernels, and with their PyTorch stand-in that serves a CPU.
"""

import math

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from tritium.kernels import runtime
from tritium.kernels._kl_div_rows import Divergence
from tritium.kernels._linear_kl_div import _operator
from tritium.kernels._topk_kl_div_rows import topk_rows
from tritium.kernels.linear_kl_div import linear_kl_div
from tritium.kernels.linear_topk_kl_div import linear_topk_kl_div, linear_topk_kl_div_reference


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"linear_kl_div"}))
    return request.param


def likeliest(T, V, K, device="cpu", dtype=torch.float32):
    """The teacher's classes, in any order, and the logarithms of their probabilities."""
    log_p = (2 * torch.randn(T, V, device=device)).log_softmax(-1)
    found = log_p.topk(K)
    order = torch.randperm(K, device=device)
    return found.indices[:, order], found.values[:, order].to(dtype)


def compare(student, teacher, unit, **options):
    """Check the loss, and the gradients of the student's `layer`."""
    chunk_bytes = options.pop("chunk_bytes", None)

    def actual(h, w, b=None):
        return linear_topk_kl_div(h, w, *teacher, linear_bias=b, chunk_bytes=chunk_bytes, **options)

    def definition(h, w, b=None):
        indices, log_prob = teacher
        return linear_topk_kl_div_reference(
            h, w, indices, log_prob.to(torch.promote_types(h.dtype, log_prob.dtype)),
            linear_bias=b, **options,
        )  # fmt: skip

    check(actual, definition, *student, unit=unit)


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 200), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    chunk_bytes=st.sampled_from([1, 700, None]),
    biased=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["batchmean", "sum", "none"]),
    tail=st.booleans(),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    softcap=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(sizes, dtype, biased, masked, tail, beta, seed, **options):
    """Losses and all gradients err no more than PyTorch's do, whatever part is known."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, D, V, K = sizes
    student = layer(T, D, V, device, dtype)[: 3 if biased else 2]
    if masked:
        options["mask"] = torch.arange(T, device=device) % 3 != 1
    unit = 16 * max(x.abs().max().item() for x in student) / options["temperature"]
    teacher = likeliest(T, V, min(K, V), device)
    compare(student, teacher, unit, tail=tail or beta == 1, beta=beta, **options)


@pytest.mark.parametrize(("V", "K"), [(4096, 5), (4100, 40)])
def test_rows_longer_than_a_block(V, K, device):
    """Complete blocks, tails and padded columns all get their part."""
    student, (indices, log_prob) = layer(3, 4, V, device), likeliest(3, V, K, device)
    others = V - 1 - torch.arange(K, device=device)
    indices[1] = others  # the last of all classes
    mask = torch.tensor([True, True, False], device=device)
    compare(student, (indices, log_prob), 16.0, beta=0.3, tail=True, mask=mask)


@pytest.mark.parametrize(("beta", "tail"), [(0.0, False), (0.3, False), (0.3, True), (1.0, True)])
def test_all_classes_make_the_divergence_of_layers(beta, tail, device):
    """With K = V the result is that of linear_kl_div, in the shape of the tokens."""
    student, teacher = layer(6, 4, 11, device)[:2], layer(6, 4, 11, device)[:2]
    log_p = (teacher[0] @ teacher[1].T).log_softmax(-1)
    log_prob, indices = log_p.view(2, 3, 11).sort(-1)
    results = []
    for function, known in ((linear_kl_div, teacher), (linear_topk_kl_div, (indices, log_prob))):
        leaves = [x.clone().requires_grad_() for x in student]
        options = {} if function is linear_kl_div else {"tail": tail}
        first = known[0].view(2, 3, -1)
        loss = function(leaves[0].view(2, 3, 4), leaves[1], first, known[1], beta=beta,
                        reduction="none", **options)  # fmt: skip
        loss.sum().backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert results[0][0].shape == (2, 3)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_tail_other_classes_have_no_probability(device):
    """The loss is the divergence over all classes from the teacher's K, made to sum to 1."""
    student, (indices, log_prob) = layer(4, 3, 9, device), likeliest(4, 9, 3, device)
    log_q = (student[0] @ student[1].T).log_softmax(-1)
    p = torch.zeros(4, 9, device=device).scatter(1, indices, log_prob.exp())
    p /= p.sum(1, keepdim=True)
    for beta in (0.0, 0.4):
        m = beta * p + (1 - beta) * log_q.exp() if beta else log_q.exp()
        of_p = torch.special.xlogy(p, p / m).sum(1)
        of_q = (log_q.exp() * (log_q - m.log())).sum(1)
        wanted = beta * of_p + (1 - beta) * of_q if beta else of_p
        loss = linear_topk_kl_div(
            *student[:2], indices, log_prob, beta=beta, reduction="none"
        )  # fmt: skip
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_gradient_in_float64(device):
    """Finite differences agree, in several chunks."""
    student = layer(3, 3, 6, device, torch.float64)
    teacher = likeliest(3, 6, 2, device, torch.float64)
    torch.autograd.gradcheck(
        lambda h, w, b: linear_topk_kl_div(
            h, w, *teacher, linear_bias=b, chunk_bytes=96, softcap=6.0, temperature=1.5,
            beta=0.3, tail=True,
        ),
        [x.requires_grad_() for x in student],
    )  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_excluded_classes_make_no_nan(softcap, device):
    """Classes of -inf among the known and the others, and masked tokens, add nothing."""
    hidden, weight, bias = layer(4, 3, 9, device)
    bias[3:6] = -torch.inf
    indices = torch.tensor([[0, 3]] * 4, device=device)
    log_prob = torch.tensor([[-0.5, -torch.inf]] * 4, device=device)
    log_prob[1] = torch.nan
    mask = torch.tensor([True, False, True, True], device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    options = dict(tail=True, softcap=softcap, reduction="none", mask=mask)
    loss = linear_topk_kl_div(*leaves, indices, log_prob, linear_bias=bias, **options)
    grads = torch.autograd.grad(loss.sum(), leaves)
    kept = [0, 1, 2, 6, 7, 8]
    alone = linear_topk_kl_div(
        hidden, weight[kept], indices[:, :1], log_prob[:, :1], linear_bias=bias[kept], **options
    )
    wanted = torch.autograd.grad(alone.sum(), leaves)
    torch.testing.assert_close(loss, alone)
    assert loss[1] == 0
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_other_class_is_left(softcap, beta, device, path):
    """Others that are all excluded get no gradient, and the named ones that of a smaller layer."""
    hidden, weight, bias = layer(4, 3, 9, device)
    named = torch.tensor([2, 7], device=device)
    bias[[x for x in range(9) if x not in (2, 7)]] = -torch.inf
    log_prob = torch.randn(4, 2, device=device).log_softmax(-1)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss = linear_topk_kl_div(
        *leaves, named.expand(4, 2), log_prob, linear_bias=bias, softcap=softcap, beta=beta
    )
    grads = torch.autograd.grad(loss, leaves)
    alone = linear_topk_kl_div(
        hidden, weight[named], torch.tensor([[0, 1]] * 4, device=device), log_prob,
        linear_bias=bias[named], softcap=softcap, beta=beta,
    )  # fmt: skip
    torch.testing.assert_close(loss, alone)
    wanted = torch.autograd.grad(alone, leaves)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-6)


def test_a_class_outside_the_vocabulary_is_never_a_number(device, path):
    """It raises in the reference; in the kernel its row is nan, gradient included."""
    if path == "reference":  # on a GPU PyTorch's own kernel would stop all use of the device
        device = "cpu"
    hidden, weight, _ = layer(4, 3, 7, device)
    indices, log_prob = likeliest(4, 7, 2, device)
    indices[2, 1] = 7
    hidden.requires_grad_()
    if path == "reference":
        with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|out of range"):
            linear_topk_kl_div(hidden, weight, indices, log_prob)
        return
    loss = linear_topk_kl_div(hidden, weight, indices, log_prob, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [False, False, True, False]


def test_padding_stays_0(device):
    """Columns beyond the classes, which a product may read, get no gradient."""
    V = 70
    x = torch.zeros(3, 128, device=device)
    x[:, :V] = torch.randn(3, V, device=device) - 500
    indices, log_prob = likeliest(3, V, 2, device)
    log_p = torch.cat([log_prob, log_prob.new_full((3, 1), -1.0)], 1)
    counts, loss = torch.tensor([True, True, False], device=device), x.new_empty(3)
    topk_rows(x, V, indices, log_p, counts, x.new_ones(3), loss, Divergence(0.0, 1.0, 0.0, 0.0))
    assert (x[:, V:] == 0).all()
    assert (x[:2, :V] != 0).all()


def test_is_a_well_formed_operator(device):
    """It tells what it returns, with the teacher's classes in place of a layer."""
    hidden, weight, bias = layer(6, 8, 33, device, torch.bfloat16)
    indices, log_prob = likeliest(6, 33, 4, device)
    log_prob = torch.cat([log_prob, log_prob.new_full((6, 1), math.log(0.1))], 1)
    torch.library.opcheck(
        _operator.overload,
        (hidden, weight, bias, None, None, None, indices, log_prob, None,
         torch.rand(6, device=device), 4, True, True, True, 0.5, 2.0, 30.0, 0.0),
    )  # fmt: skip


H, W = torch.zeros(2, 3), torch.zeros(5, 3)
CLASSES, P = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("indices", "log_prob", "options", "message"),
    [
        (CLASSES[:1], P, {}, r"indices must be integers \[2, K\], got torch.int64 \[1, 2\]"),
        (P, P, {}, r"indices must be integers \[2, K\], got torch.float32"),
        (CLASSES[:, :0], P[:, :0], {}, "indices must name 1 to 5 classes of a token, got 0"),
        (CLASSES, P[:, :1], {}, r"log_prob must be floating point \[2, 2\], .* got torch.float32"),
        (CLASSES, P.clone().requires_grad_(), {}, r"pass log_prob.detach\(\)"),
        (CLASSES, P, dict(beta=1.0), "beta = 1 needs tail=True"),
        (CLASSES, P, dict(reduction="mean"), 'must be "none", "batchmean" or "sum"'),
        (CLASSES, P, dict(mask=CLASSES), r"mask must be bool \[2\]"),
    ],
)
def test_refuses_wrong_input(indices, log_prob, options, message):
    """An error names the operation, what must hold and what came."""
    with pytest.raises(ValueError, match=f"linear_topk_kl_div: .*{message}"):
        linear_topk_kl_div(H, W, indices, log_prob, **options)
