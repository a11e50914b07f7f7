"""Parts of a model as they are spread over ranks, and what they communicate in a step.

    ddp    every rank has all of it; gradients are all-reduced once a step (Li et al., "PyTorch
           Distributed", 2020. https://arxiv.org/abs/2006.15704)
    fsdp   every rank has a part of each weight. Before a block runs, forward and backward, its
           weights are gathered; its gradient is reduced and scattered (Zhao et al., "PyTorch FSDP",
           2023. https://arxiv.org/abs/2304.11277). The embedding, the last norm and the head are
           gathered once and kept until the backward pass is over
    hsdp   fsdp within a node; the parts of gradients are all-reduced over nodes (the same paper)
    tp     heads, features and vocabulary are split within a node, whose ranks read the same data;
           between nodes it is fsdp. A block all-reduces its activations twice forward and twice
           backward (Shoeybi et al., "Megatron-LM", 2019. https://arxiv.org/abs/1909.08053), and
           once more where all of it is recomputed, which ends before its last sum. The loss
           all-reduces five statistics of every token, and each pass the gradients of norms of
           heads, of biases and of token shifts, of which a rank uses its own heads' or features'
           part

Gradients are reduced in float32, in the last of a step's micro-batches; weights are gathered in the
dtype of the products, in each micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch

from tritium.bench.scale.links import Collective, Group
from tritium.model import ModelConfig, Transformer
from tritium.model.block import Block

MODES = "ddp", "fsdp", "hsdp", "tp"
REDUCED = 4  # bytes of an element of a gradient that is reduced
STATISTICS = 5  # of a row of the loss: its maximum; sum, dot product, target's logit and spread


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered at once: a block, or what is in none."""

    shapes: tuple[tuple[int, ...], ...]

    def elements(self, ranks: int = 1) -> int:
        """Return the elements of all ranks' parts: rows are padded to a multiple of the ranks."""
        return sum(
            -(-rows // ranks) * ranks * torch.Size(rest).numel() for rows, *rest in self.shapes
        )


@dataclass(frozen=True)
class Mesh:
    """An arrangement of ranks: `replicas` copies, of `shards` parts each, all split `tensor` times.

    Neighbours share a node: those that split a tensor first, then those that share out parts.
    """

    mode: str
    replicas: int = 1
    shards: int = 1
    tensor: int = 1
    node: int = 8
    """GPUs of a node."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.replicas * self.shards * self.tensor

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered before they are used."""
        return self.mode in ("fsdp", "hsdp") or (self.mode == "tp" and self.shards > 1)

    @property
    def readers(self) -> int:
        """Number of ranks that read different data."""
        return self.replicas * self.shards

    def group(self, axis: str) -> Group:
        """Return the ranks along "replicas", "shards" or "tensor"."""
        inner = {"tensor": 1, "shards": self.tensor, "replicas": self.tensor * self.shards}[axis]
        size = getattr(self, axis)
        return Group(size, max(1, min(size, self.node // inner)))


def mesh_of(mode: str, gpus: int, node: int, config: ModelConfig) -> Mesh:
    """Return the arrangement of a mode.

    Args:
        mode: one of `MODES`.
        gpus: how many in all.
        node: how many of them share a node.
        config: the model.

    Raises:
        ValueError: there is none; the message says why.
    """
    if gpus > node and gpus % node:
        raise ValueError(f"scale: {gpus} GPUs are no whole number of nodes of {node}")
    within = min(gpus, node)
    if mode == "ddp":
        return Mesh(mode, replicas=gpus, node=node)
    if mode == "fsdp":
        return Mesh(mode, shards=gpus, node=node)
    if mode == "hsdp":
        if gpus <= node:
            raise ValueError(f"scale: hsdp on {gpus} GPUs of one node is fsdp")
        return Mesh(mode, gpus // node, node, node=node)
    split_config(config, within)
    return Mesh(mode, shards=gpus // within, tensor=within, node=node)


def split_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """Return the shape of the part of a model that one of `ranks` has when tensors are split.

    Raises:
        ValueError: heads, features or vocabulary cannot be shared out evenly.
    """
    if ranks == 1:
        return config
    sizes = {
        "query heads": config.n_heads, "key and value heads": config.kv_heads,
        "features": config.feed_forward_width, "classes": config.vocab_size,
    }  # fmt: skip
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"scale: tp over {ranks} GPUs must divide the {size:,} {name}")
    return replace(
        config, n_heads=config.n_heads // ranks, n_kv_heads=config.kv_heads // ranks,
        d_head=config.head_width, d_ff=config.feed_forward_width // ranks,
        vocab_size=config.vocab_size // ranks,
    )  # fmt: skip


@cache
def units(config: ModelConfig) -> tuple[Unit, Unit]:
    """Return what is in no block, and one block."""
    with torch.device("meta"):
        model = Transformer(replace(config, n_layers=1))
    block = tuple(tuple(p.shape) for p in model.blocks[0].parameters())
    inside = {id(p) for p in model.blocks[0].parameters()}
    root = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    return Unit(root), Unit(block)


def local_elements(config: ModelConfig, mesh: Mesh) -> int:
    """Return the number of parameters that one rank keeps."""
    root, block = units(split_config(config, mesh.tensor))
    all_parts = root.elements(mesh.shards) + config.n_layers * block.elements(mesh.shards)
    return all_parts // mesh.shards


@cache
def summed(config: ModelConfig) -> tuple[int, ...]:
    """Return the elements of a block's gradients that ranks of tp must add up."""
    with torch.device("meta"):
        block = cast(Block, Transformer(replace(config, n_layers=1)).blocks[0])
    attention, feed_forward = block.attention, block.feed_forward
    norms = (attention.query_norm, attention.key_norm)
    weights = [x.weight for x in (*norms, attention.token_shift) if x is not None]
    into = attention.query_key_value, getattr(feed_forward, feed_forward.into)
    return tuple(p.numel() for p in (*weights, *(x.bias for x in into)) if p is not None)


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step, by what they overlap with. Scalars are left out."""

    gather_root: Collective
    """Once in each micro-batch."""
    gather_block: Collective
    """Twice in each micro-batch, for every block."""
    scatter_root: Collective
    scatter_block: Collective
    reduce_root: Collective
    """Over replicas."""
    reduce_block: Collective
    activations: Collective
    """Sums of the blocks' activations, which wait for it."""
    ends: Collective
    """Sums of the embedding, and of the gradient of the hidden states."""
    statistics: Collective
    """Maxima of the loss's rows over the classes of each rank, then sums."""
    partial: Collective
    """Gradients of what every rank has, and uses for its own heads or features."""

    def all(self) -> tuple[Collective, ...]:
        """Return those that communicate."""
        return tuple(x for x in vars(self).values() if x.times and x.group.size > 1 and x.bytes)

    def moved(self, kind: str) -> float:
        """Return the bytes that each rank sends in a step by collectives of a kind."""
        return sum(x.moved for x in self.all() if x.kind == kind)


def traffic(
    config: ModelConfig, mesh: Mesh, *, tokens: int, passes: int, width: int,
    recomputed: int = 0,
) -> Traffic:  # fmt: skip
    """Predict the collectives of a step.

    Args:
        config: the model.
        mesh: the ranks.
        tokens: of a micro-batch.
        passes: micro-batches of a step, on each rank.
        width: bytes of an element that is multiplied: 2 or 4.
        recomputed: blocks of a micro-batch that the backward pass recomputes, their sums too.
    """
    n, s = config.n_layers, mesh.shards
    root, block = (x.elements(s) for x in units(split_config(config, mesh.tensor)))
    shards, replicas, tensor = map(mesh.group, ("shards", "replicas", "tensor"))
    hidden = tokens * config.d_model
    partial = summed(config)
    mean = sum(partial) * width // max(1, len(partial))
    return Traffic(
        gather_root=Collective("all-gather", root * width, shards, passes),
        gather_block=Collective("all-gather", block * width, shards, 2 * n * passes),
        scatter_root=Collective("reduce-scatter", root * REDUCED, shards),
        scatter_block=Collective("reduce-scatter", block * REDUCED, shards, n),
        reduce_root=Collective("all-reduce", root // s * REDUCED, replicas),
        reduce_block=Collective("all-reduce", block // s * REDUCED, replicas, n),
        activations=Collective("all-reduce", hidden * width, tensor, (4 * n + recomputed) * passes),
        ends=Collective("all-reduce", hidden * (width + REDUCED) // 2, tensor, 2 * passes),
        statistics=Collective("all-reduce", tokens * STATISTICS * REDUCED // 2, tensor, 2 * passes),
        partial=Collective("all-reduce", mean, tensor, len(partial) * n * passes),
    )
