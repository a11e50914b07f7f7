"""What every optimizer here shares: checks, state, the step, and clipping inside it.

An optimizer is an update rule and its moments. The gradients, parameters, moments and step counts
of the whole model reach its kernels through one table (_multi_tensor.py), the hyper-parameters of
its groups through another; both are uploaded when they change, and nothing is read back.
"""

from collections.abc import Callable
from itertools import chain, compress, repeat
from operator import itemgetter, ne
from typing import Any

import torch
from torch import Tensor

from . import _multi_tensor
from ._multi_tensor import DTYPES, Tables, check_memory, in_order_of, tables, upload
from ._runtime import uses_triton
from .grad_norm import clip_coefficient_reference, grad_norm_reference, launch_partials

# The tensors of a parameter, in the order of the table's addresses: gradient, the parameter itself,
# moments, step count.
Item = tuple[Tensor, ...]


class MultiTensorOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates all parameters at once, and may clip as it does.

    A subclass names its moments and supplies the rule: `_hyper_row`, `_update_reference`,
    `_update`, and more of `_check_group`.
    """

    moments: tuple[str, ...]

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
        """The columns of the table of groups that follow the learning rate."""
        raise NotImplementedError

    def _update_reference(
        self, group: dict[str, Any], g: Tensor, p: Tensor, *state: Tensor
    ) -> None:
        """Update one parameter in plain PyTorch; `state` is its moments and its step count."""
        raise NotImplementedError

    def _update(
        self, tables: Tables, hyper: Tensor, partials_P: Tensor | None, norm: Tensor | None
    ) -> None:
        """Launch the update, the step counts included; with a norm, only if that is finite."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("max_grad_norm", "grad_norm", "skipped")}
        return super().__getstate__() | ours

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._op = type(self).__name__
        self._forget()

    def _forget(self) -> None:
        self._places: list[tuple[int, ...]] = []
        self._tables: Tables | None = None
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
            ValueError: it was saved by another rule, or for other shapes.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            self._check_group(group)
            for p in filter(self.state.get, group["params"]):
                self._adopt(p, self.state[p])

    def _adopt(self, p: Tensor, state: dict[str, Any]) -> None:
        missing = {*self.moments, "step"} - state.keys()
        if missing:
            raise ValueError(
                f"{self._op}: the state of a parameter must hold {sorted(missing)}, got "
                f"{sorted(state)}; load what the same rule saved"
            )
        for name in self.moments:
            state[name] = in_order_of(self._op, p, state[name])
        # A copy, because one tensor may serve all parameters, and every one is counted up.
        step = torch.as_tensor(state["step"])
        state["step"] = step.to(p.device, torch.float32, copy=True)

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
        groups, items = self._items()
        if items:
            self._check_moved(groups, items)
            if uses_triton(items[0][1]):
                self._step_kernels(items)
            else:
                self._step_reference(groups, items)
        return loss

    def _items(self) -> tuple[list[int], list[Item]]:
        """The parameters that have a gradient, and the index of the group of each."""
        groups, items = [], []
        state_of = itemgetter(*self.moments, "step")
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                g = p.grad
                if g is not None:
                    state = self.state[p] or self._start(p)
                    if g.layout != torch.strided or g.stride() != p.stride():
                        g = in_order_of(self._op, p, g)
                    groups.append(index)
                    items.append((g, p, *state_of(state)))
        return groups, items

    def _start(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self.moments:
            state[name] = torch.zeros_like(p)
        return state

    def _check_moved(self, groups: list[int], items: list[Item]) -> None:
        """Check the tensors that do not lie where they did in the last step."""
        places = [(n, *map(Tensor.data_ptr, item)) for n, item in zip(groups, items, strict=True)]
        if places != self._places:
            for item in compress(items, map(ne, places, chain(self._places, repeat(None)))):
                self._check_item(item, items[0][1].device)
            self._places, self._tables = places, None

    def _check_item(self, item: Item, device: torch.device) -> None:
        p = item[1]
        for x in item:
            self._check_dtype(x)
            check_memory(self._op, x, device)
        for x in item[:-1]:
            if x.shape != p.shape or x.stride() != p.stride():
                raise ValueError(
                    f"{self._op}: a gradient or moment must have the shape {list(p.shape)} of its "
                    f"parameter and its strides {p.stride()}, got {list(x.shape)} and "
                    f"{x.stride()}; load moments by load_state_dict"
                )

    def _step_reference(self, groups: list[int], items: list[Item]) -> None:
        coef = None
        if self.max_grad_norm is not None:
            norm = self.grad_norm = grad_norm_reference([item[0] for item in items])
            self.skipped = self.skipped.to(norm.device)
            if not norm.isfinite():
                self.skipped += 1
                return
            coef = clip_coefficient_reference(norm, self.max_grad_norm)
        for index, (g, p, *state) in zip(groups, items, strict=True):
            state[-1] += 1
            g = g if coef is None else g * coef
            self._update_reference(self.param_groups[index], g, p, *state)

    def _step_kernels(self, items: list[Item]) -> None:
        device = items[0][1].device
        with torch.cuda.device_of(items[0][1]):
            if self._tables is None:
                self._tables = self._make_tables(items)
            partials_P = norm = None
            self.skipped = self.skipped.to(device)
            if self.max_grad_norm is not None:
                partials_P = launch_partials(self._tables)
                norm = self.grad_norm = partials_P.new_empty(())
            self._update(self._tables, self._hyper_table(device), partials_P, norm)
        torch.autograd.graph.increment_version([item[1] for item in items])

    def _make_tables(self, items: list[Item]) -> Tables:
        rows = tuple(
            (item[1].numel(), DTYPES[item[0].dtype], *place)
            for item, place in zip(items, self._places, strict=True)
        )
        return tables(rows, _multi_tensor.CHUNK, items[0][1].device)

    def _hyper_table(self, device: torch.device) -> Tensor:
        """The table of groups; a learning rate on `device` is copied into it there, every step."""
        lrs = [group["lr"] for group in self.param_groups]
        live = [isinstance(lr, Tensor) and lr.device == device for lr in lrs]
        rows = [
            (0.0 if there else float(lr), *self._hyper_row(group))
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

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype != torch.float32:
            raise TypeError(
                f"{self._op}: parameters must be float32, got {x.dtype}; convert the model with "
                ".float(), and lower the precision of its arithmetic by torch.autocast"
            )
