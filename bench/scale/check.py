"""Predictions of `bench scale`, beside what is counted in a step on ranks of gloo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import FailedError
from tritium.bench.harness import device_name
from tritium.bench.scale.count import Counts, count_on_gloo
from tritium.bench.scale.links import KINDS
from tritium.bench.scale.parts import local_elements, mesh_of
from tritium.bench.scale.predict import Job, Plan, moved
from tritium.model import ModelConfig

RESULTS = "scale_counted.md"  # in the folder of results
WIDTH = 130
MODEL = ModelConfig(
    vocab_size=1024, n_layers=6, d_model=64, n_heads=4, n_kv_heads=2, max_seq_len=64
)
SEQUENCES = 8
NODE = {"hsdp": 2, "tp": 2}
"""Ranks of a node, or of a group of these modes; all ranks of the others share one."""
RANKS = {"ddp": (1, 2, 4), "fsdp": (1, 2, 4), "hsdp": (4,), "tp": (2, 4)}
"""Numbers of ranks on which a mode is counted."""
SETTINGS = ((1, "full"), (2, "none"))
"""Micro-batches and activation checkpointing."""
WITHIN = 0.05  # of the peak: buffers whose order decides which are alive at once


class Row(NamedTuple):
    """A step, predicted and counted."""

    plan: Plan
    counts: Counts

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.plan.memory.total / self.counts.peak - 1

    @property
    def right(self) -> bool:
        """Whether bytes that are sent and kept are predicted exactly, and the peak within 5 %."""
        return self.exact and abs(self.error) <= WITHIN

    @property
    def exact(self) -> bool:
        """Whether bytes that are sent and kept are predicted exactly."""
        memory, counts = self.plan.memory, self.counts
        kept = (counts.parameters, counts.gradients, counts.states)
        elements = local_elements(self.plan.job.config, self.plan.mesh)
        sent = {kind: counts.moved.get(kind, 0) for kind in KINDS}
        return (memory.weights, 4 * elements, memory.states) == kept and all(
            abs(sent[kind] - x) < 1 for kind, x in moved(self.plan).items()
        )


def predicted(mode: str, ranks: int, micro_batch: int, policy: str) -> Plan:
    """Return the prediction of a step of `MODEL` in float32 on a CPU."""
    job = Job(MODEL, SEQUENCES, torch.float32, chunk_bytes=None)
    return Plan(job, mesh_of(mode, ranks, NODE.get(mode, ranks), MODEL), micro_batch, policy)


def counted(mode: str, ranks: int, micro_batch: int, policy: str) -> Counts:
    """Count the same step on ranks of gloo."""
    return count_on_gloo(
        MODEL, mode, ranks, sequences=SEQUENCES, micro_batch=micro_batch, policy=policy,
        group_size=NODE.get(mode, 0),
    )  # fmt: skip


def rows() -> Iterator[Row]:
    """Count every mode on every number of its ranks."""
    for mode, sizes in RANKS.items():
        for size in sizes:
            for micro_batch, policy in SETTINGS:
                case = mode, size, micro_batch, policy
                yield Row(predicted(*case), counted(*case))


def main(*, write: bool) -> None:
    """Compare predictions with counts; end with status 1 where they differ."""
    found = list(rows())
    table = Table("mode", "ranks", "micro-batch × passes", "policy")
    for title in (*(f"{kind}, kB" for kind in KINDS), "kept, kB", "peak, kB", "error"):
        table.add_column(title, justify="right")
    for row in found:
        plan, counts, memory = row.plan, row.counts, row.plan.memory
        sent = moved(plan)
        both = [(sent[kind], counts.moved.get(kind, 0)) for kind in KINDS]
        kept = 4 * memory.weights  # gradients are as large, moments twice
        both += [(kept, counts.parameters + counts.gradients + counts.states)]
        both += [(memory.total, counts.peak)]
        table.add_row(
            plan.mesh.mode, f"{plan.mesh.size}", f"{plan.micro_batch} × {plan.passes}", plan.policy,
            *(f"{x / 1e3:,.0f} / {y / 1e3:,.0f}" for x, y in both), f"{row.error:+.1%}",
        )  # fmt: skip
    head = (
        f"`python -m tritium.bench scale --check-on-gloo --write`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}",
        f"Predicted / counted, of one rank and one step: {MODEL.n_layers} layers of width "
        f"{MODEL.d_model}, vocabulary {MODEL.vocab_size:,}, {SEQUENCES} × {MODEL.max_seq_len} "
        "tokens on all ranks, float32, AdamW. Sent: by a ring, in the collectives that torch was "
        "seen to call. Kept: weights, gradients, moments. Peak: the most bytes of tensors that "
        "lived at a time.",
    )
    path = tables.results() / RESULTS
    tables.present(head, table, width=WIDTH, write_to=path if write else None)
    if not all(row.right for row in found):
        raise FailedError("predictions and counts differ")
