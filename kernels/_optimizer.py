"""What every optimizer here shares: checks, state, the step, and clipping inside it.

An optimizer is an update rule and its state. The gradients, parameters, states and step counts of
the whole model reach its kernels through one table (_multi_tensor.py), the hyper-parameters of its
groups through another; both are uploaded when they change, and nothing is read back.
"""

from collections.abc import Callable, Iterator
from itertools import chain, compress, pairwise, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _multi_tensor
from ._multi_tensor import DTYPES, Tables, check_memory, in_order_of, tables, upload
from ._runtime import uses_triton
from ._update import Part, Rule, launch_update
from .grad_norm import clip_coefficient_reference, grad_norm_reference, launch_partials


class Alike(NamedTuple):
    """Parameters that have a gradient, and state of the same names."""

    names: tuple[str, ...]
    groups: list[int]
    """By parameter, the index of its group."""
    columns: list[list[Tensor]]
    """Gradients, parameters, and state in the order of `names`."""

    def addresses(self) -> tuple:
        """Where all these tensors lie, to be compared with where they lay before."""
        return self.names, self.groups, [list(map(Tensor.data_ptr, x)) for x in self.columns]


class MultiTensorOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates all parameters at once, and may clip as it does.

    A subclass gives the rule, the names of its states in the order of the rule's kernels, and its
    plain definition: `_hyper_row`, `_update_reference`, and more of `_check_group`; `_names` where
    options decide which state there is.
    """

    rule: Rule
    states: tuple[str, ...]
    refused: tuple[str, ...] = ()
    """Options of torch's class that must be off in a state that is loaded."""

    def __init__(self, params, defaults: dict[str, Any], max_grad_norm: float | None) -> None:
        self._op = type(self).__name__
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"{self._op}: max_grad_norm must be positive, got {max_grad_norm}; "
                "None does not clip"
            )
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64)
        self._forget()
        super().__init__(params, defaults)

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The columns of the table of groups that follow the learning rate and the sign."""
        raise NotImplementedError

    def _update_reference(
        self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]
    ) -> None:
        """Update one parameter in plain PyTorch; `g` is negated to maximise, the step counted."""
        raise NotImplementedError

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state that a parameter of `group` has; of counted steps, "step" comes first."""
        return ("step", *self.states)

    def _initial(self, group: dict[str, Any]) -> float:
        """What a state holds before the first step."""
        return 0.0

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("max_grad_norm", "grad_norm", "skipped")}
        return super().__getstate__() | ours

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._op = type(self).__name__
        self._forget()

    def _forget(self) -> None:
        self._places: list[tuple] = []
        self._tables: tuple[Tables, list[Part]] | None = None
        self._hyper_rows: list[tuple[float, ...]] = []
        self._hyper = torch.empty(0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does, and check what is in it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        for p in group["params"]:
            self._check_dtype(p)
            check_memory(self._op, p, p.device)
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(f"{self._op}: a parameter must appear once, got one twice; drop one")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the same rule, from this class or from its model in torch.optim.

        Raises:
            ValueError: it was saved by another rule, with options that this class does not have,
                or for other shapes.
        """
        for group in state_dict["param_groups"]:
            if missing := self.defaults.keys() - {"maximize"} - group.keys():
                raise ValueError(
                    f"{self._op}: groups must hold {sorted(missing)}, got {sorted(group)}; "
                    "load what the same rule saved"
                )
            for name in filter(group.get, self.refused):
                raise ValueError(
                    f"{self._op}: {name} must be off, got a state saved with it; start afresh"
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            self._check_group(group)
            for p in filter(self.state.get, group["params"]):
                self._adopt(p, self._names(group), self.state[p])

    def _adopt(self, p: Tensor, names: tuple[str, ...], state: dict[str, Any]) -> None:
        others = state.keys() - {"step", *self.states}
        if others or not state.keys() >= {*names}:
            raise ValueError(
                f"{self._op}: the state of a parameter must hold {sorted(names)} and nothing else, "
                f"got {sorted(state)}; load what the same rule saved"
            )
        for name in names:
            if name == "step":
                # A copy: one tensor may serve all parameters, and every one is counted up.
                step = torch.as_tensor(state["step"])
                state["step"] = step.to(p.device, torch.float32, copy=True)
            else:
                state[name] = in_order_of(self._op, p, state[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the loss of `closure`, if given.

        Raises:
            TypeError: a tensor "must be float32".
            ValueError: tensors "must be dense", "must lie on one device", "must hold their own
                memory", "must have the shape" of their parameter, or "must lie apart".
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if alike := list(self._collect()):
            self._check_moved(alike)
            if uses_triton(alike[0].columns[1][0]):
                self._step_kernels(alike)
            else:
                self._step_reference(alike)
        return loss

    # On the way of every step, hence in columns, by functions that loop in C: a loop over the
    # parameters of GPT-2 would take twice as long.
    def _collect(self) -> Iterator[Alike]:
        """The parameters that have a gradient, by what state they have."""
        kinds: dict[tuple[str, ...], list[int]] = {}
        for index, group in enumerate(self.param_groups):
            kinds.setdefault(self._names(group), []).append(index)
        for names, indices in kinds.items():
            ps, groups = [], []
            for index in indices:
                here = [p for p in self.param_groups[index]["params"] if p.grad is not None]
                ps += here
                groups += repeat(index, len(here))
            if ps:
                gs = self._gradients(ps)
                yield Alike(names, groups, [gs, ps, *self._state_columns(ps, groups, names)])

    def _gradients(self, ps: list[Tensor]) -> list[Any]:
        gs = list(map(attrgetter("grad"), ps))
        if {*map(attrgetter("layout"), gs)} == {torch.strided} and (
            list(map(Tensor.stride, gs)) == list(map(Tensor.stride, ps))
        ):
            return gs
        return [in_order_of(self._op, p, g) for p, g in zip(ps, gs, strict=True)]

    def _state_columns(
        self, ps: list[Tensor], groups: list[int], names: tuple[str, ...]
    ) -> list[list[Tensor]]:
        if not names:
            return []
        states = list(map(self.state.__getitem__, ps))
        try:
            return [list(map(itemgetter(name), states)) for name in names]
        except KeyError:
            for p, index in zip(ps, groups, strict=True):
                self._start(p, self.param_groups[index])
            return [list(map(itemgetter(name), states)) for name in names]

    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        for name in self._names(group):
            if name in state:
                continue
            if name == "step":
                state[name] = torch.zeros((), dtype=torch.float32, device=p.device)
            else:
                state[name] = torch.full_like(p, self._initial(group))

    def _check_moved(self, alike: list[Alike]) -> None:
        """Check the tensors that do not lie where they did in the last step."""
        places = [part.addresses() for part in alike]
        if places != self._places:
            device = alike[0].columns[1][0].device
            before = chain(_rows(self._places), repeat(()))
            items = chain.from_iterable(zip(*part.columns, strict=True) for part in alike)
            for item, new, old in zip(items, _rows(places), before, strict=False):
                names = new[0]
                if old[:1] == (names,) and old[3:] == new[3:]:
                    names, item = (), item[:2]  # at most the gradient moved, as it often does
                if new != old:
                    self._check_item(names, item, device)
            self._places, self._tables = places, None

    def _check_item(
        self, names: tuple[str, ...], item: tuple[Tensor, ...], device: torch.device
    ) -> None:
        p = item[1]
        for name, x in zip(("grad", "param", *names), item, strict=True):
            self._check_dtype(x)
            check_memory(self._op, x, device)
            if name != "step" and (x.shape != p.shape or x.stride() != p.stride()):
                raise ValueError(
                    f"{self._op}: a gradient or moment must have the shape {list(p.shape)} of its "
                    f"parameter and its strides {p.stride()}, got {list(x.shape)} and "
                    f"{x.stride()}; load moments by load_state_dict"
                )

    def _step_reference(self, alike: list[Alike]) -> None:
        coef = None
        if self.max_grad_norm is not None:
            gs = chain.from_iterable(part.columns[0] for part in alike)
            norm = self.grad_norm = grad_norm_reference(list(gs))
            self.skipped = self.skipped.to(norm.device)
            if not norm.isfinite():
                self.skipped += 1
                return
            coef = clip_coefficient_reference(norm, self.max_grad_norm)
        for part in alike:
            gs, ps = part.columns[:2]
            for index, g, p in zip(part.groups, gs, ps, strict=True):
                group, state = self.param_groups[index], self.state[p]
                if "step" in part.names:
                    state["step"] += 1
                g = g if coef is None else g * coef
                self._update_reference(group, p, -g if group["maximize"] else g, state)

    def _step_kernels(self, alike: list[Alike]) -> None:
        ps = list(chain.from_iterable(part.columns[1] for part in alike))
        device = ps[0].device
        with torch.cuda.device_of(ps[0]):
            tables, parts = self._tables = self._tables or self._make_tables(alike, device)
            partials_P = norm = None
            self.skipped = self.skipped.to(device)
            if self.max_grad_norm is not None:
                partials_P = launch_partials(tables)
                norm = self.grad_norm = partials_P.new_empty(())
            launch_update(
                self.rule, tables, parts, self._hyper_table(device), partials_P, norm,
                self.skipped, self.max_grad_norm or 0.0,
            )  # fmt: skip
        torch.autograd.graph.increment_version(ps)

    def _make_tables(self, alike: list[Alike], device: torch.device) -> tuple[Tables, list[Part]]:
        """Upload the table of all tensors, and divide its chunks by the state that there is."""
        rows, chunk = [], _multi_tensor.CHUNK
        ends, held = [0], []
        for part, (names, groups, (gs, ps, *states)) in zip(alike, self._places, strict=True):
            sizes = list(map(Tensor.numel, part.columns[1]))
            own, nothing = dict(zip(names, states, strict=True)), [0] * len(sizes)
            others = [own.get(name, nothing) for name in ("step", *self.states)]
            dtypes = repeat(DTYPES[torch.float32], len(sizes))
            rows += zip(sizes, dtypes, groups, gs, ps, *others, strict=True)
            ends.append(ends[-1] + sum(max(1, -(-size // chunk)) for size in sizes))
            held.append(sum(1 << i for i, name in enumerate(self.states) if name in names))
        uploaded = tables(tuple(rows), chunk, device)
        chunks = [uploaded.chunks[first:last] for first, last in pairwise(ends)]
        return uploaded, list(map(Part, held, chunks))

    def _hyper_table(self, device: torch.device) -> Tensor:
        """The table of groups; a learning rate on `device` is copied into it there, every step."""
        lrs = [group["lr"] for group in self.param_groups]
        live = [isinstance(lr, Tensor) and lr.device == device for lr in lrs]
        rows = [
            (
                0.0 if there else float(lr),
                -1.0 if group["maximize"] else 1.0,
                *self._hyper_row(group),
            )
            for lr, there, group in zip(lrs, live, self.param_groups, strict=True)
        ]
        if rows != self._hyper_rows or self._hyper.device != device:
            self._hyper = upload(torch.tensor(rows, dtype=torch.float64), device)
            self._hyper_rows = rows
        for index in compress(range(len(lrs)), live):
            self._hyper[index, 0].copy_(lrs[index])
        return self._hyper

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if lr.dim() if isinstance(lr, Tensor) else not lr >= 0:
            raise ValueError(
                f"{self._op}: lr must be at least 0, a float or a 0-dim tensor, got {lr}"
            )

    def _check_not_negative(self, group: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            if not group[name] >= 0:
                raise ValueError(f"{self._op}: {name} must be at least 0, got {group[name]}")

    def _check_betas(self, group: dict[str, Any]) -> None:
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{self._op}: betas must lie in [0, 1), got {group['betas']}")

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype != torch.float32:
            raise TypeError(
                f"{self._op}: parameters must be float32, got {x.dtype}; convert the model with "
                ".float(), and lower the precision of its arithmetic by torch.autocast"
            )


def _rows(places: list[tuple]) -> Iterator[tuple]:
    """By parameter: the names of its state, its group, and the addresses of its tensors."""
    for names, groups, columns in places:
        yield from zip(repeat(names), groups, *columns, strict=False)
