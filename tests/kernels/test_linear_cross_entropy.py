"""Prove that linear_cross_entropy equals its reference, whatever its chunks, options and inputs.

Every case runs twice: with the kernels, and with their PyTorch stand-in that serves a CPU.
"""

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _linear_cross_entropy, runtime
from tritium.kernels._linear_cross_entropy import _operator
from tritium.kernels.cross_entropy import cross_entropy
from tritium.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

IGNORE = -100
MODULE = _linear_cross_entropy


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def rows(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"cross_entropy"}))


def layer(T, D, V, device="cpu", dtype=torch.float32):
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    bias = torch.randn(V, device=device).to(dtype)
    target = torch.randint(V, (T,), device=device)
    return hidden, weight, bias, target


@given(
    T=st.integers(1, 5),
    D=st.integers(1, 20),
    V=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk_bytes=st.sampled_from([1, 700, None]),
    weighted=st.booleans(),
    biased=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 5.0]),
    logit_scale=st.sampled_from([1.0, -0.5]),
    soft=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    T, D, V, dtype, chunk_bytes, weighted, biased, label_smoothing, z_loss, softcap, logit_scale,
    soft, reduction, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, bias, target = layer(T, D, V, device, dtype)
    target[1::3] = IGNORE
    target = torch.randn(T, V, device=device).softmax(1) if soft else target
    options = dict(
        weight=torch.rand(V, device=device) + 0.1 if weighted else None,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=reduction,
    )
    inputs = (hidden, weight, bias) if biased else (hidden, weight)

    def actual(h, w, b=None):
        return linear_cross_entropy(h, w, target, linear_bias=b, chunk_bytes=chunk_bytes, **options)

    def definition(h, w, b=None):
        return linear_cross_entropy_reference(h, w, target, linear_bias=b, **options)

    # A gradient is a difference of sums whose terms are inputs times dloss, which reaches 3.
    unit = 4 * max(x.abs().max().item() for x in inputs)
    check(actual, definition, *inputs, unit=unit)


def test_gradients_do_not_depend_on_the_number_of_chunks(device):
    inputs = layer(64, 8, 50, device, torch.bfloat16)
    results = [gradients(*inputs, chunk_bytes=rows * 50 * 2) for rows in (64, 16, 1)]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)  # rounded to bfloat16 once


def gradients(hidden, weight, bias, target, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_weight_gradient_is_summed_in_float32(device):
    # 256 chunks of one row: a bfloat16 sum would be off by more than a percent.
    hidden, weight, _, target = layer(256, 4, 8, device, torch.bfloat16)
    exact = weight.double().requires_grad_()
    linear_cross_entropy_reference(hidden.double(), exact, target).backward()
    actual = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, actual, target, chunk_bytes=1).backward()
    assert (actual.grad - exact.grad).norm() < 0.003 * exact.grad.norm()


def test_one_chunk_of_bfloat16_sums_nothing_in_float32(device):
    # Its weight gradient is the product itself, rounded once.
    hidden, weight, _, target = layer(40, 64, 32, device, torch.bfloat16)
    target[3] = IGNORE
    check(
        lambda h, w: 3 * linear_cross_entropy(h, w, target),
        lambda h, w: 3 * linear_cross_entropy_reference(h, w, target),
        hidden, weight, unit=1.0,
    )  # fmt: skip
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*inputs, target)
    assert loss.grad_fn.saved_tensors[1].dtype == torch.bfloat16
    loss = linear_cross_entropy(*inputs, target, chunk_bytes=20 * 32 * 2)
    assert loss.grad_fn.saved_tensors[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("T", "D", "rows"),
    [
        (300, 100, 300),  # one chunk by the budget
        (484, 100, 484),  # D rows more than the budget's 384 cost no more memory
        (485, 100, 384),
        (1000, 500, 1000),  # 2 · D rows
        (1001, 500, 384),
    ],
)
def test_one_chunk_while_that_costs_no_more_memory(T, D, rows, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES_CPU", 400 * 1000 * 2)
    hidden = torch.empty(T, D)

    def planned(saves_memory, chunk_bytes=None):
        rows = MODULE.chunk_rows("op", hidden, 1000, torch.bfloat16, saves_memory, chunk_bytes)
        return min(rows, T)

    assert planned(saves_memory=True) == rows
    assert planned(saves_memory=False) == planned(True, chunk_bytes=400 * 1000 * 2) == min(384, T)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adds_the_weight_gradient_to_a_buffer(reduction, dtype, device):
    hidden, weight, bias, target = layer(9, 3, 7, device, dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    before = torch.randn(7, 3, device=device)
    buffer = before.clone()
    options = dict(reduction=reduction, chunk_bytes=4 * 7 * dtype.itemsize)

    def loss(**more):
        return linear_cross_entropy(*leaves[:2], target, linear_bias=bias, **options, **more)

    dloss = torch.rand_like(loss())
    expected = torch.autograd.grad(loss(), leaves, dloss)
    loss(linear_weight_grad=buffer).backward(dloss)
    assert weight.grad is None
    # What autograd hands over is rounded to the dtype of the weight, and so are the gradients of
    # the logits of either path, each as large as |dloss|, before they meet |hidden| in the product.
    terms = dloss.abs().max() * hidden.detach().float().abs().sum(0)
    room = 2 * torch.finfo(dtype).eps * terms.expand(7, 3) + 1e-6
    assert ((buffer - before - expected[1].float()).abs() <= room).all()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(bias.grad, expected[2])


def test_statistics(device):
    hidden, weight, bias, target = layer(9, 3, 7, device)
    target[4] = IGNORE
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    options = dict(softcap=5.0, logit_scale=2.0, return_stats=True)
    loss, stats = linear_cross_entropy(
        *inputs, target, linear_bias=bias, chunk_bytes=4 * 7 * 4, **options
    )  # fmt: skip
    logits = torch.nn.functional.linear(hidden, weight, bias).detach()
    expected_loss, expected = cross_entropy(logits, target, **options)
    torch.testing.assert_close(loss, expected_loss)
    for actual, torch_result in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual, torch_result)
        assert not actual.requires_grad
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(*inputs, target, linear_bias=bias, reduction="none", **options)[1],
            stats,
        )


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_for_one_input_only(wanted, device):
    hidden, weight, bias, target = layer(5, 3, 7, device)
    check(
        lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b),
        lambda h, w, b: linear_cross_entropy_reference(h, w, target, linear_bias=b),
        hidden, weight, bias, needs_grad=[wanted], unit=1.0,
    )  # fmt: skip


def test_computes_no_gradient_unasked(device, monkeypatch):
    hidden, weight, _, target = layer(5, 3, 7, device)
    called = []
    rows = MODULE.loss_rows
    monkeypatch.setattr(MODULE, "loss_rows", lambda *args: called.append(args[-1]) or rows(*args))
    linear_cross_entropy(hidden, weight, target)
    with torch.no_grad():
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), target)
    assert called == [False, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_in_float64(reduction, device):
    hidden, weight, bias, target = (
        x.double() if x.is_floating_point() else x for x in layer(3, 2, 5, device)
    )
    options = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=6.0)
    torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(
            h, w, target, linear_bias=b, chunk_bytes=64, **options
        ),
        [x.requires_grad_() for x in (hidden, weight, bias)],
    )


def test_scales_by_the_incoming_gradient_twice(device):
    hidden, weight, _, target = layer(5, 3, 7, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target)
    first, second = (
        torch.autograd.grad(loss, hidden, loss.new_tensor(g), retain_graph=True)[0]
        for g in (1.0, -3.0)
    )
    torch.testing.assert_close(second, -3 * first)


def test_all_targets_ignored(device):
    hidden, weight, _, target = layer(5, 3, 7, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target.fill_(IGNORE))
    loss.backward()
    assert loss.isnan()  # the mean of nothing, as in PyTorch
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_over_targets_of_weight_0_has_pytorchs_gradient(device, dtype):
    """It is nan in the rows that count, in every dtype, and 0 in ignored ones."""
    hidden, weight, _, target = layer(5, 3, 7, device, dtype)
    target[0] = IGNORE
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, target, weight=weight.new_zeros(7)).backward()
    assert (hidden.grad[0] == 0).all()
    assert hidden.grad[1:].isnan().all()


def test_leading_axes_and_strided_inputs(device):
    hidden = torch.randn(2, 3, 10, device=device)
    weight = torch.randn(5, 14, device=device)
    target = torch.tensor([[0, 1, 2], [3, 4, IGNORE]], device=device)
    check(
        lambda h, w: linear_cross_entropy(
            h[..., ::2], w.T[4:9].contiguous(), target, reduction="none"
        ),
        lambda h, w: linear_cross_entropy_reference(
            h[..., ::2].reshape(-1, 5), w.T[4:9], target.view(-1), reduction="none"
        ).view(2, 3),
        hidden, weight, unit=8.0,
    )  # fmt: skip
    strided = torch.randn(7, 5, device=device).T  # weight [V, D] with unit stride along V
    torch.testing.assert_close(
        linear_cross_entropy(hidden[..., :7], strided, target),
        linear_cross_entropy(hidden[..., :7].contiguous(), strided.contiguous(), target),
    )


def test_zero_tokens(device):
    hidden, weight, _, target = layer(0, 3, 7, device)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), target, reduction="sum")
    loss.backward()
    assert loss == 0
    assert (weight.grad == 0).all()


def test_autocast_runs_the_products_low_and_keeps_the_weight_gradient_wide(device):
    hidden, weight, _, target = layer(64, 16, 32, device)
    weight.requires_grad_()
    low = weight.detach().bfloat16().requires_grad_()
    chunks = dict(chunk_bytes=32 * 32 * 2)  # two
    linear_cross_entropy(hidden.bfloat16(), low, target, **chunks).backward()
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, **chunks)
    loss.backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad.bfloat16(), low.grad)
    assert not torch.equal(weight.grad, low.grad.float())  # it was never rounded


def test_is_a_well_formed_operator(device):
    hidden, weight, bias, target = layer(6, 8, 33, device, torch.bfloat16)
    dloss = torch.rand(6, device=device)
    for wants in ((False, False, False), (True, True, True), (True, False, False)):
        for stats in (False, True):
            plan = (dloss, 6, True) if stats else (dloss, 4, False)
            options = (IGNORE, 0.1, 0.01, 30.0, 2.0, stats, 0, 0, "")
            torch.library.opcheck(
                _operator.overload,
                (hidden, weight, bias, target, None, None, *plan, *wants, *options),
            )


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(reduction, device):
    hidden, weight, bias, target = layer(6, 8, 33, device)
    compiled = torch.compile(
        lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction),
        fullgraph=True,
        backend="aot_eager",
    )
    check(
        compiled,
        lambda h, w, b: linear_cross_entropy_reference(
            h, w, target, linear_bias=b, reduction=reduction
        ),
        hidden, weight, bias, unit=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_refuses_a_second_derivative(reduction, device):
    hidden, weight, _, target = layer(4, 3, 7, device)
    refuses_a_second_derivative(
        lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction),
        hidden.requires_grad_(), weight.requires_grad_(),
    )  # fmt: skip


@pytest.mark.parametrize("target", [-1, 7])
def test_a_target_outside_the_vocabulary_is_never_a_number(target, device, request):
    hidden, weight, _, targets = layer(4, 3, 7, device)
    targets[2] = target
    hidden.requires_grad_()
    if "reference" in request.node.name:
        with pytest.raises(IndexError):
            linear_cross_entropy(hidden, weight, targets)
    else:
        assert linear_cross_entropy(hidden, weight, targets).isnan()


H, W, T = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "options", "message"),
    [
        (H, W[:, :2], T, {}, r"linear_weight must have shape \[V, 3\], got \[5, 2\]"),
        (H, W, T[:1], {}, r"target must have shape \[2\], got \[1\]"),
        (H.long(), W, T, {}, "input must be floating point, got torch.int64"),
        (
            H,
            W,
            T,
            dict(linear_bias=torch.zeros(4)),
            r"linear_bias must have shape \[5\], got \[4\]",
        ),
        (H, W, T, dict(weight=torch.ones(4)), r"weight must have shape \[5\]"),
        (H, W, T, dict(chunk_bytes=0), "chunk_bytes must be positive, got 0"),
        (H, W, T, dict(softcap=-1.0), "softcap must be above 0"),
        (H, W, T.float(), {}, r"soft targets must have shape \[2, 5\], got \[2\]"),
        (H, W, T, dict(logit_scale=float("nan")), "logit_scale must be finite"),
        (
            H,
            W,
            T,
            dict(linear_weight_grad=W.bfloat16()),
            r"linear_weight_grad must be float32 \[5, 3\]",
        ),
        (
            H,
            W,
            T,
            dict(linear_weight_grad=W[1:]),
            r"linear_weight_grad must be float32 \[5, 3\], got .*\[4, 3\]",
        ),
        (H, W, T, dict(linear_weight_grad=W), "weight.requires_grad is False; set it"),
    ],
)
def test_refuses_wrong_input(hidden, weight, target, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, target, **options)
