"""Prove that cross_entropy computes its reference and gradient, for every option and bad input."""

import math

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels._cross_entropy_options import LossOptions
from tritium.kernels.cross_entropy import (
    _backward,
    _forward,
    _inplace,
    cross_entropy,
    cross_entropy_reference,
)
from tritium.kernels.runtime import references

IGNORE = -100


def random_targets(T, V, ignored, ignore_index=IGNORE):
    target = torch.randint(V, (T,))
    return torch.where(torch.rand(T) < ignored, ignore_index, target)


def random_probabilities(T, V, dtype):
    return torch.randn(T, V).softmax(1).to(dtype)


def check_both(logits, target, weight, options, unit):
    """Compare the plain and the in-place kernel with the reference; `unit` is that of a loss."""

    def reference(x):
        return cross_entropy_reference(x, target, weight=weight, **options)

    def plain(x):
        return cross_entropy(x, target, weight=weight, **options)

    def inplace(x):  # of a product, because a leaf is refused
        return cross_entropy(x * 1, target, weight=weight, inplace=True, **options)

    check(plain, reference, logits, unit=unit)
    check(inplace, reference, logits, unit=unit)


@given(
    T=st.integers(1, 4),
    V=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.1, 3.0, 80.0]),
    ignored=st.sampled_from([0.0, 0.3]),
    soft=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    logit_scale=st.sampled_from([1.0, 0.25, -1.5]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    T, V, dtype, size, ignored, soft, weighted, label_smoothing, z_loss, softcap, logit_scale,
    reduction, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (torch.randn(T, V, device=device) * size).to(dtype)
    target = random_targets(T, V, ignored).to(device)
    target[0] = seed % V  # at least one counts
    target = random_probabilities(T, V, dtype).to(device) if soft else target
    weight = torch.rand(V, device=device) + 0.1 if weighted else None
    options = dict(
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
        reduction=reduction,
    )  # fmt: skip
    # A loss is a difference of numbers of the logits' size and of log(V), or a sum of T such; a
    # gradient one of numbers near 1, but of soft targets, where no element is written from float32
    # again, of numbers near dloss, 4.
    unit = max(1.0, logits.abs().max().item()) * abs(logit_scale) + math.log(V)
    unit *= T if reduction == "sum" else 1
    check_both(logits, target, weight, options, unit=4 * max(1.0, unit) if soft else unit)


@pytest.mark.parametrize("V", [4096, 4097, 8200, 50257])
def test_rows_longer_than_a_block(V, device):
    logits = torch.randn(3, V, device=device) * 4
    target = torch.tensor([0, V - 1, IGNORE], device=device)
    weight = torch.rand(V, device=device) + 0.5
    # The unit is twice the softcap: its tanh is good to two units in the last place.
    check_both(logits, target, weight, dict(label_smoothing=0.1, softcap=20.0), unit=40.0)
    soft = random_probabilities(3, V, torch.float32).to(device)
    check_both(logits, soft, weight, dict(label_smoothing=0.1, logit_scale=2.0), unit=40.0)


def test_bfloat16_gradient_of_a_nearly_certain_target(device):
    logits = torch.zeros(1, 64, device=device, dtype=torch.bfloat16)
    logits[0, 3] = 11.0  # p = 0.999: rounding p before subtracting 1 would lose the gradient
    target = torch.tensor([3], device=device)
    check_both(logits, target, None, {}, unit=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_ignores_padding(dtype, device):
    logits = torch.full((2, 65), -50.0, device=device, dtype=dtype)  # far below any padded lane
    check_both(logits, torch.tensor([0, 64], device=device), None, dict(softcap=30.0), unit=50.0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(label_smoothing=0.2, z_loss=0.1, softcap=9.0, logit_scale=1.5)]
)
def test_gradient_in_float64(options, soft, device):
    logits = torch.randn(3, 7, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, IGNORE, 6], device=device)
    target = random_probabilities(3, 7, torch.float64).to(device) if soft else target
    weight = torch.rand(7, device=device, dtype=torch.float64)
    inputs = (logits, target.requires_grad_(soft))
    torch.autograd.gradcheck(lambda x, t: cross_entropy(x, t, weight=weight, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(reduction="none"),
        dict(label_smoothing=0.2, z_loss=0.1, softcap=9.0, logit_scale=1.5),
    ],
)
def test_gradient_of_soft_targets(options, inplace, dtype, device):
    logits = (torch.randn(5, 33, device=device) * 8).to(dtype)
    weight = torch.rand(33, device=device)
    soft = random_probabilities(5, 33, dtype).to(device)

    def loss(f, **inplace):
        return lambda x, q: f(x * 1, q, weight=weight.to(x) if f is not cross_entropy else weight,
                              **options, **inplace)  # fmt: skip

    # lse - z is a difference of numbers of the logits' size, as the loss is.
    check(
        loss(cross_entropy, inplace=inplace), loss(cross_entropy_reference), logits, soft,
        unit=4 * logits.abs().max().item() * options.get("logit_scale", 1.0),
    )  # fmt: skip


def test_matches_torch_where_torch_has_the_option(device):
    logits = torch.randn(2, 5, 3, 4, device=device)  # classes on axis 1
    target = torch.randint(5, (2, 3, 4), device=device)
    for reduction in ("mean", "sum", "none"):
        actual = cross_entropy(logits, target, reduction=reduction, ignore_index=2)
        torch_result = torch.nn.functional.cross_entropy(
            logits, target, reduction=reduction, ignore_index=2
        )
        torch.testing.assert_close(actual, torch_result)
    torch.testing.assert_close(
        cross_entropy(logits[0, :, 0, 0], target[0, 0, 0]),
        torch.nn.functional.cross_entropy(logits[0, :, 0, 0], target[0, 0, 0]),
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_all_targets_ignored(inplace, device):
    logits = torch.full((3, 5), float("nan"), device=device, requires_grad=True)
    target = torch.full((3,), IGNORE, device=device)
    loss = cross_entropy(logits * 1, target, inplace=inplace)
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()  # the mean of nothing, as in PyTorch
    assert (dlogits == 0).all()
    assert cross_entropy(logits, target, reduction="sum") == 0


def test_ignored_rows_get_zero_gradient_whatever_they_hold(device):
    x = torch.tensor([[math.inf, math.nan, 0.0], [1.0, 2.0, 3.0]], device=device).requires_grad_()
    cross_entropy(x, torch.tensor([IGNORE, 1], device=device)).backward()
    assert (x.grad[0] == 0).all()
    assert x.grad[1].isfinite().all()


def test_ignore_index_inside_the_vocabulary(device):
    logits = torch.randn(4, 6, device=device)
    target = torch.tensor([0, 3, 0, 5], device=device)
    check_both(logits, target, None, dict(ignore_index=0), unit=4.0)


@pytest.mark.parametrize("target", [-1, 5, 1 << 40])
def test_a_target_outside_the_vocabulary_gives_nan_not_a_number(target, device):
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([target, 1], device=device), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert logits.grad.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-math.inf, 1.0, -math.inf], 0.0),  # masked classes
        ([1.0, -math.inf, -math.inf], math.inf),  # the target itself is masked
        ([-math.inf] * 3, math.nan),
        ([0.0, math.inf, 0.0], math.nan),
        ([0.0, 0.0, math.nan], math.nan),
        ([-1e38, 1e38, 0.0], 0.0),
        ([-3e38, -3e38, -3e38], math.log(3)),
    ],
    ids=str,
)
def test_extreme_logits_as_torch(row, expected, device):
    logits = torch.tensor([row], device=device)
    target = torch.tensor([1], device=device)
    loss = cross_entropy(logits, target)
    torch.testing.assert_close(loss, torch.tensor(expected, device=device), equal_nan=True)
    torch_result = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss, torch_result, equal_nan=True)


@pytest.mark.parametrize("stats", [False, True])
def test_leaves_the_callers_logits_alone(stats, device, path):
    logits = torch.randn(3, 8, device=device, requires_grad=True)
    before = logits.detach().clone()
    result = cross_entropy(logits, torch.tensor([1, 2, 3], device=device), return_stats=stats)
    (result[0] if stats else result).backward()
    assert torch.equal(logits, before)


def test_an_operator_sent_to_its_reference_leaves_logits_alone(device):
    # As a compiled function reaches it, once its operation has fallen back.
    logits, target = torch.randn(3, 8, device=device), torch.tensor([1, 2, 3], device=device)
    before = logits.clone()
    with references("cross_entropy"):
        loss, scale, *_ = _forward(logits, target, None, "mean", LossOptions(-100, 0, 0, 0, 1))
    torch.testing.assert_close(loss, cross_entropy_reference(before, target))
    assert scale == torch.tensor(1 / 3)
    assert torch.equal(logits, before)


def test_inplace_puts_the_gradient_into_the_logits(device):
    logits = torch.randn(3, 8, device=device, requires_grad=True) * 1
    target = torch.tensor([1, 2, 3], device=device)
    address, version = logits.data_ptr(), logits._version
    grads = []
    logits.register_hook(grads.append)
    loss = cross_entropy(logits, target, inplace=True)
    loss.backward(retain_graph=True)
    assert grads[0].data_ptr() == address
    assert logits._version > version
    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()


def test_inplace_overwrites_nothing_without_a_gradient(device):
    logits = torch.randn(3, 8, device=device)
    before = logits.clone()
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), torch.tensor([1, 2, 3], device=device), inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_scales_by_the_incoming_gradient(inplace, device):
    logits = torch.randn(3, 8, device=device)
    target = torch.tensor([1, 2, 3], device=device)
    check(
        lambda x: -3 * cross_entropy(x * 1, target, inplace=inplace),
        lambda x: -3 * cross_entropy_reference(x, target),
        logits,
        unit=3.0,
    )


def test_strided_logits_targets_and_gradients(device):
    wide = torch.randn(4, 20, device=device)
    target = torch.tensor([0, 9, 1, 9, 2, 9, 3, 9], device=device)[::2]
    for view in (lambda x: x[:, ::2], lambda x: x[:, 3:13], lambda x: x.T[:4, :4]):
        check(
            lambda x, view=view: cross_entropy(view(x), target, reduction="none"),
            lambda x, view=view: cross_entropy_reference(view(x), target, reduction="none"),
            wide,
            unit=4.0,
        )
    x = torch.randn(1, 10, device=device).requires_grad_()
    cross_entropy(x.expand(4, 10), target, reduction="none").backward(torch.ones(1).expand(4).to(x))
    assert x.grad.isfinite().all()


def test_zero_rows(device):
    logits = torch.randn(0, 5, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    loss = cross_entropy(logits, target, reduction="sum")
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_takes_any_integer_target(dtype, device):
    logits = torch.randn(3, 8, device=device)
    target = torch.tensor([1, 2, 3], device=device)
    assert torch.equal(cross_entropy(logits, target.to(dtype)), cross_entropy(logits, target))


def test_more_than_two_to_the_31_elements(device):
    # Only the pages that are touched exist: rows before the last are ignored, hence never read.
    if device == "cuda":
        T, V = (1 << 31) // 4096 + 2, 4096
    else:
        T, V = 3, 1 << 30  # the row index times the stride passes 2^31 by the third row
    logits = torch.empty_strided((T, 64), (V, 1), dtype=torch.float16, device=device)
    logits[-1] = torch.randn(64, device=device)
    target = torch.full((T,), IGNORE, device=device)
    target[-1] = 5
    expected = cross_entropy_reference(logits[-1:], target[-1:])
    torch.testing.assert_close(cross_entropy(logits, target), expected)


def test_is_a_well_formed_operator(device):
    x = torch.randn(4, 33, device=device, dtype=torch.bfloat16)
    target = torch.tensor([1, 0, IGNORE, 32], device=device)
    weight, dloss_T = torch.rand(33, device=device), torch.rand(4, device=device)
    for stats in (False, True):
        for aim in (target, x.softmax(1)):
            options = LossOptions(IGNORE, 0.1, 0.01, 30.0, 0.5, stats)
            for reduction in ("none", "sum", "mean"):
                given = (x, aim, weight, reduction, *options)
                torch.library.opcheck(_forward.overload, given)
                torch.library.opcheck(_inplace.overload, given)
            _, scale, values, _ = _forward(x, aim, weight, "mean", options)
            for dloss, factor in ((dloss_T, None), (dloss_T[0], scale)):
                given = (dloss, x, aim, weight, values, factor, *options)
                torch.library.opcheck(_backward.overload, given)


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
def test_compiles_without_graph_breaks(reduction, stats, device):
    target = torch.tensor([1, 2, IGNORE], device=device)
    options = dict(reduction=reduction, softcap=9.0, z_loss=0.1)

    def loss(x):
        result = cross_entropy(x, target, return_stats=stats, **options)
        return result[0] if stats else result

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = torch.randn(3, 16, device=device)
    check(compiled, lambda x: cross_entropy_reference(x, target, **options), logits, unit=4.0)


def test_refuses_a_second_derivative(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    target = torch.tensor([1, 2], device=device)
    refuses_a_second_derivative(lambda x: cross_entropy(x, target), x)
    refuses_a_second_derivative(lambda x: cross_entropy(1 * x, target, inplace=True), x)


X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (X, T[:1], {}, r"target must have shape \[2\], got \[1\]"),
        (X, T.float(), {}, r"soft targets must have shape \[2, 3\], got \[2\]"),
        (X, T.bool(), {}, r"class indices \(int64\) or probabilities, got torch.bool"),
        (X, T, dict(logit_scale=float("inf")), "logit_scale must be finite, got inf"),
        (X.long(), T, {}, "input must be floating point"),
        (X[:, :0], T, {}, "with V >= 1"),
        (X, T, dict(weight=torch.ones(2)), r"weight must have shape \[3\], got \[2\]"),
        (X, T, dict(weight=torch.ones(3, requires_grad=True)), "weight gets no gradient"),
        (X, T, dict(reduction="avg"), 'reduction must be "none", "mean" or "sum", got \'avg\''),
        (X, T, dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (X, T, dict(z_loss=-1.0), "z_loss must be at least 0, got -1.0"),
        (X, T, dict(softcap=0.0), "softcap must be above 0"),
        (torch.zeros(2, 3, requires_grad=True), T, dict(inplace=True), "overwrite a leaf"),
        (torch.zeros(3, 2, requires_grad=True).T * 1, T, dict(inplace=True), "contiguous rows"),
    ],
)
def test_refuses_wrong_input(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, target, **options)
