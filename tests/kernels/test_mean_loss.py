"""Prove that the mean of a loss is that over the tokens that count, in one launch or two."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _mean_loss
from tritium.kernels._mean_loss import reduced, scale_of_mean

IGNORE = -100
KINDS = ["targets", "weights", "probabilities"]


def draw(T, V, kind, dtype, device):
    loss_T = torch.randn(T, device=device, dtype=dtype)
    if kind == "probabilities":
        return loss_T, torch.randn(T, V, device=device).softmax(1), None
    target_T = torch.randint(V, (T,), device=device)
    target_T[torch.rand(T, device=device) < 0.3] = IGNORE
    weight_V = torch.rand(V, device=device) + 0.1 if kind == "weights" else None
    return loss_T, target_T, weight_V


def expected(loss_T, target_T, weight_V):
    if target_T.is_floating_point():
        total = torch.tensor(float(len(loss_T)), dtype=torch.float64, device=loss_T.device)
    else:
        counts_T = (target_T != IGNORE).double()
        weights_V = counts_T.new_ones(int(target_T.max()) + 1) if weight_V is None else weight_V
        total = (counts_T * weights_V.double()[target_T.clamp_min(0)]).sum()
    return loss_T.double().sum() / total, 1 / total


@given(
    T=st.integers(1, 400),
    V=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    block=st.sampled_from([16, 64]),
    p_max=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1 << 30),
)
def test_is_the_sum_by_the_weight_of_what_counts(T, V, kind, dtype, block, p_max, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss_T, target_T, weight_V = draw(T, V, kind, dtype, device)
    if kind != "probabilities":
        target_T[seed % T] = seed % V  # at least one counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mean_loss, "BLOCK", block)
        patch.setattr(_mean_loss, "P_MAX", p_max)
        mean, scale = reduced(loss_T, target_T, weight_V, IGNORE, "mean")
        alone = scale_of_mean(target_T, weight_V, IGNORE, dtype)
    exact, exact_scale = expected(loss_T, target_T, weight_V)
    # Two sums of T numbers in the dtype of the loss, each addition rounded, and their ratio.
    unit = torch.finfo(dtype).eps * (T + 2)
    largest = loss_T.double().abs().sum() * exact_scale
    assert mean.dtype == scale.dtype == alone.dtype == dtype
    assert (mean - exact).abs() <= unit * largest
    assert (scale - exact_scale).abs() <= unit * exact_scale
    assert torch.equal(alone, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_more_tokens_than_a_program_sums(kind, device):
    loss_T, target_T, weight_V = draw(2 * _mean_loss.BLOCK + 5, 7, kind, torch.float32, device)
    mean, scale = reduced(loss_T, target_T, weight_V, IGNORE, "mean")
    exact, exact_scale = expected(loss_T, target_T, weight_V)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)
    if kind != "weights":
        assert scale == exact_scale.float()


@pytest.mark.parametrize("T", [0, 3])
def test_a_mean_over_nothing_is_nan(T, device):
    target_T = torch.full((T,), IGNORE, device=device)
    mean, scale = reduced(torch.zeros(T, device=device), target_T, None, IGNORE, "mean")
    assert mean.isnan()
    assert scale is not None
    assert scale.isnan()
    assert scale_of_mean(target_T, None, IGNORE, torch.float32).isnan()


def test_weights_of_zero_leave_nothing_to_divide_by(device):
    target_T, weight_V = torch.tensor([1, 1], device=device), torch.tensor([1.0, 0.0]).to(device)
    mean, _ = reduced(torch.ones(2, device=device), target_T, weight_V, IGNORE, "mean")
    assert mean.isnan()


def test_a_target_of_no_class_reads_no_weight(device):
    target_T = torch.tensor([0, 5, -1], device=device)
    weight_V = torch.full((9,), torch.nan, device=device)[2:4]
    weight_V.fill_(2.0)  # what is beside it is nan
    assert scale_of_mean(target_T[:1], weight_V, IGNORE, torch.float32) == 0.5
    assert scale_of_mean(target_T, weight_V, IGNORE, torch.float32).isfinite()


def test_is_a_well_formed_operator(device):
    for kind in KINDS:
        _, target_T, weight_V = draw(5, 3, kind, torch.float32, device)
        given = (target_T, weight_V, IGNORE, torch.float32)
        torch.library.opcheck(scale_of_mean.overload, given)
