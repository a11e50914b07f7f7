"""Collects the tensors of an optimizer step; validates and tabulates them if an address changed.

Gradients move from step to step, parameters and state hardly ever. On the host a step therefore
asks every tensor for its address, by functions that loop in C: a loop over the parameters of GPT-2
in Python would take several times as long.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from tritium.kernels.optimizers import _pointer_table
from tritium.kernels.optimizers._dtensor import (
    are_distributed,
    check_alike,
    local,
    mesh_of,
    replicas,
    shard_index,
)
from tritium.kernels.optimizers._pointer_table import (
    DTYPES,
    Tables,
    check_distinct,
    check_memory,
    in_order_of,
    is_capturing,
    tables,
)
from tritium.kernels.optimizers._rounding import hash_bits_reference
from tritium.kernels.optimizers._state import EXTRAS, Item, Storage
from tritium.kernels.optimizers._storage import Format

REMEMBERED = 8  # sets of addresses: gradients mostly return to where they were some steps ago

Group = dict[str, Any]
States = dict[Tensor, dict[str, Any]]


class Tensors:
    """Parameters that have a gradient, with their gradients and state.

    Attributes:
        params: the parameters.
        items: each parameter with its state.
        grads: their gradients, in the order of memory of the parameters.
        mesh: the mesh of the distributed ones, or None.
    """

    def __init__(self, op: str, storage: Storage, seed: int):
        self.params: list[Tensor] = []
        self.items: list[Item] = []
        self.grads: list[Tensor] = []
        self.mesh = None
        self._op, self._storage, self._seed = op, storage, seed
        self._last_inputs: tuple = ()
        self._contiguous = False
        self._keys: list[int] = []
        self._rates: list[int] = []
        self._address_rows: list[list[int]] = []
        self._seen: dict[tuple, _CachedTables] = {}
        self._current = _CachedTables()

    def collect(
        self,
        groups: list[Group],
        names: list[tuple[str, ...]],
        rates: list[int],
        states: Callable[[], States],
        start: Callable[[Tensor, Group], None],
    ) -> bool:
        """Collect the tensors of a step; return whether there are any.

        By group, `names` are the states of the rule, and `rates` the addresses of learning rates
        on the device or 0; `states` returns the state of all parameters, `start` makes what one
        lacks.
        """
        counts, ps, gs = [], [], []
        for group in groups:
            grads = list(map(attrgetter("grad"), group["params"]))
            has_grad = list(map(is_not, grads, repeat(None)))
            ps += group["params"] if all(has_grad) else compress(group["params"], has_grad)
            gs += grads if all(has_grad) else compress(grads, has_grad)
            counts.append(len(ps))
        if not ps:
            return False
        distributed = are_distributed(ps)
        addresses = self._addresses(ps, states(), distributed)
        if (names, rates, counts, addresses) != self._last_inputs:
            if is_capturing():
                raise RuntimeError(
                    f"{self._op}: a CUDA graph must capture a step like the one before it, got "
                    "parameters or state that are new; take a step outside the graph first"
                )
            self._list(groups, names, ps, states, start)
            self._rates = [rates[item.group] for item in self.items]
            self._last_inputs = names, rates, counts, self._addresses(ps, states(), distributed)
        if distributed:
            check_alike(self._op, ps, gs)
            gs, ps = list(map(local, gs)), [item.p for item in self.items]
        self._collect_grads(ps, gs)
        return True

    def _addresses(self, ps: list[Tensor], states: States, distributed: bool) -> list[int]:
        # The state of all parameters: looking up that of `ps` alone would take a third of the time.
        xs = chain(ps, chain.from_iterable(map(dict.values, states.values())))
        try:
            return list(map(Tensor.data_ptr, map(local, xs) if distributed else xs))
        except TypeError as error:
            raise TypeError(
                f"{self._op}: the state must hold tensors only; keep other values elsewhere"
            ) from error

    def _list(
        self,
        groups: list[Group],
        names: list[tuple[str, ...]],
        ps: list[Tensor],
        states: Callable[[], States],
        start: Callable[[Tensor, Group], None],
    ) -> None:
        self.mesh = mesh_of(self._op, ps) if are_distributed(ps) else None
        wanted, self.params, self.items = {*map(id, ps)}, ps, []
        for group in groups:
            for p in group["params"]:
                if id(p) in wanted:
                    start(p, group)
        kept, number = states(), 0
        for index, (group, own) in enumerate(zip(groups, names, strict=True)):
            for p in group["params"]:
                if id(p) in wanted:
                    self.items.append(self._item(p, index, number, own, kept.get(p, {})))
                    self._check(self.items[-1])
                number += 1
        self._keys = list(map(self.key, self.items))
        self._contiguous = _are_contiguous([item.p for item in self.items])
        self._address_rows = [
            [0 if x is None else x.data_ptr() for x in item.tensors()] for item in self.items
        ]
        self._seen.clear()

    def _item(
        self, p: Tensor, group: int, number: int, own: tuple[str, ...], state: dict[str, Any]
    ) -> Item:
        storage = self._storage
        xs = {name: local(x) for name, x in state.items()}
        own = tuple(name for name in own if name != "step")
        wanted = storage.names(p, own)
        states = [xs.get(name) if name in own else None for name in storage.states]
        scales = [
            xs.get(f"{name}_scale") if f"{name}_scale" in wanted else None
            for name in storage.states
        ]
        param = storage.param(p)
        return Item(
            local(p), group, number,
            1 if self.mesh is None else replicas(self._op, p, self.mesh), shard_index(p),
            param, storage.kinds(p, own), storage.draws(p, own), xs.get("step"),
            xs.get(EXTRAS.get(param, "")), xs.get("ema") if storage.ema else None,
            tuple(states), tuple(scales),
        )  # fmt: skip

    def _collect_grads(self, ps: list[Tensor], gs: list[Tensor]) -> None:
        if not (self._contiguous and _are_contiguous(gs)) and not _are_alike(ps, gs):
            gs = [in_order_of(self._op, p, g) for p, g in zip(ps, gs, strict=True)]
        self.grads = gs
        key = tuple(map(Tensor.data_ptr, gs)), tuple(map(attrgetter("dtype"), gs))
        known = self._seen.get(key)
        if known is None:
            for item, g in zip(self.items, gs, strict=True):
                check_memory(self._op, g, self.device)
                self._check_grad(item.p, g)
            held = [item.p.numel() > 0 for item in self.items]
            check_distinct(
                self._op, chain(compress(key[0], held), *compress(self._address_rows, held))
            )
            if len(self._seen) == REMEMBERED:
                self._seen.clear()
            known = self._seen[key] = _CachedTables()
        self._current = known

    def release(self) -> None:
        """Release the gradients, which `zero_grad` would not free otherwise."""
        self.grads = []

    def raw_grads(self) -> list[Tensor]:
        """Return the gradients in the order of memory of `.grad` itself."""
        return list(map(attrgetter("grad"), self.params))

    def copied_grads(self) -> list[Tensor]:
        """Return the gradients of which a step has read a copy."""
        pairs = zip(self.raw_grads(), self.grads, strict=True)
        return [g for g, read in pairs if local(g).data_ptr() != read.data_ptr()]

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.items[0].p.device

    def key(self, item: Item) -> int:
        """Return the seed of the random bits of a parameter's shard, the same in every step."""
        key = self._seed
        for part in (item.number, item.shard):
            key = hash_bits_reference(hash_bits_reference(key) + part & 0xFFFFFFFF)
        return key

    def tables(self) -> tuple[Tables, list[Format]]:
        """Return the tables of all tensors and the formats present; upload if addresses moved."""
        if self._current.tables is not None:
            return self._current.tables
        made = self._make_tables()
        if not is_capturing():
            self._current.tables = made
        return made

    def _make_tables(self) -> tuple[Tables, list[Format]]:
        formats = list(map(Item.format, self.items, self.grads))
        codes = list(map(int, formats))
        by_code = dict(sorted(zip(codes, formats, strict=True)))
        made = tables(tuple(self.rows()), _pointer_table.CHUNK, self.device)
        return made, list(by_code.values())

    def rows(self) -> list[tuple[int, ...]]:
        """Return the columns of every tensor in the table that the host knows, addresses last."""
        codes = [int(item.format(g)) for item, g in zip(self.items, self.grads, strict=True)]
        return [
            (
                item.p.numel(), DTYPES[g.dtype], item.replicas, item.group, code, key, rate,
                0 if item.step is None else item.step.data_ptr(), g.data_ptr(), *addresses,
            )
            for item, g, code, key, rate, addresses in zip(
                self.items, self.grads, codes, self._keys, self._rates, self._address_rows,
                strict=True,
            )
        ]  # fmt: skip

    def _check(self, item: Item) -> None:
        for x in item.tensors():
            if x is not None:
                check_memory(self._op, x, self.device)
        for x in (item.extra, item.ema, *item.states):
            if x is not None and (x.shape != item.p.shape or not _are_alike([item.p], [x])):
                raise ValueError(
                    f"{self._op}: a moment must have the shape {list(item.p.shape)} of its "
                    f"parameter and its strides {item.p.stride()}, got {list(x.shape)} and "
                    f"{x.stride()}; load moments by load_state_dict"
                )

    def _check_grad(self, p: Tensor, g: Tensor) -> None:
        if g.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"{self._op}: gradients must be float32 or bfloat16, got {g.dtype}; convert the "
                "parameters, or set their grad_dtype"
            )
        if g.shape != p.shape:
            raise ValueError(
                f"{self._op}: a gradient must have the shape {list(p.shape)} of its parameter, "
                f"got {list(g.shape)}; make a new optimizer for a model of new shapes"
            )


@dataclass
class _CachedTables:
    """Tables of a set of gradients whose addresses were checked; None before they are needed."""

    tables: tuple[Tables, list[Format]] | None = None


def _are_alike(ps: list[Tensor], gs: list[Tensor]) -> bool:
    """Return whether each of `gs` stores its elements in the order of its parameter."""
    if _are_contiguous(gs) and _are_contiguous(ps):
        return True
    strided = {*map(attrgetter("layout"), gs)} == {torch.strided}
    return strided and list(map(Tensor.stride, gs)) == list(map(Tensor.stride, ps))


def _are_contiguous(xs: list[Tensor]) -> bool:
    try:
        return all(map(Tensor.is_contiguous, xs))
    except RuntimeError:  # of sparse rows
        return False
