"""Memory plans: micro-batch size and activation checkpointing with which a step fits the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Literal

from rich.table import Table

from tritium.kernels import runtime
from tritium.model.activation_checkpointing import POLICIES, check_policy
from tritium.model.config import ModelConfig
from tritium.training.device import describe, free_memory
from tritium.training.memory.predict import Memory, StepBytes

AUTO = "auto"
USABLE = 0.9  # of the memory: what libraries and gaps between tensors take is not predicted
RETRY_FRACTION = 0.9  # the next plan must need at most 90 % of the one that failed
# T tokens cost at least 6·T operations per parameter, and their weights and gradients move some 12
# bytes of each: a GPU of 300 operations per byte does both in the same time at T = 600, and at 4096
# the bytes take a seventh of the operations' time. Computed, not measured.
MIN_TOKENS = 4096


@dataclass(frozen=True)
class MemoryConfig:
    """Memory of a step. These settings change gradients by rounding alone."""

    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences per forward pass; fewer take less memory, and the last pass of a step may have
    fewer. None: batch_size. auto: the most that fit, as --plan shows."""
    activation_checkpointing: str = "none"
    """Blocks that recompute activations in the backward pass: none; full: all; every-N: each N-th;
    selective: all, except matrix products and attention; auto: as few as fit, as --plan shows."""
    memory_gib: float | None = None
    """Device memory to plan for, in GiB. None: the free memory."""
    plan: bool = False
    """Print the memory of each activation_checkpointing and the best plan, without training."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless activation_checkpointing fits a model of that shape."""
        if self.activation_checkpointing != AUTO:
            check_policy(self.activation_checkpointing, model.n_layers, model.reversible)


@dataclass(frozen=True)
class Plan:
    """Micro-batch size and activation checkpointing of a step."""

    activation_checkpointing: str
    micro_batch_size: int

    def __str__(self) -> str:
        return (
            f"--activation-checkpointing {self.activation_checkpointing} "
            f"--micro-batch-size {self.micro_batch_size}"
        )


class Planner:
    """The plans that fit a device, in order of preference.

    The order is: micro-batches of at least MIN_TOKENS tokens; the least that is recomputed; the
    largest micro-batch.

    Args:
        memory: predicts what a plan takes.
        config: the settings.
    """

    def __init__(self, memory: Memory, config: MemoryConfig):
        self.memory, self.policy = memory, config.activation_checkpointing
        size, batch = config.micro_batch_size, memory.batch_size
        self.micro_batch = size if isinstance(size, str) else min(size or batch, batch)
        self._given = config.memory_gib

    @cached_property
    def budget(self) -> int:
        """The bytes that a plan may take."""
        free = free_memory(self.memory.device) if self._given is None else self._given * 2**30
        return int(USABLE * free)

    def plans(self, policy: str = AUTO, micro_batch: int | str = AUTO) -> Iterator[Plan]:
        """Iterate over all plans with that policy and micro-batch, the best ones first."""
        n_layers, batch = self.memory.config.n_layers, self.memory.batch_size
        policies = [x for x in POLICIES if x != "every-2" or n_layers > 1]
        policies = policies[:1] if self.memory.config.reversible else policies
        policies = policies if policy == AUTO else [policy]
        sizes = _even_sizes(batch) if isinstance(micro_batch, str) else [micro_batch]
        length = self.memory.config.max_seq_len
        enough = [x for x in sizes if x * length >= min(MIN_TOKENS, batch * length)]
        for part in (enough, [x for x in sizes if x not in enough]):
            yield from (Plan(p, size) for p in policies for size in part)

    def bytes_of(self, plan: Plan) -> StepBytes:
        """Predict the bytes of a step."""
        return self.memory.step(plan.activation_checkpointing, plan.micro_batch_size)

    def fits(self, plan: Plan) -> bool:
        """Whether the budget holds a step."""
        return self.bytes_of(plan).total <= self.budget

    def asked(self) -> Plan:
        """Return the plan of the settings, AUTO replaced by the best that fits."""
        return self._choose(self.policy, self.micro_batch)

    def best(self) -> Plan:
        """Return the plan that AUTO alone would choose."""
        return self._choose(AUTO, AUTO)

    def below(self, plan: Plan) -> Plan | None:
        """Return the best plan that takes distinctly less than `plan`, or None."""

        def varying(each: Plan) -> int:
            return self.bytes_of(each).total - sum(self.memory.fixed)

        limit = RETRY_FRACTION * varying(plan)
        return next((each for each in self.plans() if varying(each) <= limit), None)

    def show(self, log: Callable) -> None:
        """Log the bytes of each policy, the best plan, and the settings' plan if it differs."""
        best, asked = self.best(), self.asked()
        log(self._heading(asked), self._table(asked), sep="\n")
        named = {"Best": best} if asked == best else {"Asked for": asked, "Best": best}
        for name, plan in named.items():
            passes = -(-self.memory.batch_size // plan.micro_batch_size)
            total, budget = self.bytes_of(plan).total / 2**30, self.budget / 2**30
            log(
                f"{name}: {plan}, {passes:,} per step: {total:.2f} GiB, which "
                f"{'fits' if self.fits(plan) else 'does not fit'} the {budget:.2f} GiB that a plan "
                f"may take"
            )

    def _choose(self, policy: str, micro_batch: int | str) -> Plan:
        plans = list(self.plans(policy, micro_batch))
        if len(plans) == 1:
            return plans[0]
        fitting = (plan for plan in plans if self.fits(plan))
        return next(fitting, None) or min(plans, key=lambda plan: self.bytes_of(plan).total)

    def _heading(self, plan: Plan) -> str:
        memory = self.memory
        kernels = (memory.device.type == "cuda" or runtime.CPU_KERNELS) and not runtime.REFERENCE
        return (
            f"Predicted for micro-batches of {plan.micro_batch_size:,} × "
            f"{memory.config.max_seq_len:,} tokens in {str(memory.dtype)[6:]}, on "
            f"{describe(memory.device)}, by {'Triton kernels' if kernels else 'the references'}:"
        )

    def _table(self, plan: Plan) -> Table:
        own, size = plan.activation_checkpointing, plan.micro_batch_size
        policies = [each.activation_checkpointing for each in self.plans(micro_batch=size)]
        policies += [] if own in policies else [own]
        steps = [self.bytes_of(Plan(policy, size)) for policy in policies]
        unit, nbytes = ("GiB", 2**30) if max(x.total for x in steps) >= 2**30 else ("MiB", 2**20)
        table = Table(unit, box=None)
        for policy in policies:
            table.add_column(policy, justify="right")
        for name, *row in zip(
            [x.name for x in fields(StepBytes)], *map(astuple, steps), strict=True
        ):
            table.add_row(name, *(f"{x / nbytes:,.2f}" for x in row))
        table.add_row("together", *(f"{x.total / nbytes:,.2f}" for x in steps))
        most = [[x.micro_batch_size for x in self.plans(p) if self.fits(x)] for p in policies]
        table.add_row(
            "largest micro-batch that fits", *(f"{max(x):,}" if x else "none" for x in most)
        )
        return table


def _even_sizes(batch: int) -> list[int]:
    """Micro-batches that cut a batch evenly or nearly so, the largest first."""
    divisors = {size for size in range(1, batch + 1) if batch % size == 0}
    halves = {-(-batch // 2**i) for i in range(batch.bit_length())}
    return sorted(divisors | halves, reverse=True)
