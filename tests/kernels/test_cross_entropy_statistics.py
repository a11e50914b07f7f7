"""Prove that the statistics of cross_entropy are those of its logits, from either path."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import runtime
from tritium.kernels.cross_entropy import cross_entropy

IGNORE = -100


@given(
    T=st.integers(1, 4),
    V=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([0.1, 3.0, 80.0]),
    softcap=st.sampled_from([None, 5.0]),
    logit_scale=st.sampled_from([1.0, -0.5]),
    inplace=st.booleans(),
    path=st.sampled_from(["kernel", "reference"]),
    seed=st.integers(0, 1 << 30),
)
def test_statistics(T, V, dtype, size, softcap, logit_scale, inplace, path, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (torch.randn(T, V, device=device) * size).to(dtype)
    target = torch.randint(V, (T,), device=device)
    target[torch.rand(T, device=device) < 0.2] = IGNORE
    options = dict(softcap=softcap, logit_scale=logit_scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "REFERENCE", path == "reference")
        x = logits.requires_grad_() * 1
        loss, stats = cross_entropy(x, target, inplace=inplace, return_stats=True, **options)
    z = logits.detach().double() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p, counts = z.log_softmax(1), target != IGNORE
    expected = dict(
        lse=z.logsumexp(1),
        entropy=-(log_p * log_p.exp()).sum(1),
        target_log_probability=log_p.gather(1, target.clamp_min(0)[:, None])[:, 0],
    )
    for name, value in expected.items():
        actual = getattr(stats, name)
        assert actual.dtype == torch.float32
        assert not actual.requires_grad
        # Numbers of the size of the logits, some of which cancel.
        room = 4e-6 * max(1.0, z.abs().max().item())
        torch.testing.assert_close(
            actual, value.where(counts, 0).float(), rtol=1e-5, atol=room, msg=name
        )
    best = stats.argmax.clamp_min(0)[:, None]
    assert torch.equal(stats.argmax == -1, ~counts)
    near = z.gather(1, best)[:, 0] >= z.amax(1) - 1e-6 * size  # a tie in float32 counts
    assert near[counts].all()
    hits = (stats.argmax == target) & counts
    torch.testing.assert_close(stats.accuracy, hits.sum() / counts.sum(), equal_nan=True)
    plain = cross_entropy(logits.detach(), target, **options)
    torch.testing.assert_close(loss.detach(), plain, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_of_rows_longer_than_a_block(inplace, device):
    V = 3 * 8192 + 100
    logits = torch.randn(3, V, device=device)
    logits[0, [100, 100 + 8192, V - 1]] = 20.0  # the first of equals, two in one lane
    logits[1] = torch.linspace(-30, 30, V, device=device)  # the maximum grows in every block
    logits[2, 17000] = 9.0
    target = torch.tensor([100, 5, 17000], device=device)
    x = logits.requires_grad_() * 1
    stats = cross_entropy(x, target, inplace=inplace, return_stats=True)[1]
    log_p = logits.detach().double().log_softmax(1)
    assert stats.argmax.tolist() == [100, V - 1, 17000]
    entropy = -(log_p * log_p.exp()).sum(1)
    torch.testing.assert_close(stats.entropy, entropy.float(), rtol=1e-5, atol=1e-5)
    expected = log_p.gather(1, target[:, None])[:, 0].float()
    torch.testing.assert_close(stats.target_log_probability, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_of_unusual_rows(inplace, device, path):
    logits = torch.tensor(
        [[2.0, 5.0, 5.0, 1.0], [-math.inf, 0.0, -math.inf, 0.0], [-math.inf] * 4, [math.nan] * 4],
        device=device,
    )
    target = torch.tensor([1, 3, 0, 0], device=device)
    stats = cross_entropy(
        logits.requires_grad_() * 1, target, inplace=inplace, return_stats=True
    )[1]  # fmt: skip
    assert stats.argmax[:2].tolist() == [1, 1]  # the first of equals
    torch.testing.assert_close(stats.entropy[1].item(), math.log(2))
    torch.testing.assert_close(stats.target_log_probability[1].item(), -math.log(2))
    assert stats.entropy[3].isnan()


def test_statistics_of_soft_targets_and_of_shapes(device, path):
    logits = torch.randn(2, 5, 3, device=device)
    soft = logits.softmax(1)
    loss, stats = cross_entropy(logits, soft, reduction="none", return_stats=True)
    assert loss.shape == stats.lse.shape == stats.argmax.shape == (2, 3)
    assert stats.accuracy is None
    # A distribution's cross-entropy with itself is its entropy.
    torch.testing.assert_close(loss, stats.entropy)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, soft, reduction="none")
    )
    assert torch.equal(stats.argmax, logits.argmax(1))
