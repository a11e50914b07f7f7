"""Prove that linear_kl_div equals its reference, whatever its chunks, options and inputs.

Every case runs twice: with the kernels, and with their PyTorch stand-in that serves a CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st
from layers import layer

from tritium.kernels import _linear_kl_div as module
from tritium.kernels import runtime
from tritium.kernels._kl_div_rows import Divergence, rows
from tritium.kernels._linear_kl_div import _launch, _operator
from tritium.kernels.linear_kl_div import linear_kl_div, linear_kl_div_reference
from tritium.model.activation_checkpointing import Ledger

PLAIN = Divergence(0.0, 1.0, 0.0, 0.0)


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"linear_kl_div"}))
    return request.param


def compare(student, teacher, unit, **options):
    """Check the loss, and the gradients of the student's `layer`."""
    chunk_bytes = options.pop("chunk_bytes", None)

    def arguments(h, w, b=None):
        th, tw, tb = (x.to(h.dtype) for x in teacher)
        return (h, w, th, tw), dict(linear_bias=b, teacher_bias=tb, **options)

    def actual(*inputs):
        args, named = arguments(*inputs)
        return linear_kl_div(*args, chunk_bytes=chunk_bytes, **named)

    def definition(*inputs):
        args, named = arguments(*inputs)
        return linear_kl_div_reference(*args, **named)

    check(actual, definition, *student, unit=unit)


@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 9), st.integers(1, 200)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    chunk_bytes=st.sampled_from([1, 1400, None]),
    biased=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["batchmean", "sum", "none"]),
    beta=st.sampled_from([0.0, 1.0, 0.5, 0.1]),
    temperature=st.sampled_from([1.0, 2.0, 0.7]),
    softcap=st.sampled_from([None, 5.0]),
    teacher_softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(sizes, dtype, biased, masked, seed, **options):
    """Losses and all gradients err no more than PyTorch's do."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, D, E, V = sizes
    student = layer(T, D, V, device, dtype)[: 3 if biased else 2]
    if masked:
        options["mask"] = torch.arange(T, device=device) % 3 != 1
    # A gradient is a difference of terms: inputs times logarithms times what comes in.
    unit = 16 * max(x.abs().max().item() for x in student) / options["temperature"]
    compare(student, layer(T, E, V, device, dtype), unit, **options)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("V", [4096, 4100])
def test_rows_longer_than_a_block(V, beta, device):
    """Complete blocks, tails and padded columns all get their part, whatever is largest."""
    student, teacher = layer(3, 4, V, device), layer(3, 2, V, device)
    student[2][V - 1], teacher[2][0] = 9.0, 8.0
    mask = torch.tensor([True, True, False], device=device)
    compare(student, teacher, 16.0, beta=beta, mask=mask)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_is_the_divergence_of_pytorch_in_any_shape(beta, device):
    """Forward, reverse and between are made of PyTorch's kl_div, in the shape of the tokens."""
    student, teacher = layer(6, 4, 11, device), layer(6, 3, 11, device)
    log_q, log_p = (F.linear(*x).view(2, 3, 11).log_softmax(-1) for x in (student, teacher))

    def kl(a, b):  # PyTorch's order: of the second from the first
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    wanted = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    wanted = {0.0: kl(log_p, log_q), 1.0: kl(log_q, log_p)}.get(beta, wanted)
    tensors = student[0].view(2, 3, 4), student[1], teacher[0].view(2, 3, 3), teacher[1]
    options = dict(linear_bias=student[2], teacher_bias=teacher[2], beta=beta)
    for reduction, value in (("none", wanted), ("batchmean", wanted.mean()), ("sum", wanted.sum())):
        torch.testing.assert_close(linear_kl_div(*tensors, **options, reduction=reduction), value)
    student[1].requires_grad_()
    linear_kl_div(
        student[0][:0], student[1], teacher[0][:0], teacher[1], reduction="sum"
    ).backward()
    assert (student[1].grad == 0).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_extremes_make_no_nan(beta, softcap, device):
    """Equal distributions diverge by 0; a class that neither has, and a masked token, by nothing.

    A class that the teacher alone excludes costs the reverse divergence at most 10,000 nats.
    """
    hidden, weight, bias = layer(4, 3, 9, device)
    bias[5:] = -torch.inf
    bias[2] = 200.0
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    teacher = [x.detach().clone() for x in leaves]
    teacher[0][1] = torch.nan
    mask = torch.tensor([True, False, True, True], device=device)
    options = dict(beta=beta, mask=mask, reduction="none", linear_bias=bias)
    options |= dict(softcap=softcap, teacher_softcap=softcap)
    loss = linear_kl_div(*leaves, *teacher, teacher_bias=bias, **options)
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert loss.abs().max() < 1e-6
    assert all(g.abs().max() < 1e-6 for g in grads)
    alone = torch.tensor([0.0, -torch.inf, *[0.0] * 7], device=device)
    loss = linear_kl_div(*leaves, *teacher, teacher_bias=alone, **(options | {"linear_bias": None}))
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert (loss >= 0).all()
    assert (loss < 1e4).all()
    assert (loss[0] > 100) == (beta == 1)
    assert all(g.isfinite().all() for g in grads)


def test_gradient_in_float64(device):
    """Finite differences agree, in several chunks."""
    student, teacher = (layer(3, D, 5, device, torch.float64) for D in (3, 2))
    torch.autograd.gradcheck(
        lambda h, w, b: linear_kl_div(
            h, w, *teacher[:2], linear_bias=b, chunk_bytes=160, softcap=6.0, temperature=1.5,
            beta=0.3,
        ),
        [x.requires_grad_() for x in student],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.bfloat16, "batchmean"), (torch.float32, "none")], ids=str
)
def test_no_result_depends_on_the_number_of_chunks(dtype, reduction, device):
    """Loss and gradients are equal bit for bit where the products are exact.

    The inputs are such that no sum of a product rounds, whatever its order: one token has a number
    in a feature, and one class.
    """
    T, D, V = 24, 40, 56
    pairs = []
    for _ in range(2):
        hidden, weight = torch.zeros(T, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
        hidden[torch.arange(D) % T, torch.arange(D)] = torch.randint(-4, 5, (D,)).to(dtype)
        weight[torch.randperm(V)[:D], torch.arange(D)] = 0.5
        pairs.append([hidden.to(device), weight.to(device)])
    dloss = torch.rand(T, device=device) if reduction == "none" else torch.tensor(1.0)
    results = []
    for chunk in (T, 7, 1):
        leaves = [x.clone().requires_grad_() for x in pairs[0]]
        loss = linear_kl_div(
            *leaves, *pairs[1], chunk_bytes=2 * chunk * V * dtype.itemsize, reduction=reduction,
            beta=0.5,
        )  # fmt: skip
        loss.backward(dloss.to(loss))
        results.append([loss.detach(), *(x.grad for x in leaves)])
    assert results[0][-1].count_nonzero() > D
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_product(frozen, device, monkeypatch):
    """A head without gradient has no dweight, a hidden state without gradient no dhidden."""
    (hidden, weight, _), teacher = layer(12, 4, 9, device), layer(12, 5, 9, device)[:2]
    (weight if frozen == "hidden" else hidden).requires_grad_()
    shapes, product = [], module._product
    monkeypatch.setattr(
        module, "_product",
        lambda a, b, out, **k: shapes.append(tuple(out.shape)) or product(a, b, out, **k),
    )  # fmt: skip
    linear_kl_div(hidden, weight, *teacher, chunk_bytes=8 * 9 * 4).backward()
    assert shapes == [(9, 4) if frozen == "hidden" else (4, 4)] * 3


def test_a_float16_gradient_survives_until_its_loss_scale(device):
    """Gradients of 1e-8 per logit, which float16 cannot hold, reach the weights scaled."""
    hidden, weight, _ = layer(64, 8, 20, device, torch.float16)
    hidden *= 5e-4  # nearly the same probability everywhere, so that little is to be moved
    teacher = [(x.float() * 1.05).half() for x in (hidden, weight)]
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    grads = torch.autograd.grad(linear_kl_div(*leaves, *teacher) * 2**14, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss = linear_kl_div_reference(*exact, *(x.double() for x in teacher)) * 2**14
    for x, e in zip(grads, torch.autograd.grad(loss, exact), strict=True):
        assert (x - e).norm() < 0.05 * e.norm()


def test_the_mean_is_over_the_tokens_that_count(device, path):
    student, teacher = layer(9, 3, 20, device)[:2], layer(9, 4, 20, device)[:2]
    mask = torch.arange(9, device=device) % 3 != 1
    each = linear_kl_div(*student, *teacher, mask=mask, reduction="none")
    mean = linear_kl_div(*student, *teacher, mask=mask)
    torch.testing.assert_close(mean, each[mask].mean())
    assert each[~mask].tolist() == [0.0] * 3


def test_logits_exist_in_chunks_only(path, device):
    """Beside the gradients one chunk of both logits exists, and a little per token."""
    T, D, V, C = 64, 8, 640, 4
    (hidden, weight, _), teacher = layer(T, D, V, device), layer(T, D, V, device)
    dloss, mask = torch.ones(T, device=device), torch.ones(T, device=device) > 0
    tensors = hidden, weight, None, *teacher, None, None, mask, dloss
    with Ledger([x for x in tensors if x is not None]) as ledger:
        _launch(*tensors, C, True, True, False, PLAIN)
    gradients, logits = 4 * (T + T * D + V * D), 4 * 2 * C * V
    copies = 5 if path == "reference" else 1  # the kernel makes none
    assert gradients + logits <= ledger.peak <= gradients + copies * logits + 16 * C
    assert ledger.peak < 4 * T * V


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_padding_stays_0(beta, device):
    """Columns beyond the classes, which a product may read, get no gradient."""
    V = 70
    x, y = torch.zeros(2, 3, 128, device=device)
    x[:, :V], y[:, :V] = torch.randn(2, 3, V, device=device) - 500
    counts, loss = torch.tensor([True, True, False], device=device), x.new_empty(3)
    rows(x, y, V, counts, x.new_ones(3), loss, PLAIN._replace(beta=beta))
    assert (x[:, V:] == 0).all()
    assert (x[:2, :V] != 0).all()


def test_is_a_well_formed_operator(device):
    """It tells what it returns, for every gradient that is wanted or not."""
    hidden, weight, bias = layer(6, 8, 33, device, torch.bfloat16)
    teacher, mask = layer(6, 5, 33, device, torch.bfloat16), torch.arange(6, device=device) > 0
    for wants, beta in (((True, True, True), 0.0), ((True, False, False), 0.5)):
        torch.library.opcheck(
            _operator.overload,
            (hidden, weight, bias, *teacher, None, None, mask, torch.rand(6, device=device), 4,
             *wants, beta, 2.0, 30.0, 20.0),
        )  # fmt: skip


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device):
    """torch.compile captures a distillation loss whole."""
    student, teacher = layer(6, 8, 33, device)[:2], layer(6, 5, 33, device)[:2]
    compiled = torch.compile(
        lambda h, w: linear_kl_div(h, w, *teacher),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    check(
        compiled,
        lambda h, w: linear_kl_div_reference(
            h, w, *(x.to(h.dtype) for x in teacher)
        ),
        *student, unit=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_refuses_a_second_derivative(reduction, device):
    """A gradient penalty raises; it is not dropped."""
    (hidden, weight, _), teacher = layer(4, 3, 7, device), layer(4, 3, 7, device)[:2]
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    refuses_a_second_derivative(
        lambda h, w: linear_kl_div(h, w, *teacher, reduction=reduction), *leaves
    )


H, W = torch.zeros(2, 3), torch.zeros(5, 3)
TH, TW = torch.zeros(2, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((H, W[:, :2], TH, TW), {}, r"linear_weight must have shape \[V, 3\], got \[5, 2\]"),
        ((H, W, TH[:1], TW), {}, r"teacher_input must be .* \[2, E\], got torch.float32 \[1, 4\]"),
        ((H, W, TH.long(), TW), {}, "teacher_input must be floating point .* torch.int64"),
        ((H, W, TH, TW[:4]), {}, r"teacher_weight must have shape \[5, 4\], .* got \[4, 4\]"),
        ((H, W, TH, TW), dict(teacher_bias=H[0]), r"teacher_bias must have shape \[5\], got \[3\]"),
        ((H, W, TH, TW.clone().requires_grad_()), {}, r"pass teacher_weight.detach\(\)"),
        ((H, W, TH, TW), dict(mask=H[:, 0]), r"mask must be bool \[2\], .* torch.float32 \[2\]"),
        ((H, W, TH, TW), dict(reduction="mean"), "'mean'; PyTorch's mean divides by the classes"),
        ((H, W, TH, TW), dict(beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
        ((H, W, TH, TW), dict(temperature=0.0), "temperature must be above 0, got 0.0"),
        ((H, W, TH, TW), dict(temperature=torch.ones(())), "temperature must be a number"),
        ((H, W, TH, TW), dict(teacher_softcap=-1.0), "teacher_softcap must be above 0"),
        ((H, W, TH, TW), dict(chunk_bytes=0), "chunk_bytes must be positive, got 0"),
    ],
)
def test_refuses_wrong_input(tensors, options, message):
    """An error names the operation, what must hold and what came."""
    with pytest.raises(ValueError, match=f"linear_kl_div: .*{message}"):
        linear_kl_div(*tensors, **options)
