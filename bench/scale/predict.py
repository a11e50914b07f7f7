"""Memory and time of a step on one of many GPUs, predicted for a mode.

Memory that does not depend on the ranks is predicted by `tritium.training.memory.predict`, for the
part of the model that a rank computes, in float32 on a CPU. In bfloat16 on a GPU its activations
take half: all of them are in the dtype of the products there, apart from statistics of rows.

A collective overlaps with the arithmetic of the neighbouring block. Exposed is what is longer: of
fsdp each gather beyond the block before it, forward, and each gather and scatter beyond the block's
backward pass; of ddp what is left when the backward pass ends, at least the last bucket.
Tensor-parallel sums are exposed whole: the next operation needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch

from tritium.bench.scale.compute import block_time, ends_time, optimizer_time
from tritium.bench.scale.links import KINDS, Links, seconds
from tritium.bench.scale.parts import (
    REDUCED,
    Mesh,
    Traffic,
    local_elements,
    split_config,
    traffic,
    units,
)
from tritium.kernels.linear_cross_entropy import chunk_rows
from tritium.kernels.roofline import MATRIX_SHARE, Device
from tritium.model import ModelConfig, Transformer
from tritium.model.activation_checkpointing import checkpointed
from tritium.model.shapes import flops_per_token
from tritium.training.memory.predict import Memory
from tritium.training.optim import OptimizerConfig

BUCKET = 25 << 20  # bytes of a bucket of DDP, its default
GPU_CHUNK = 1 << 30  # bytes of the loss's logits on a GPU, the default there


@dataclass(frozen=True)
class RankBytes:
    """The bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    states: int
    """The optimizer's moments."""
    buffers: int
    """Copies of weights and gradients for communication: gathered blocks, buckets, sums of
    micro-batches that are not yet scattered."""
    activations: int
    """Activations kept for the backward pass, and what is transient."""
    logits: int
    """A chunk of the loss's logits."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Job:
    """A step to be shared by many GPUs."""

    config: ModelConfig
    """The model; max_seq_len is the length of a sequence."""
    batch_size: int
    """Sequences of a step, on all GPUs."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype of products and activations. Weights, gradients and moments are float32."""
    chunk_bytes: int | None = GPU_CHUNK
    """Bytes of the loss's logits at once; None: as on a CPU."""


@dataclass(frozen=True)
class Plan:
    """A mode with micro-batch and activation checkpointing, on given ranks."""

    job: Job
    mesh: Mesh
    micro_batch: int
    policy: str

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return self.job.batch_size // self.mesh.readers // self.micro_batch

    @cached_property
    def part(self) -> ModelConfig:
        """Shape of what one rank computes."""
        return split_config(self.job.config, self.mesh.tensor)

    @cached_property
    def traffic(self) -> Traffic:
        """Collectives of a step."""
        config = self.job.config
        # `selective` keeps sums over ranks, as it keeps products.
        recomputed = 0 if self.policy == "selective" else checkpointed(self.policy, config.n_layers)
        return traffic(
            config, self.mesh, tokens=self.micro_batch * config.max_seq_len, passes=self.passes,
            width=self.job.dtype.itemsize, recomputed=recomputed,
        )  # fmt: skip

    @cached_property
    def memory(self) -> RankBytes:
        """Bytes at the peak of the last micro-batch: at its loss, or as its backward pass runs."""
        moments = self._at_loss(), self._at_begin(), self._at_end()
        return max(moments, key=lambda x: x.total)

    def _at_loss(self) -> RankBytes:
        """A chunk of logits lives, and what the forward pass keeps; no block is gathered."""
        _, forward, _ = self._peaks
        gradients, sums = self._earlier
        return self._bytes(gradients, sums + self._gathered(0), forward, self._logits())

    def _at_begin(self) -> RankBytes:
        """All activations live, and gradients only of the micro-batches before."""
        _, _, backward = self._peaks
        gradients, sums = self._earlier
        return self._bytes(gradients, sums + self._gathered(2), backward, 0)

    def _at_end(self) -> RankBytes:
        """One block's activations live, and all gradients; the root's are not scattered yet."""
        (root, block), (kept, _, backward) = self._units, self._peaks
        unscattered = (2 * REDUCED * root + REDUCED * block) if self.mesh.sharded else 0
        live = backward - kept * (1 - 1 / self.part.n_layers)
        gradients = 4 * local_elements(self.job.config, self.mesh)
        return self._bytes(gradients, unscattered + self._gathered(1), live, 0)

    @property
    def _earlier(self) -> tuple[int, int]:
        """Gradients of earlier micro-batches: those of this rank, and sums not yet scattered."""
        (root, block), n = self._units, self.part.n_layers
        whole = REDUCED * (root + n * block) if self.passes > 1 else 0
        return (0, whole) if self.mesh.sharded else (whole, 0)

    def _gathered(self, blocks: int) -> int:
        """Bytes of gathered weights, of the root and of so many blocks."""
        root, block = self._units
        return self.job.dtype.itemsize * (root + blocks * block) if self.mesh.sharded else 0

    def _bytes(self, gradients: int, buffers: int, activations: float, logits: int) -> RankBytes:
        elements, narrow = local_elements(self.job.config, self.mesh), self.job.dtype.itemsize
        (root, block), n = self._units, self.part.n_layers
        if not self.mesh.sharded:
            copies = narrow * (root + n * block) if narrow < 4 else 0  # autocast's
            buckets = REDUCED * (root + n * block) if self.mesh.mode == "ddp" else 0
            buffers += copies + buckets
        return RankBytes(
            4 * elements, gradients, 8 * elements, buffers, round(activations * narrow / 4), logits
        )

    @property
    def _units(self) -> tuple[int, int]:
        """Elements of what is in no block, and of a block, gathered."""
        root, block = (x.elements(self.mesh.shards) for x in units(self.part))
        return root, block

    @property
    def _peaks(self) -> tuple[float, float, float]:
        """Bytes that a forward pass keeps, at most has, and that a backward pass at most has."""
        return _memory(self.part).peaks(self.policy, self.micro_batch)

    def _logits(self) -> int:
        T, V = self.micro_batch * self.part.max_seq_len, self.part.vocab_size
        hidden = torch.empty(T, self.part.d_model, device="meta", dtype=self.job.dtype)
        op, chunk = "linear_cross_entropy", self.job.chunk_bytes
        rows = chunk_rows(op, hidden, V, self.job.dtype, False, chunk)
        return min(rows, T) * -(-V // 64) * 64 * self.job.dtype.itemsize

    def time(self, device: Device, links: Links, efficiency: float) -> StepTime:
        """Predict the time of a step.

        Args:
            device: rates of a GPU.
            links: its links.
            efficiency: share of the rooflines' speed that a step reaches.
        """
        job, part, n = self.job, self.part, self.part.n_layers
        block = block_time(part, self.micro_batch, device, job.dtype, part.d_model)
        again = {"none": 0.0, "selective": block.elementwise}.get(
            self.policy, block.forward * checkpointed(self.policy, n) / n
        )
        ends = ends_time(part, self.micro_batch, device, job.dtype, part.d_model) / efficiency
        forward, backward = block.forward / efficiency, (block.backward + again) / efficiency
        step = optimizer_time(local_elements(job.config, self.mesh), device) / efficiency
        arithmetic = self.passes * (n * (forward + backward) + ends) + step
        x = self.traffic
        each = {name: seconds(one, links) for name, one in vars(x).items()}
        total = sum(each[name] * one.times for name, one in vars(x).items())
        waited = "activations", "ends", "statistics", "partial"
        exposed = sum(each[name] * getattr(x, name).times for name in waited)
        if self.mesh.sharded:
            exposed += self._exposed_shards(each, forward, backward)
        elif self.mesh.replicas > 1:
            gradients = total - exposed
            last = gradients * min(1.0, BUCKET / (REDUCED * local_elements(job.config, self.mesh)))
            exposed += max(last, gradients - (n - 1) * backward)
        return StepTime(arithmetic, total, exposed)

    def _exposed_shards(self, each: dict[str, float], forward: float, backward: float) -> float:
        n, gather = self.part.n_layers, each["gather_block"]
        begin = each["gather_root"] + gather + (n - 1) * max(0.0, gather - forward)
        behind = gather + (n - 1) * max(0.0, gather - backward)
        # Within a node and between nodes other links are busy, at the same time.
        sent = max(gather + each["scatter_block"], each["reduce_block"])
        last = gather + (n - 1) * max(0.0, sent - backward)
        reducing = ("scatter_block", "scatter_root", "reduce_block", "reduce_root")
        end = sum(each[name] for name in reducing)
        return self.passes * begin + (self.passes - 1) * behind + last + end


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    arithmetic: float
    communication: float
    """Seconds of all collectives, one after another."""
    exposed: float
    """The part of it that no arithmetic hides."""

    @property
    def total(self) -> float:
        """Arithmetic, and what is exposed."""
        return self.arithmetic + self.exposed

    def tokens_per_second(self, job: Job) -> float:
        """Return the speed of the whole job."""
        return job.batch_size * job.config.max_seq_len / self.total

    def utilisation(self, job: Job, device: Device, gpus: int) -> float:
        """Return the MFU: the model's FLOPs over those of the GPUs' datasheet."""
        rate = (device.matrix_16 if job.dtype.itemsize == 2 else device.matrix_32) / MATRIX_SHARE
        return self.tokens_per_second(job) * flops_per_token(job.config) / (gpus * rate)


def moved(plan: Plan) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by kind of collective."""
    return {kind: plan.traffic.moved(kind) for kind in KINDS}


@cache
def _memory(part: ModelConfig) -> Memory:
    two = 2  # sequences: all else follows linearly
    return Memory(Transformer, part, OptimizerConfig(), torch.device("cpu"), torch.float32, two)
