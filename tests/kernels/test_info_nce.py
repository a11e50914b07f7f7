"""Prove that info_nce equals its reference in either direction, for masks, temperature, chunks."""

import pytest
import torch
from check import check, refuses_a_second_derivative
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import runtime
from tritium.kernels.info_nce import info_nce, info_nce_reference


@pytest.fixture(params=["kernel", "rows"])
def path(request, monkeypatch):
    """Run a test twice: chunks by the kernel, and by the reference of their rows."""
    if request.param == "rows":
        monkeypatch.setattr(runtime, "_fallen", frozenset({"cross_entropy"}))


@given(
    B=st.integers(1, 7),
    D=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([0.07, 1.0, "learnt"]),
    symmetric=st.booleans(),
    normalize=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    chunk_bytes=st.sampled_from([None, 64]),
    kernel=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_every_combination_of_options(
    B, D, dtype, temperature, symmetric, normalize, masked, reduction, chunk_bytes, kernel, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Of length 0.1 at least: the gradient of a normalised row grows as its length shrinks.
    query, key = (torch.randn(2, B, D, device=device).sign() * 0.5).to(dtype)
    query, key = (x + 0.1 * torch.rand_like(x) for x in (query, key))
    inputs = [query, key]
    options = dict(symmetric=symmetric, normalize=normalize, reduction=reduction)
    options["negatives"] = torch.rand(B, B, device=device) < 0.6 if masked else None
    if temperature == "learnt":
        inputs.append(torch.tensor(0.3, device=device, dtype=dtype))
    else:
        options["temperature"] = temperature

    def of(loss, **more):
        def run(q, k, t=None):
            return loss(q, k, **options, **more, **({} if t is None else {"temperature": t}))

        return run

    # What is lost to rounding is relative to a similarity over the temperature, and to a gradient,
    # which is a difference of embeddings over the temperature.
    tau = 0.3 if temperature == "learnt" else temperature
    unit = (1.0 if normalize else D * 0.36) / tau
    unit *= 1 if dtype == torch.bfloat16 else 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_fallen", frozenset() if kernel else frozenset({"cross_entropy"}))
        check(of(info_nce, chunk_bytes=chunk_bytes), of(info_nce_reference), *inputs, unit=unit)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_in_float64(symmetric, device, path):
    query, key = torch.randn(2, 3, 2, device=device, dtype=torch.float64)
    negatives = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]], device=device, dtype=torch.bool)
    temperature = torch.tensor(0.5, device=device, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda q, k, t: info_nce(
            q, k, temperature=t, symmetric=symmetric, negatives=negatives, chunk_bytes=48
        ),
        [x.requires_grad_() for x in (query, key, temperature)],
    )


@pytest.mark.parametrize("options", [{}, dict(symmetric=True), dict(temperature=1.0)], ids=str)
def test_matches_its_reference_in_float64_exactly(options, device, path):
    query, key = torch.randn(2, 7, 4, device=device, dtype=torch.float64)
    torch.testing.assert_close(
        info_nce(query, key, chunk_bytes=100, **options), info_nce_reference(query, key, **options)
    )


def test_accuracy_is_that_of_retrieval(device, path):
    key = torch.eye(6, device=device)
    query = key[[0, 1, 2, 3, 3, 3]]  # the last two find another's key
    loss, accuracy = info_nce(query, key, return_accuracy=True)
    torch.testing.assert_close(accuracy.item(), 4 / 6)
    torch.testing.assert_close(loss, info_nce(query, key))


def test_accuracy_of_both_directions(device, path):
    # Row 0 is nearest to key 0, rows 1 and 2 to key 0, too; of keys 0, 1 and 2 each finds its own.
    key = torch.eye(3, device=device)
    query = torch.tensor([[1.0, 0, 0], [0.9, 0.4, 0], [0.9, 0, 0.4]], device=device)
    s = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
    own = torch.arange(3, device=device)
    one, other = (s.argmax(1) == own).float().mean(), (s.argmax(0) == own).float().mean()
    assert one != other
    accuracy = info_nce(query, key, symmetric=True, return_accuracy=True)[1]
    torch.testing.assert_close(accuracy, (one + other) / 2)


def test_the_own_key_always_counts(device, path):
    query, key = torch.randn(2, 4, 3, device=device)
    nothing = torch.zeros(4, 4, dtype=torch.bool, device=device)
    before = nothing.clone()
    loss = info_nce(query.requires_grad_(), key, negatives=nothing)
    loss.backward()
    assert loss.abs() < 1e-6
    assert query.grad.abs().max() < 1e-5
    assert torch.equal(nothing, before)


def test_one_pair_has_no_loss(device, path):
    query, key = torch.randn(2, 1, 3, device=device)
    assert info_nce(query, key).abs() < 1e-6


def test_never_stores_all_similarities(device, path):
    B, D, widest = 96, 4, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    widest = max(widest, x.numel())
            return result

    query, key = torch.randn(2, B, D, device=device).requires_grad_()
    with Watch():
        info_nce(query, key, symmetric=True, chunk_bytes=8 * B * 4).backward()
    assert widest <= 8 * B


# Dynamo's own warning.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(device):
    compiled = torch.compile(
        lambda q, k: info_nce(q, k, symmetric=True), fullgraph=True, backend="aot_eager"
    )
    query, key = torch.randn(2, 6, 4, device=device)
    torch.testing.assert_close(compiled(query, key), info_nce_reference(query, key, symmetric=True))


def test_refuses_a_second_derivative(device):
    query, key = torch.randn(2, 4, 3, device=device)
    refuses_a_second_derivative(info_nce, query.requires_grad_(), key.requires_grad_())


Q = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        (Q, Q[:3], {}, r"one shape, got .*\[4, 3\].* and .*\[3, 3\]"),
        (Q, Q.double(), {}, "one dtype, got torch.float32 and torch.float64"),
        (Q.long(), Q.long(), {}, r"query must be floating point \[B, D\], got torch.int64"),
        (Q[0], Q[0], {}, r"query must be floating point \[B, D\]"),
        (Q, Q, dict(temperature=0.0), "temperature must be above 0, got 0.0"),
        (Q, Q, dict(temperature=torch.ones(4)), r"temperature must be a scalar, got shape \[4\]"),
        (Q, Q, dict(negatives=torch.ones(4, 3).bool()), r"negatives must be bool \[4, 4\]"),
        (Q, Q, dict(negatives=torch.ones(4, 4)), r"negatives must be bool .*got torch.float32"),
        (Q, Q, dict(reduction="avg"), "info_nce: reduction must be"),
        (Q, Q, dict(chunk_bytes=0), "info_nce: chunk_bytes must be positive"),
    ],
)
def test_refuses_wrong_input(query, key, options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(query, key, **options)
