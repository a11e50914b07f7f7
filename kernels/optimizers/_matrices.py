"""Matrices of a model, and their step by Muon in plain PyTorch: all of one shape at once."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritium.kernels.optimizers._dtensor import chunk_of, local, sharing
from tritium.kernels.optimizers._exchange import Exchange, Matrix
from tritium.kernels.optimizers._orthogonalize import (
    Triple,
    normalize_rows_reference,
    orthogonalize_reference,
)
from tritium.kernels.optimizers._rounding import ABSENT
from tritium.kernels.optimizers._step_inputs import Tensors
from tritium.kernels.optimizers._step_kernels import GRADS
from tritium.kernels.optimizers._step_reference import (
    Move,
    Terms,
    key_reference,
    momentum_reference,
    update_reference,
)
from tritium.kernels.optimizers.grad_norm import squares_reference

LARGE = 128  # rows and columns of a matrix from which on a CPU multiplies it faster in bfloat16


class Recipe(NamedTuple):
    """Options with which the matrices of a group are orthogonalized."""

    splits: tuple[int, ...] | None
    """Rows of each matrix that is stacked in a parameter; None: it is one matrix."""
    coefficients: tuple[Triple, ...]
    """Coefficients of each step."""
    eps: float
    scale: Callable[[int, int], float]
    """Factor of a step, from rows and columns."""
    beta2: float | None
    splits_by_shard: bool = False
    """Whether every shard of rows, not the parameter, is a stack of the matrices."""

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the matrices of a parameter, or their rows of its second moments, as views."""
        return x.split(self.splits or (len(x),))

    def shared(self, p: Tensor, moments: Tensor | None) -> Matrix:
        """Return a parameter `[R, C]` as an `Exchange` takes it, with this rank's moments."""
        n_columns, rows = p.shape[1], self.splits or (len(p),)
        cost = sum(n * n_columns * min(n, n_columns) for n in rows)
        return Matrix(p, cost, self.splits if self.splits_by_shard else None, moments)


def step_matrices_reference(
    found: Tensors, recipes: dict[int, Recipe], groups: list[dict[str, Any]], terms: list[Terms],
    moments: dict[int, Tensor], exchange: Exchange | None, sums: Tensor | None,
) -> None:  # fmt: skip
    """Update matrices and their state.

    Args:
        found: all parameters of the step.
        recipes: those of matrices, by the index of the parameter.
        groups: options of the parameter groups.
        terms: terms outside the rule, by group.
        moments: second moments of the rows `[R, 1]`, by the index of the parameter; empty for
            matrices without.
        exchange: the way to whole matrices, which has the moments, where some are sharded.
        sums: `[N, 3]`, receives the squares of gradients, updates and weights, if given.
    """
    ahead, keys = {}, {}
    for i in recipes:
        item, g = found.items[i], found.grads[i]
        group, scale = groups[item.group], terms[item.group].scale
        t = 0 if item.step is None else int(item.step.add_(1).item())
        keys[i] = key_reference(found.key(item), t) if item.draws else 0
        ahead[i] = momentum_reference(item, g, scale, keys[i], group["momentum"], group["nesterov"])
    if exchange is None:
        orthogonalize_all(ahead, recipes, moments)
    else:
        ahead = _orthogonalized_by_owners(ahead, recipes, exchange)
    for i, o in ahead.items():
        item, squares = found.items[i], None if sums is None else sums[i].zero_()
        update_reference(
            item._replace(kinds=(ABSENT.value,) * len(item.kinds)), o,
            partial(_move, float(groups[item.group]["lr"])), terms[item.group]._replace(scale=1.0),
            keys[i], squares,
        )  # fmt: skip
        if squares is not None:
            squares[GRADS.value] = squares_reference([found.grads[i]])[0]


def orthogonalize_all(
    us: dict[int, Tensor], recipes: dict[int, Recipe], moments: dict[int, Tensor]
) -> None:
    """Orthogonalize and scale every matrix of `us` in place, those of one shape together."""
    alike: dict[tuple, list[tuple[Tensor, Tensor | None]]] = {}
    for i, u in us.items():
        recipe = recipes[i]
        parts = recipe.parts(u)
        rows: Sequence[Tensor | None] = [None] * len(parts)
        if recipe.beta2 is not None:
            rows = recipe.parts(moments[i])
        for part, row in zip(parts, rows, strict=True):
            key = (part.shape, recipe._replace(splits=None))
            alike.setdefault(key, []).append((part, row))
    for ((n_rows, n_columns), recipe), found in alike.items():
        u_NRC = torch.stack([part for part, _ in found])
        dtype = _dtype(u_NRC)
        o_NRC = orthogonalize_reference(u_NRC, recipe.coefficients, recipe.eps, dtype).float()
        if recipe.beta2 is not None:
            v_NR1 = torch.stack([row for _, row in found if row is not None])
            o_NRC = normalize_rows_reference(o_NRC, v_NR1, recipe.beta2)
            for (_, row), v_R1 in zip(found, v_NR1, strict=True):
                assert row is not None
                row.copy_(v_R1)
        o_NRC = o_NRC * recipe.scale(n_rows, n_columns)
        for (part, _), o_RC in zip(found, o_NRC, strict=True):
            part.copy_(o_RC)


def _orthogonalized_by_owners(
    us: dict[int, Tensor], recipes: dict[int, Recipe], exchange: Exchange
) -> dict[int, Tensor]:
    """Return the shards of the orthogonalized matrices, from those of `us`."""
    for i, u in us.items():
        exchange.shards[i].copy_(u)
    exchange.gather()
    orthogonalize_all(exchange.whole, recipes, exchange.moments)
    exchange.scatter()
    return exchange.shards


def _move(lr: float, o: Tensor, _states: list[Tensor | None]) -> Move:
    return Move(lr, o)


def _dtype(u_NRC: Tensor) -> torch.dtype:
    """Return the dtype of products: bfloat16, but on a CPU only of large ones that it speeds up."""
    if u_NRC.is_cuda:
        return torch.bfloat16
    large = min(u_NRC.shape[1:]) >= LARGE
    return torch.bfloat16 if large and multiplies_bfloat16() else torch.float32


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def check_matrices(group: dict[str, Any]) -> None:
    """Raise unless Muon can update the parameters of a group."""
    if not group["decoupled_weight_decay"] or group["l1"]:
        raise ValueError(
            "Muon: weight decay of matrices must be decoupled, and l1 must be 0, got "
            f"decoupled_weight_decay={group['decoupled_weight_decay']}, l1={group['l1']}; put the "
            "parameters in a group with use_muon=False"
        )
    for p in group["params"]:
        if p.dim() != 2 or not local(p).is_contiguous():
            raise ValueError(
                f"Muon: parameters must be contiguous matrices, got shape {list(p.shape)} and "
                f"strides {local(p).stride()}; put others in a group with use_muon=False"
            )
        ranks = sharing("Muon", p).places
        splits = group["splits"]
        if splits is not None and (sum(splits) != len(p) or min(splits, default=0) < 1):
            raise ValueError(
                f"Muon: splits must be positive and must add up to the rows of a parameter, "
                f"{len(p)}, got {splits}"
            )
        _, among = chunk_of(p, 0, ranks[0])
        if splits is not None and group["splits_by_shard"] and any(x % among for x in splits):
            raise ValueError(
                f"Muon: splits must be divisible by the {among} ranks that share rows with "
                f"splits_by_shard, got {splits}; shard the parameter otherwise"
            )
