"""Activation checkpointing, block by block, and the bytes that a forward pass keeps.

A checkpointed block keeps its inputs and recomputes the rest in the backward pass:

    none        no block is checkpointed
    selective   every block is, except for the outputs of matrix products, of attention, and of
                sums over ranks
    every-N     the N-th block is, the 2N-th, and so on
    full        every block is

Recomputed values are the same bit for bit, dropout included, so a policy changes only the memory
and the time of a step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tritium.model.cpu_linear import ONEDNN_PRODUCTS, sees_through
from tritium.model.redrawing import may_draw

POLICIES = "none", "selective", "every-2", "full"
"""From the least that is recomputed to the most; any other number may follow `every-`."""

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default, _aten.addmm.default, *ONEDNN_PRODUCTS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip
if torch.distributed.is_available():
    KEPT.add(torch.ops._c10d_functional.all_reduce.default)
"""Operators whose outputs `selective` keeps."""


def check_policy(policy: str, n_layers: int | None = None, reversible: bool = False) -> None:
    """Raise ValueError unless `policy` is one, and checkpoints a block of `n_layers`, if given.

    A reversible model, which keeps the activations of no block, has "none" alone.
    """
    form = r"none|selective|full|every-[1-9]\d*"
    if not isinstance(policy, str) or not re.fullmatch(form, policy):
        raise ValueError(
            "activation_checkpointing must be none, selective, full or every-N, such as every-2, "
            f"got {policy!r}"
        )
    if reversible and policy != "none":
        raise ValueError(
            "activation_checkpointing must be none for a reversible model, which recomputes every "
            f"block, got {policy!r}; leave it out"
        )
    if n_layers is not None and policy != "none" and not checkpointed(policy, n_layers):
        raise ValueError(
            f"activation_checkpointing must reach a block, got {policy!r} for a model of "
            f"{n_layers}; take none, or a number up to {n_layers}"
        )


def checkpointed(policy: str, n_layers: int) -> int:
    """Return how many of the first `n_layers` blocks are checkpointed."""
    if policy.startswith("every-"):
        return n_layers // int(policy.removeprefix("every-"))
    return 0 if policy == "none" else n_layers


def run_block(policy: str, layer: int, block: Callable, inputs: tuple, *, draws: bool):
    """Return `block(*inputs)`, keeping what `policy` says.

    Args:
        policy: one that `check_policy` has seen.
        layer: the number of the block, from 0.
        block: the block.
        inputs: its inputs.
        draws: whether it draws random numbers by its dropout. Those that it draws, by that or by
            what others have put into it, are the same when it runs again.
    """
    keeps_all = checkpointed(policy, layer) == checkpointed(policy, layer + 1)
    # A transform of torch.func takes no saved-tensor hooks.
    if keeps_all or sees_through() or not torch.is_grad_enabled():
        return block(*inputs)
    # A compiler repeats them itself.
    draws = draws or (not torch.compiler.is_compiling() and may_draw(block))
    run = partial(checkpoint, block, *inputs, use_reentrant=False, preserve_rng_state=draws)
    # Two calls, because torch.compile takes no context_fn that is decided as it runs.
    return run(context_fn=_selective_contexts) if policy == "selective" else run()


def _keep(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = partial(create_selective_checkpoint_contexts, _keep)


class Ledger(TorchDispatchMode):
    """Count the bytes of the tensors that live, storage by storage, while it is entered.

    Args:
        given: tensors that do not count.

    Attributes:
        live: bytes now.
        peak: the most there were since `peak` was last set.
    """

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._given = list(given)  # else another storage may take an address
        self._known = {_address(x) for x in self._given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator, and note what it made."""
        outputs = func(*args, **kwargs or {})
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor) and _address(x) not in self._known:
                storage = x.untyped_storage()
                self._known.add(_address(x))
                self.live += storage.nbytes()
                finalize(storage, self._free, _address(x), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _free(self, address: int, nbytes: int) -> None:
        self.live -= nbytes
        self._known.discard(address)


def saved_bytes(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> int:
    """Count what a forward pass keeps for its backward pass.

    Args:
        forward: computes a loss.
        given: parameters, inputs and tables, which do not count.

    Returns:
        Bytes of the distinct storages that autograd packs, and of those that only `selective`
        keeps, which autograd does not see.
    """
    given, kept = list(given), {}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **kwargs or {})
            if func in KEPT:
                for x in filter(torch.is_tensor, tree_leaves(outputs)):
                    kept[_address(x)] = x.untyped_storage().nbytes()
                    finalize(x.untyped_storage(), kept.pop, _address(x), None)
            return outputs

    packed = {}

    def pack(x: Tensor) -> Tensor:
        packed[_address(x)] = x.untyped_storage().nbytes()
        return x

    with Products(), saved_tensors_hooks(pack, lambda x: x):
        loss = forward()
    found = packed | kept  # what only passed through is gone from `kept`
    del loss
    return sum(found[address] for address in found.keys() - set(map(_address, given)))


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata
