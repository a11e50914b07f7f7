"""Tensor parallelism: every rank computes some heads and some feed-forward units of each block.

    queries, keys, values, gate, up    rows of this rank's heads and units
    output, down                       columns of the same; summed over the ranks
    embedding, head                    rows of this rank's tokens
    norms, biases, token shifts        whole on every rank

What enters a block, and what it adds to the residual stream, is the same on every rank: one
all-reduce behind each sum in the forward pass, and one in front of each product in the backward
pass. Parameters and what is communicated are DTensors; between the two a block computes with plain
tensors, as it does alone. Projections that are packed in one product are split one by one, so the
rows of the packed weight are in another order than in a model of one rank: `in_rank_order`,
`in_model_order`.

Shoeybi et al., "Megatron-LM", 2019. https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tritium.model.block import Block
from tritium.model.config import ModelConfig
from tritium.model.cpu_linear import Linear
from tritium.model.token_shift import TokenShift
from tritium.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

DIMENSION = "tensor"
"""Name of the dimension of the mesh."""

Place = tuple[nn.Module, str]  # a module, and the name of its own parameter


def obstacle(config: ModelConfig, size: int) -> str | None:
    """Return what of a shape `size` ranks cannot share, as the end of "must be ...", or None."""
    for name, count in (
        ("n_heads", config.n_heads), ("n_kv_heads", config.kv_heads),
        ("d_ff", config.feed_forward_width),
    ):  # fmt: skip
        if count % size:
            return f"{name} must be divisible by the {size} processes of a group, got {count}"
    rows = -(-config.vocab_size // size)
    if rows * (size - 1) >= config.vocab_size:
        return f"vocab_size must give each of {size} processes a token, got {config.vocab_size}"
    return None


def split(model: Transformer, mesh: DeviceMesh) -> None:
    """Split a model over the ranks of a mesh of one dimension, in place.

    Args:
        model: whole, the same on every rank, of a shape that has no `obstacle`.
        mesh: the ranks; its dimension is named `DIMENSION`.
    """
    size = mesh.size()
    for block in cast("Iterable[Block]", model.blocks):
        attention, feed_forward = block.attention, block.feed_forward
        into = attention.query_key_value, getattr(feed_forward, feed_forward.into)
        out_of = attention.output, feed_forward.down
        for linear in into:
            rows = rank_order(linear, size).chunk(size)[mesh.get_local_rank()]
            _distribute(linear, "weight", mesh, linear.weight.detach()[rows], 0)
            linear.register_forward_pre_hook(partial(_enter, mesh))
        for linear in out_of:
            _distribute(linear, "weight", mesh, _chunk(linear.weight, mesh, 1), 1)
        attention.kv_heads //= size
        _keep_whole(block, mesh)
        norms = (attention.query_norm, attention.key_norm)
        shifts = [] if attention.token_shift is None else [(attention.token_shift, "weight")]
        local = _Local(
            _places(block), mesh, summed=[(norm, "weight") for norm in norms if norm is not None],
            packed=[*((linear, "bias") for linear in into), *shifts],
            behind=[(linear, "bias") for linear in out_of],
        )  # fmt: skip
        local.around(block)
        for linear in out_of:
            linear.register_forward_hook(partial(_leave, mesh, local.biases))
    _split_vocabulary(model, mesh)


def _split_vocabulary(model: Transformer, mesh: DeviceMesh) -> None:
    embedding, head = model.embedding, model.head
    tied = head.weight is embedding.weight
    _distribute(embedding, "weight", mesh, _chunk(embedding.weight, mesh, 0), 0)
    if tied:
        head.weight = embedding.weight
    else:
        _distribute(head, "weight", mesh, _chunk(head.weight, mesh, 0), 0)
    embedding.forward = partial(_look_up, mesh, embedding)  # type: ignore[method-assign]
    _keep_whole(model, mesh)
    others = [model.norm, *([model.position_embedding] if model.position_embedding else [])]
    local = _Local([place for module in others for place in _places(module)], mesh)
    hidden = model.hidden

    def replicated(*arguments: Any, **options: Any) -> Tensor:
        """Return the hidden states as a DTensor, by which the loss knows that the head is split."""
        with local:
            h_BLD = hidden(*arguments, **options)
        return _replicated(mesh, None, (h_BLD,))[0]

    model.hidden = replicated  # type: ignore[method-assign]


def rank_order(linear: Linear | TokenShift, size: int) -> Tensor:
    """Return the rows of a packed weight in the order in which `size` ranks have them."""
    splits = linear.splits or (len(linear.weight),)
    parts = torch.arange(sum(splits)).split([*splits])
    by_rank = zip(*(part.chunk(size) for part in parts), strict=True)
    return torch.cat([rows for own in by_rank for rows in own])


def packed(model: nn.Module) -> dict[str, tuple[int, Linear]]:
    """Return the parameters whose rows are in the order of ranks: their number, and the layer."""
    return {
        f"{name}.weight": (module.weight.device_mesh[DIMENSION].size(), module)  # type: ignore
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module.splits and DIMENSION in _dimensions(module.weight)
    }


def in_model_order(x: DTensor, size: int, linear: Linear) -> DTensor:
    """Return a weight, or a state of one, with its rows in the order of a model of one rank.

    Every rank of the mesh calls it; it gathers the rows of a group.
    """
    return _reordered(x, rank_order(linear, size).argsort())


def in_rank_order(x: DTensor, size: int, linear: Linear) -> DTensor:
    """Return the opposite of `in_model_order`."""
    return _reordered(x, rank_order(linear, size))


def _reordered(x: DTensor, rows: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    mesh = x.device_mesh[DIMENSION]
    part = x.to_local().contiguous()
    bits = part.view(torch.uint8)  # gloo gathers no int16
    every = [torch.empty_like(bits) for _ in range(mesh.size())]
    dist.all_gather(every, bits, mesh.get_group())
    mine = torch.cat(every)[rows.chunk(mesh.size())[mesh.get_local_rank()].to(bits.device)]
    return DTensor.from_local(
        mine.view(part.dtype), x.device_mesh, x.placements, run_check=False, shape=x.shape,
        stride=x.stride(),
    )  # fmt: skip


def _dimensions(x: Any) -> tuple[str, ...]:
    return x.device_mesh.mesh_dim_names or () if hasattr(x, "device_mesh") else ()


def _places(module: nn.Module) -> list[Place]:
    return [
        (part, name) for part in module.modules() for name, p in part._parameters.items()
        if p is not None
    ]  # fmt: skip


def _chunk(p: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return p.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]


def _distribute(
    module: nn.Module, name: str, mesh: DeviceMesh, part: Tensor, dim: int | None
) -> None:
    """Make a parameter a DTensor of which this rank has `part`, sharded on `dim` or replicated."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    p = module._parameters[name]
    assert p is not None
    placement = Replicate() if dim is None else Shard(dim)
    whole = DTensor.from_local(
        part.clone(memory_format=torch.contiguous_format), mesh, [placement], run_check=False,
        shape=p.shape, stride=p.stride(),
    )  # fmt: skip
    module._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)


def _keep_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Replicate every parameter that is not distributed yet, so that all are on one mesh."""
    for part, name in _places(module):
        p = part._parameters[name]
        if p is not None and not _dimensions(p):
            _distribute(part, name, mesh, p.detach(), None)


class _Local(AbstractContextManager):
    """A block: inside it, parameters of modules are this rank's parts, plain tensors.

    Args:
        places: the parameters.
        mesh: the ranks.
        summed: those of which each rank uses all for its own heads: their gradients are summed.
        packed: biases of packed projections, and token shifts, of which each rank takes its rows.
        behind: biases that are added behind a sum over the ranks, by `_leave`.

    Attributes:
        biases: of `behind`, by their modules, inside the block.
    """

    def __init__(
        self, places: Sequence[Place], mesh: DeviceMesh, *, summed: Sequence[Place] = (),
        packed: Sequence[Place] = (), behind: Sequence[Place] = (),
    ):  # fmt: skip
        self._mesh, self._places = mesh, places
        self._summed, self._behind = {*summed, *packed}, {*behind}
        size = mesh.size()
        self._rows = {
            place: rank_order(cast("Linear | TokenShift", place[0]), size).chunk(size)[
                mesh.get_local_rank()
            ]
            for place in packed
        }
        self._kept: list[nn.Parameter | None] = []
        self.biases: dict[nn.Module, Tensor] = {}

    def around(self, module: nn.Module) -> None:
        """Enter it whenever `module` is called, also where a checkpoint calls it again."""
        module.register_forward_pre_hook(lambda *_: self.__enter__())
        # Recomputation may end by an exception, as soon as it has what it needs.
        module.register_forward_hook(lambda *_: self.__exit__(), always_call=True)

    def __enter__(self) -> None:
        self._kept = [module._parameters[name] for module, name in self._places]
        for place, p in zip(self._places, self._kept, strict=True):
            module, name = place
            module._parameters[name] = part = self._part(place, p)
            if place in self._behind:
                self.biases[module], module._parameters[name] = part, None

    def __exit__(self, *_: object) -> None:
        for (module, name), p in zip(self._places, self._kept, strict=True):
            module._parameters[name] = p
        self.biases.clear()
        self._kept = []

    def _part(self, place: Place, p: Any) -> Any:
        if place not in self._summed:
            return p.to_local()
        from torch.distributed.tensor import Partial

        part = p.redistribute(self._mesh, p.placements).to_local(grad_placements=[Partial()])
        return part[self._rows[place].to(part.device)] if place in self._rows else part


def _replicated(mesh: DeviceMesh, _module: nn.Module | None, inputs: tuple) -> tuple[Tensor]:
    from torch.distributed.tensor import DTensor, Replicate

    return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)


def _look_up(
    mesh: DeviceMesh, embedding: nn.Embedding, tokens: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the rows of an embedding, each of which one rank has."""
    weight_VD: Tensor = embedding.weight.to_local()  # type: ignore[operator]
    own = tokens - mesh.get_local_rank() * -(-embedding.num_embeddings // mesh.size())
    elsewhere = (own < 0) | (own >= len(weight_VD))
    x_BLD = F.embedding(own.masked_fill(elsewhere, 0), weight_VD)
    return _sum(mesh, x_BLD.masked_fill(elsewhere.unsqueeze(-1), 0).to(dtype or x_BLD.dtype))


def _sum(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """Return the sum over the ranks, whose gradient every rank has."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    part = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return part.redistribute(mesh, [Replicate()]).to_local()


def _enter(mesh: DeviceMesh, _module: nn.Module, inputs: tuple) -> tuple[Tensor]:
    """Return the input of a product of which each rank computes some columns."""
    from torch.distributed.tensor import Partial

    (x,) = _replicated(mesh, None, inputs)
    return (x.to_local(grad_placements=[Partial()]),)  # type: ignore[attr-defined]


def _leave(
    mesh: DeviceMesh, biases: dict[nn.Module, Tensor], module: nn.Module, _inputs: tuple, y: Tensor
) -> Tensor:
    """Return the sum over the ranks of a product, and the bias added if there is one."""
    y = _sum(mesh, y)
    return y + biases[module] if module in biases else y
