"""Prove that cross_entropy reads and writes rows that begin anywhere as it does aligned ones."""

from types import SimpleNamespace

import pytest
import torch
from check import check
from hypothesis import given
from hypothesis import strategies as st

from tritium.kernels import _cross_entropy_launch as launch
from tritium.kernels import _packed_rows as packed
from tritium.kernels.cross_entropy import cross_entropy, cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Let rows of a few hundred classes take several blocks, two at most of them in registers."""
    monkeypatch.setattr(launch, "power_of_2", lambda n: 256)
    for name, value in (("BLOCK", 256), ("BLOCKS", 2), ("SHORTEST", 0), ("SPARES_REGISTERS", True)):
        monkeypatch.setattr(packed, name, value)
    launch._plan.cache_clear()
    yield
    launch._plan.cache_clear()


@given(
    V=st.one_of(st.integers(225, 330), st.integers(500, 560)),
    beyond=st.sampled_from([0, 0, 1, 16, 37]),
    offset=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    soft=st.booleans(),
    options=st.sampled_from([{}, dict(label_smoothing=0.1, softcap=9.0, z_loss=0.01)]),
    weighted=st.booleans(),
    inplace=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_start_width_and_stride(
    V, beyond, offset, dtype, soft, options, weighted, inplace, seed
):
    """Loss and gradient are the reference's for edges of any width, blocks complete or not."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, beyond = 4, 0 if inplace else beyond
    memory = torch.randn(offset + T * (V + beyond), device=device).to(dtype)
    target = torch.randint(V, (T,), device=device)
    target[seed % T] = -100
    target[(seed + 1) % T] = (0, V - 1)[seed % 2]
    target = torch.randn(T, V, device=device).softmax(1).to(dtype) if soft else target
    weight = torch.rand(V, device=device) + 0.1 if weighted else None

    def rows(memory):
        memory = memory * 1 if inplace else memory
        return memory[offset:].view(T, V + beyond)[:, :V]

    check(
        lambda x: cross_entropy(rows(x), target, weight, inplace=inplace, **options),
        lambda x: cross_entropy_reference(rows(x), target, weight=weight, **options),
        memory, unit=16.0,
    )  # fmt: skip


@given(
    V=st.integers(225, 330),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    hidden=st.integers(0, 40),
    seed=st.integers(0, 1 << 30),
)
def test_extremes_count_on_edges_as_anywhere(V, dtype, hidden, seed):
    """Classes of -inf, a certain class and the first of equals count wherever a row begins."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(5, V, device=device).to(dtype)
    x[:, torch.randperm(V)[:hidden]] = -torch.inf
    best = torch.tensor([0, V - 1, V // 2, 14, V - 17], device=device)
    x[torch.arange(5), best] = 80.0
    x[2, V - 1] = 80.0  # of equals the first
    leaf = x.clone().requires_grad_()
    loss, stats = cross_entropy(leaf, best, reduction="sum", return_stats=True)
    loss.backward()
    exact = x.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, best, reduction="sum").backward()
    assert torch.equal(stats.argmax, best)
    torch.testing.assert_close(stats.lse.double(), x.double().logsumexp(1))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-2, atol=1e-6)


def test_ignored_rows_get_zeros_and_no_more(device):
    """Neither an edge of an ignored row keeps a number, nor does its neighbour lose one."""
    for V in (251, 257, 529):
        x = torch.full((4, V), torch.nan, device=device)
        x[1::2] = torch.randn(2, V, device=device)
        target = torch.tensor([-100, 0, -100, V - 1], device=device)
        leaf = x.requires_grad_() * 1
        cross_entropy(leaf, target, reduction="sum", inplace=True).backward()
        assert (leaf[::2] == 0).all()
        torch.testing.assert_close(leaf[1::2].sum(1), leaf.new_zeros(2), rtol=0, atol=1e-5)
        assert (leaf[1::2] != 0).all()


def test_wide_accesses_are_asked_for_wherever_rows_allow(device, monkeypatch):
    """Odd widths and strides take edges; what begins elsewhere than the logits does not."""
    taken = []
    launcher = SimpleNamespace(launch=lambda plan, *_: taken.append(plan.constants[-6:-4]))
    monkeypatch.setattr(launch, "_launch", launcher)
    options = launch.LossOptions(-100, 0.0, 0.0, 0.0, 1.0)

    def edges(V, stride, dx_stride):
        x, dx = (torch.empty(3, s, device=device)[:, :V] for s in (stride, dx_stride))
        target = torch.zeros(3, dtype=torch.int64, device=device)
        launch.launch_rows(x, target, None, options, dx_TV=dx)
        return taken[-1]

    assert edges(257, 257, 257) == (True, 16)
    assert edges(257, 257, 273) == (True, 16)
    assert edges(257, 272, 272) == (True, 0)  # rows begin at multiples of 16
    assert edges(257, 257, 260) == (True, 0)
    assert edges(272, 277, 277) == (True, 16)
    assert edges(272, 272, 288) == (False, 0)
    assert edges(272, 277, 272) == (False, 0)


@pytest.mark.parametrize(
    ("V", "stride", "dtype"),
    [
        (257, 257, torch.bfloat16),
        (497, 497, torch.float16),
        (513, 528, torch.bfloat16),
        (1040, 1040, torch.bfloat16),
    ],
)
def test_rows_in_registers_are_those_read_twice(V, stride, dtype, device, monkeypatch):
    """Loss and gradient are the same bit for bit, whatever part of a row is read once."""
    torch.manual_seed(V)
    memory = (4 * torch.randn(4, stride, device=device)).to(dtype)
    memory[1, V - 1] = memory[2, 0] = 60.0
    target = torch.tensor([0, V - 1, -100, V // 2], device=device)
    options = launch.LossOptions(-100, 0.0, 0.01, 30.0, 0.5)

    def results(blocks):
        monkeypatch.setattr(packed, "BLOCKS", blocks)
        launch._plan.cache_clear()
        logits = memory.clone()[:, :V]
        loss, _, _ = launch.launch_rows(logits, target, None, options, dx_TV=logits)
        return loss, logits

    for kept in (2, 8):
        for a, b in zip(results(1), results(kept), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("V", "lead", "kept"),
    [
        (256, 0, (0, True)),
        (257, 16, (0, True)),
        (272, 0, (1, True)),
        (273, 16, (1, True)),
        (272, 16, (0, True)),
        (512, 0, (1, True)),
        (513, 16, (1, True)),
        (528, 0, (1, False)),
        (529, 16, (1, False)),
        (544, 16, (1, False)),
    ],
)
def test_the_last_block_in_registers_is_all_the_rest_or_none(V, lead, kept, device):
    """A row of any start has full blocks to keep, and what is left beyond fits one block."""
    x = torch.empty(3, V, dtype=torch.bfloat16, device=device)
    assert packed.kept_blocks(V, lead) == kept
    assert packed.keeps_rows(x)
    assert not packed.keeps_rows(x.float())
    assert not packed.keeps_rows(x[:, 1:])
