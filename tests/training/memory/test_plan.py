"""Prove that the best plan that fits is chosen, and the next smaller one when it does not."""

from types import SimpleNamespace

import pytest
import torch

from tritium.model import ModelConfig
from tritium.model.activation_checkpointing import POLICIES
from tritium.training.memory.plan import AUTO, USABLE, MemoryConfig, Plan, Planner
from tritium.training.memory.predict import StepBytes
from tritium.training.memory.retry import MemoryRetry

KEPT = dict(zip(POLICIES, (100, 40, 60, 10), strict=True))  # bytes per sequence
FIXED = 1000


class KnownMemory:
    """Predictions that are easily computed by hand."""

    def __init__(self, batch_size=64, length=1024, n_layers=12):
        self.config = ModelConfig(max_seq_len=length, n_layers=n_layers)
        self.batch_size, self.device = batch_size, torch.device("cpu")
        self.dtype, self.fixed = torch.float32, (FIXED, 0, 0)

    def step(self, policy, micro_batch):
        return StepBytes(*self.fixed, KEPT.get(policy, 50) * micro_batch, 5, 2)


def planner(*, need=0.0, policy=AUTO, micro_batch: int | str | None = AUTO, **memory) -> Planner:
    """One with room for FIXED and `need` bytes more."""
    gib = (FIXED + need + 0.5) / USABLE / 2**30
    config = MemoryConfig(
        activation_checkpointing=policy, micro_batch_size=micro_batch, memory_gib=gib
    )
    return Planner(KnownMemory(**memory), config)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("need", "plan"),
    [
        (6407, Plan("none", 64)),
        (6406, Plan("none", 32)),
        (407, Plan("none", 4)),  # 4,096 tokens
        (406, Plan("selective", 8)),
        (167, Plan("selective", 4)),
        (166, Plan("full", 8)),  # every-2 with 4 takes 247
        (47, Plan("full", 4)),
        (46, Plan("full", 2)),
        (10, Plan("full", 1)),  # does not fit either
    ],
)
def test_prefers_large_passes_then_the_least_that_is_computed_again(need, plan):
    assert planner(need=need).asked() == planner(need=need).best() == plan


def test_a_part_that_was_asked_for_stays():
    assert planner(need=407, policy="every-2").asked() == Plan("every-2", 4)
    assert planner(need=407, policy="every-3").asked() == Plan("every-3", 8)
    assert planner(need=407, micro_batch=3).asked() == Plan("none", 3)
    assert planner(need=407, micro_batch=16).asked() == Plan("full", 16)
    assert planner(need=1, policy="none", micro_batch=7).asked() == Plan("none", 7)


def test_the_whole_batch_is_the_largest_micro_batch():
    assert planner(need=0, policy="none", micro_batch=None).asked() == Plan("none", 64)
    assert planner(need=0, policy="none", micro_batch=100).asked() == Plan("none", 64)


def test_a_batch_is_cut_evenly():
    sizes = [x.micro_batch_size for x in planner(batch_size=12).plans("none")]
    assert sizes == [12, 6, 4, 3, 2, 1]
    sizes = [x.micro_batch_size for x in planner(batch_size=61).plans("none")]
    assert sizes == [61, 31, 16, 8, 4, 2, 1]


def test_short_batches_are_not_held_to_many_tokens():
    assert planner(need=10**6, batch_size=4, length=64).asked() == Plan("none", 4)
    assert planner(need=167, batch_size=4, length=64).asked() == Plan("selective", 4)


def test_one_block_is_never_half_checkpointed():
    assert {x.activation_checkpointing for x in planner(n_layers=1).plans()} == {
        "none", "selective", "full",
    }  # fmt: skip


def test_each_plan_below_takes_less_until_none_is_left():
    plan, seen = Plan("none", 64), []
    found = planner()
    while plan is not None:
        seen.append(found.bytes_of(plan).total - FIXED)
        plan = found.below(plan)
    assert all(x <= 0.9 * y for x, y in zip(seen[1:], seen, strict=False))
    assert seen[-1] == 17  # full, one sequence


def test_falls_back_until_the_memory_suffices_and_repeats_its_random_numbers():
    said, drawn, model = [], [], SimpleNamespace(zero_grad=lambda: drawn.append("cleared"))
    fallback = MemoryRetry(planner(need=10**6), None, lambda *x, **_: said.append(x[0]))

    def gradients(size):
        drawn.append(torch.rand(()).item())
        if KEPT[model.activation_checkpointing] * size > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return size

    assert fallback.attempt(model, gradients) == 16
    assert fallback.now == Plan("none", 16)
    assert fallback.first == Plan("none", 64)
    assert drawn == [drawn[0], "cleared", drawn[0], "cleared", drawn[0]]
    assert said[-1] == (
        "CUDA out of memory with --activation-checkpointing none --micro-batch-size 32: doing the "
        "step again with --activation-checkpointing none --micro-batch-size 16"
    )
    assert fallback.attempt(model, gradients) == 16  # from here on at once
    assert len(drawn) == 6


def test_gives_up_where_no_plan_is_smaller():
    fallback = MemoryRetry(planner(policy="full", micro_batch=1), None, print)

    def gradients(size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="there is no smaller plan"):
        fallback.attempt(SimpleNamespace(zero_grad=lambda: None), gradients)


def test_goes_on_with_the_saved_plan_where_it_was_asked_the_same():
    saved = {
        "first": {"activation_checkpointing": "none", "micro_batch_size": 32},
        "now": {"activation_checkpointing": "selective", "micro_batch_size": 16},
    }

    def resumed(policy, micro_batch):
        fallback = MemoryRetry(planner(policy=policy, micro_batch=micro_batch), saved, print)
        return fallback.first, fallback.now

    before = Plan("none", 32), Plan("selective", 16)
    assert resumed("none", 32) == resumed(AUTO, AUTO) == before
    assert resumed("full", 32) == (Plan("full", 32), Plan("full", 16))
    assert resumed("none", 8) == (Plan("none", 8), Plan("selective", 8))


def test_shows_all_policies_and_both_plans(capsys):
    from tritium.training.monitor.display import console

    planner(need=400, policy="every-3", micro_batch=32).show(console.print)
    out = capsys.readouterr().out
    for expected in (
        "micro-batches of 32 × 1,024 tokens in float32", "selective", "every-3", "activations",
        "Asked for: --activation-checkpointing every-3 --micro-batch-size 32, 2 per step",
        "does not fit", "Best: --activation-checkpointing selective --micro-batch-size 8, 8 per",
    ):  # fmt: skip
        assert expected in out
    largest = next(line for line in out.splitlines() if "largest" in line)
    assert largest.split()[-5:] == ["2", "8", "4", "32", "4"]


@pytest.mark.parametrize("policy", ["some", "every-0", "every-5"])
def test_refuses_a_policy_that_means_nothing(policy):
    with pytest.raises(ValueError, match="activation_checkpointing must"):
        MemoryConfig(activation_checkpointing=policy).check(ModelConfig(n_layers=4))
