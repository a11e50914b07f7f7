"""Prove that errors are those of the inputs given, whatever the chunks of the truth."""

import math

import pytest
import torch
from doubling import CPU, SETTINGS, doubling
from hypothesis import given
from hypothesis import strategies as st

from tritium.bench import case, errors
from tritium.bench.operations import OPERATIONS, Make

CHUNKABLE = [name for name, operation in OPERATIONS.items() if not operation.whole]


def off(name: str):
    """An implementation in float32 that errs by 1 % of each output, and of each gradient."""
    operation = OPERATIONS[name]

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *ys):
            return tuple(1.01 * y for y in ys)

        @staticmethod
        def backward(ctx, *dys):
            return tuple(1.02 * dy for dy in dys)

    return lambda *xs: Off.apply(*errors.as_tuple(operation.eager(*xs)))


@pytest.mark.parametrize("name", CHUNKABLE)
@given(rows=st.integers(1, 40))
def test_the_chunks_change_nothing(name, rows):
    # A mean loss, per-row outputs, and gradients of weights are put together from the chunks.
    operation = OPERATIONS[name]
    small = {letter: min(size, 32) for letter, size in operation.smallest.items()}
    inputs = operation.inputs(Make(torch.float32, CPU), **small)
    if name == "rope" or name == "qk_norm_rope":
        rows = 1  # all tokens are of one sequence here
    found = errors.errors(off(name), operation.eager, inputs, operation.shared, rows)
    assert found["forward"] == pytest.approx(0.01, rel=1e-3)
    assert found["backward"] == pytest.approx(0.02, rel=1e-3)
    assert found["both"] == found["backward"]


def test_the_error_is_that_of_the_shape_timed():
    # Exact at the smallest shape, wrong beyond 4 rows: as a kernel that forgets its tail.
    operation = doubling()

    def wrong_beyond(x):
        return torch.cat([2 * x[:4], 3 * x[4:]])

    rows = {}
    for M in (4, 64):
        held = case.Case("softmax", operation, "two", {"M": M, "N": 8}, SETTINGS)
        held.functions["eager"] = wrong_beyond
        rows[M] = held.row("eager", "forward")
    assert rows[4].error == 0
    assert rows[64].error == pytest.approx(0.5, rel=0.1)


def test_memory_that_is_short_halves_the_chunk():
    sizes = []

    def truth(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return 2 * x

    x = torch.randn(16, 4, requires_grad=True)
    found = errors.errors(lambda x: 2 * x, truth, [x])
    assert sizes[:3] == [16, 8, 4]
    assert sizes[3:] == [2] * 8
    assert max(found.values()) < 1e-6


def test_a_row_too_many_for_the_memory_is_an_error():
    def truth(x):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        errors.errors(lambda x: 2 * x, truth, [torch.randn(4, 4, requires_grad=True)])


def test_a_gradient_that_is_not_finite_is_seen_beside_a_good_one():
    def infinite(x, w):
        return (x * w).sum(1) / 1.0

    x, w = torch.randn(8, 4, requires_grad=True), torch.ones(4, requires_grad=True)

    def spoiled(x, w):
        w.register_hook(lambda dw: dw * math.nan)
        return infinite(x, w)

    found = errors.errors(spoiled, infinite, [x, w], shared=(1,))
    assert math.isnan(found["backward"])
    assert math.isnan(found["both"])
    assert found["forward"] < 1e-6


def test_relative_error_is_that_of_the_worst_tensor():
    exact = [torch.full((4,), 2.0).double(), torch.ones(9).double()]
    wrong = [exact[0].clone(), exact[1] + 0.25]
    assert errors.relative_rms(wrong, exact) == pytest.approx(0.25)
    assert errors.relative_rms([exact[0] * 1.5, exact[1]], exact) == pytest.approx(0.5)
    assert errors.relative_rms(exact, exact) == 0
    for i in range(2):
        spoiled = [x * math.nan if i == j else x for j, x in enumerate(exact)]
        assert math.isnan(errors.relative_rms(spoiled, exact))


def test_logits_of_a_vocabulary_are_taken_in_chunks():
    # [64, 1000] logits in float64 would exceed the limit, which is that of a chunk.
    operation = OPERATIONS["linear_cross_entropy"]
    held = case.Case("linear_cross_entropy", operation, "a", operation.smallest, SETTINGS)
    assert isinstance(held.copies, list)
    assert held._rows_of_a_chunk(held.copies[0]) == case.CHUNK["cpu"] // 1000
