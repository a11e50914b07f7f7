"""Training on many GPUs, predicted from stated rates: `python -m tritium.bench scale`.

For each number of GPUs and each mode: memory of a GPU, bytes that it sends in a step, their time,
the part of it that nothing hides, and the speed of the whole job. Of micro-batches and policies of
activation checkpointing the fastest that fits is shown. No several GPUs have been measured: rates
are datasheets', their reachable shares those of one H100 and of NCCL's own model.
`--check-on-gloo` compares bytes and memory with a real step on ranks of gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import as_wrong_input
from tritium.bench.scale import check
from tritium.bench.scale.compute import reached
from tritium.bench.scale.links import Links, find_links
from tritium.bench.scale.parts import MODES, mesh_of
from tritium.bench.scale.picture import Point, draw
from tritium.bench.scale.predict import Job, Plan, RankBytes, StepTime, moved
from tritium.kernels.roofline import Device
from tritium.kernels.units import duration, quantity
from tritium.model import ModelConfig
from tritium.training.memory.plan import USABLE

RESULTS = "scale"  # a table and a picture, in the folder of results
WIDTH = 165
POLICIES = "none", "selective", "full"
MOST_SEQUENCES = 32  # of a micro-batch
GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """GPUs, and their links."""

    device: Device
    links: Links
    node: int

    @property
    def memory(self) -> float:
        """Bytes that a step may take of a GPU."""
        return USABLE * self.links.memory


@dataclass(frozen=True)
class Choice:
    """A mode on so many GPUs: the best plan, or why there is none."""

    gpus: int
    mode: str
    plan: Plan | None
    problem: str = ""

    def time(self, cluster: Cluster) -> StepTime:
        """Predict the time of the plan's step."""
        assert self.plan is not None
        return self.plan.time(cluster.device, cluster.links, reached())


def choose(job: Job, mode: str, gpus: int, cluster: Cluster) -> Choice:
    """Return the fastest plan of a mode that fits; without one, the sentence that says why."""
    try:
        plans = list(_plans(job, mode, gpus, cluster))
    except ValueError as error:
        return Choice(gpus, mode, None, str(error).removeprefix("scale: "))
    fitting = [x for x in plans if x.memory.total <= cluster.memory]
    if not fitting:
        least = min(x.memory.total for x in plans)
        return Choice(
            gpus, mode, None,
            f"needs {least / GIB:,.0f} GiB of each GPU, of whose memory a step may take "
            f"{cluster.memory / GIB:,.0f}",
        )  # fmt: skip
    fastest = min(fitting, key=lambda x: x.time(cluster.device, cluster.links, reached()).total)
    return Choice(gpus, mode, fastest)


def _plans(job: Job, mode: str, gpus: int, cluster: Cluster) -> Iterator[Plan]:
    mesh = mesh_of(mode, gpus, cluster.node, job.config)
    if job.batch_size % mesh.readers:
        raise ValueError(
            f"scale: a batch of {job.batch_size:,} sequences cannot be shared out by "
            f"{mesh.readers:,} GPUs that read different data; change --batch-size"
        )
    own = job.batch_size // mesh.readers
    sizes = [x for x in range(1, min(own, MOST_SEQUENCES) + 1) if own % x == 0]
    for policy in POLICIES:
        for size in sizes:
            yield Plan(job, mesh, size, policy)


def main(
    preset: str = "llama-3.1-8b",
    gpus: str = "8,64,512",
    device: str = "h200",
    batch_size: int = 1024,
    length: int = 8192,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    node: int = 8,
    network: float | None = None,
    check_on_gloo: bool = False,
    write: bool = False,
) -> None:
    """Predict training on many GPUs, by ddp, fsdp, hsdp and tp.

    Args:
        preset: a published shape: python -m tritium.model.shapes lists them.
        gpus: numbers of GPUs, with commas between them.
        device: the GPU; a part of its name.
        batch_size: sequences of a step, on all GPUs.
        length: tokens of a sequence.
        precision: of matrix products; weights, gradients and moments are float32.
        node: GPUs of a node.
        network: GB/s of each GPU's network adapter, in one direction. None: as in `scale/links.py`.
        check_on_gloo: count a step on 1, 2 and 4 processes of this machine instead, and compare.
        write: keep the table, and the picture, in the folder of results.
    """
    if check_on_gloo:
        check.main(write=write)
        return
    with as_wrong_input(ValueError):
        config = replace(ModelConfig.named(preset), max_seq_len=length)
        rates, links = find_links(device)
        if network is not None:
            links = replace(links, network=network * 1e9, source=f"{links.source}; --network")
        numbers = _numbers(gpus)
        if min(numbers) < 1 or min(batch_size, length, node) < 1:
            raise ValueError("scale: gpus, batch-size, length and node must be at least 1")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    job, cluster = Job(config, batch_size, dtype), Cluster(rates, links, node)
    choices = [choose(job, mode, n, cluster) for n in numbers for mode in MODES]
    command = (
        f"python -m tritium.bench scale --preset {preset} --gpus {gpus} --device {device} "
        f"--batch-size {batch_size} --length {length} --precision {precision} --node {node}"
        + (f" --network {network:g}" if network is not None else "")
        + " --write"
    )
    head = (f"`{command}`", *_assumptions(preset, job, cluster), *_best(choices, job, cluster))
    path = tables.results() / RESULTS
    tables.present(
        head, _memory_table(choices), _time_table(choices, job, cluster), width=WIDTH,
        write_to=path.with_suffix(".md") if write else None,
    )  # fmt: skip
    if write:
        _draw(choices, job, cluster, f"{preset} on {rates.name}", path.with_suffix(".png"))


def _numbers(gpus: str) -> list[int]:
    parts = [x.strip() for x in gpus.split(",")]
    if not all(x.isdecimal() for x in parts):
        raise ValueError(f"scale: gpus must be numbers with commas between them, got {gpus!r}")
    return sorted({int(x) for x in parts})


def _assumptions(preset: str, job: Job, cluster: Cluster) -> Iterator[str]:
    links = cluster.links
    yield (
        f"Predicted, not measured: {preset}, {job.batch_size:,} sequences of "
        f"{job.config.max_seq_len:,} tokens in a step, products in {str(job.dtype)[6:]}, weights, "
        f"gradients and AdamW's moments in float32. {cluster.device.name}: "
        f"{links.within / 1e9:,.0f} GB/s within a node of {cluster.node} GPUs, "
        f"{links.network / 1e9:,.0f} GB/s from each to the network, in each direction "
        f"({links.source}); a step may take {USABLE:.0%} of the memory. Arithmetic at "
        f"{reached():.0%} of its roofline, which a step of GPT-2 124M reached on one H100."
    )


def _best(choices: list[Choice], job: Job, cluster: Cluster) -> Iterator[str]:
    for gpus in dict.fromkeys(x.gpus for x in choices):
        here = [x for x in choices if x.gpus == gpus]
        fitting = [x for x in here if x.plan is not None]
        lines = []
        if fitting:
            best = min(fitting, key=lambda x: x.time(cluster).total)
            assert best.plan is not None
            lines.append(
                f"{gpus:,} GPUs: {best.mode} is the fastest: --parallel {best.mode} "
                f"--micro-batch-size {best.plan.micro_batch} "
                f"--activation-checkpointing {best.plan.policy}."
            )
        lines += [f"{gpus:,} GPUs, {x.mode}: {x.problem}." for x in here if x.plan is None]
        yield "\n".join(lines)


def _memory_table(choices: list[Choice]) -> Table:
    names = list(RankBytes.__annotations__)
    table = Table("GPUs", "mode", "copies × parts × split", "micro-batch × passes", "policy")
    for name in (*names, "together"):
        table.add_column(f"{name}, GiB", justify="right")
    for x in choices:
        if x.plan is None:
            continue
        mesh, memory = x.plan.mesh, x.plan.memory
        sizes = [*(getattr(memory, name) for name in names), memory.total]
        table.add_row(
            f"{x.gpus:,}", x.mode, f"{mesh.replicas} × {mesh.shards} × {mesh.tensor}",
            f"{x.plan.micro_batch} × {x.plan.passes}", x.plan.policy,
            *(f"{y / GIB:,.1f}" for y in sizes),
        )  # fmt: skip
    return table


def _time_table(choices: list[Choice], job: Job, cluster: Cluster) -> Table:
    table = Table("GPUs", "mode")
    titles = [f"{kind}, sent per step" for kind in ("all-reduce", "all-gather", "reduce-scatter")]
    more = "communication", "of it exposed", "arithmetic", "step", "tokens/s", "MFU"
    for title in (*titles, *more):
        table.add_column(title, justify="right")
    for x in choices:
        if x.plan is None:
            continue
        time, sent = x.time(cluster), moved(x.plan)
        seconds = time.communication, time.exposed, time.arithmetic, time.total
        table.add_row(
            f"{x.gpus:,}", x.mode, *(quantity(y, "B") if y else "0" for y in sent.values()),
            *map(duration, seconds), f"{time.tokens_per_second(job):,.0f}",
            f"{time.utilisation(job, cluster.device, x.gpus):.1%}",
        )  # fmt: skip
    return table


def _draw(choices: list[Choice], job: Job, cluster: Cluster, title: str, path: Path) -> None:
    points = []
    for x in choices:
        if x.plan is not None:
            time = x.time(cluster)
            points.append(
                Point(
                    x.mode, x.gpus, time.tokens_per_second(job),
                    time.utilisation(job, cluster.device, x.gpus), x.plan.memory.total,
                )
            )  # fmt: skip
    draw(points, cluster.memory, title, path)
