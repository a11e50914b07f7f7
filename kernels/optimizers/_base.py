"""Base class of the optimizers: argument checks, state, the fused step with clipping.

An optimizer is an update rule and its state. The gradients, parameters, states and step counts of
the whole model reach its kernels through one table (_pointer_table.py), the hyper-parameters of its
groups through another; both are uploaded when they change, and nothing is read back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tritium.kernels.optimizers._dtensor import local, sum_over_ranks
from tritium.kernels.optimizers._options import (
    Norms,
    StepOptions,
    check_betas,
    check_flags,
    check_keys,
    checked,
    explained,
    is_number,
)
from tritium.kernels.optimizers._pointer_table import Tables, check_memory, is_capturing, upload
from tritium.kernels.optimizers._state import Storage
from tritium.kernels.optimizers._step_inputs import Tensors
from tritium.kernels.optimizers._step_kernels import (
    GRADS,
    PENALTY1,
    PENALTY2,
    SUMS,
    UPDATES,
    Rule,
    StepFlags,
    launch_norms,
    launch_update,
)
from tritium.kernels.optimizers._step_reference import Move, Terms, key_reference, update_reference
from tritium.kernels.optimizers._step_torch import Fused, step_fused
from tritium.kernels.optimizers._storage import Format
from tritium.kernels.optimizers._torch_optimizer import TorchOptimizer
from tritium.kernels.optimizers.grad_norm import (
    clip_coefficient_reference,
    launch_partials,
    norm_reference,
    squares_reference,
)
from tritium.kernels.runtime import uses_triton


class MultiTensorOptimizer(TorchOptimizer):
    """A `torch.optim.Optimizer` that updates all parameters at once, and may clip as it does.

    A subclass gives the rule, the names of its states in the order of the rule's kernels, and its
    plain reference: `_hyper_row`, `_rule_reference`, and more of `_check_group`; `_names` where
    options decide which state there is.
    """

    rule: Rule
    states: tuple[str, ...]
    squares: tuple[str, ...] = ()
    """States that are never negative."""
    rows: tuple[str, ...] = ()
    """States of one number per row."""
    optional_keys: frozenset[str] = frozenset()
    """Keys of groups, beside `OPTIONAL_GROUP_KEYS`, that a state may lack."""
    fused: Fused | None = None
    """Step by PyTorch's fused kernel for CPUs, if there is one."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        names = [*signature(cls.__init__).parameters, *StepOptions.__annotations__]
        cls.__doc__ = explained(cls.__doc__, names)

    def __init__(self, params, defaults: dict[str, Any], options: StepOptions) -> None:
        self._op = type(self).__name__
        every = self._options = checked(self._op, options)
        self.max_grad_norm: float | None = every["max_grad_norm"]
        self.grad_norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64)
        self.records_norms: bool = every["record_norms"]
        self._forget()
        super().__init__(params, KEYS_TORCH_ADDS | defaults | {"l1": every["l1"]})

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Return the rule's own columns of the table of groups."""
        raise NotImplementedError

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        """Apply the rule in plain PyTorch; `states`, None where there is none, change in place."""
        raise NotImplementedError

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the state that the rule has in `group`; of counted steps, "step" comes first."""
        return ("step", *self.states)

    def _initial(self, group: dict[str, Any]) -> float:
        """Return the initial value of a state."""
        return 0.0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("max_grad_norm", "grad_norm", "skipped", "records_norms", "_options")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def _forget(self) -> None:
        options = self._options
        self._storage = Storage(
            self.states, self.squares, options["master"], options["state_dtype"],
            options["ema_decay"] is not None, self.rows,
        )  # fmt: skip
        self._tensors = Tensors(self._op, self._storage, options["seed"])
        self._hyper_rows: list[tuple[float, ...]] = []
        self._hyper = torch.empty(0, dtype=torch.float64)
        self._sums: Tensor | None = None
        self._summed: Tables | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does, and check it."""
        if isinstance(param_group, dict):
            check_keys(self._op, param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        for p in group["params"]:
            self._check_param(p)
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(f"{self._op}: a parameter must appear once, got one twice; drop one")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the same rule, from this class or from its model in torch.optim.

        Moments are converted to `state_dtype`; state that options require but the saved state lacks
        starts fresh.

        Raises:
            ValueError: it was saved by another rule, with options that this class does not have,
                with another `master`, or for other shapes.
        """
        # torch.optim would cast the state to the dtype of the parameters. The hooks of others see
        # it before this one wraps it, and after __setstate__ has unwrapped it.
        handle = self.register_load_state_dict_pre_hook(self._before_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._op = type(self).__name__
        self._forget()
        for group in self.param_groups:
            for name in sorted((OPTIONAL_GROUP_KEYS | self.optional_keys) & self.defaults.keys()):
                group.setdefault(name, self.defaults[name])
            self._check_group(group)
            for p in filter(self.state.get, group["params"]):
                own = self.state[p]
                if any(isinstance(x, _AsSaved) for x in own.values()):
                    own = {k: getattr(x, "saved", x) for k, x in own.items()}
                    self.state[p] = self._adopted(p, group, own)

    def _adopted(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of `p` in the form that this optimizer keeps, from what was saved."""
        return self._storage.adopted(self._op, p, self._names(group), state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the loss of `closure`, if given.

        Raises:
            TypeError: a parameter or gradient "must be float32 or bfloat16".
            ValueError: tensors "must be dense", "must be on one device", "must hold their own
                memory", "must have the shape" of their parameter, or "must not share an address";
                distributed ones "must share one device mesh", or "must be sharded or
                replicated", gradients as their parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        names = list(map(self._names, self.param_groups))
        rates = list(map(self._rate_address, self.param_groups))
        found = self._tensors
        if found.collect(self.param_groups, names, rates, self._states, self._start):
            self.skipped = self.skipped.to(found.device)
            zero = self._options["zero_grads"]
            if uses_triton(found.items[0].p, self._op):
                with torch.cuda.device_of(found.items[0].p):
                    self._step_kernels(found)
                unread = found.copied_grads() if zero else []
            else:
                self._step_reference(found)
                unread = found.raw_grads() if zero else []
            for g in unread:
                g.zero_()
            # Whatever wrote them: PyTorch's own fused kernels for CPUs do not count it either.
            means = [item.ema for item in found.items if item.ema is not None]
            written = [*found.params, *means, *(found.grads if zero else [])]
            torch.autograd.graph.increment_version(written)
            found.release()
        return loss

    def norms(self) -> Norms | None:
        """Return the norms of gradients, updates and weights of the last step; None before it.

        Needs `record_norms`. While `records_norms` is False, steps do not change what this returns,
        which makes them cheaper on a CPU. The sums are computed in the step, without memory traffic
        of their own; this adds them up, in one launch, and over ranks for distributed parameters.
        """
        found = self._tensors
        if self._sums is None:
            return None
        squares_N = self._sums
        if self._summed is not None:
            with torch.cuda.device_of(squares_N):
                squares_N = launch_norms(self._summed, squares_N)
        if found.mesh is not None:
            replicas_N = torch.tensor([item.replicas for item in found.items])
            squares_N = squares_N / replicas_N[:, None].to(squares_N)
            sum_over_ranks(squares_N, found.mesh)
        return Norms(found.params, *squares_N.sqrt().unbind(1))

    def state_bytes(self, p: Tensor) -> int:
        """Return the bytes of the state that a parameter like `p`, meta or not, has in group 0."""
        group, state = self.param_groups[0], {}
        like = torch.empty_like(p, device="meta")
        self._storage.start(like, self._names(group), state, self._initial(group))
        return sum(x.nbytes for x in state.values())

    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(p, {})
        self._storage.start(p, self._names(group), state, self._initial(group))
        if state:
            self.state[p] = state

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """Return the state of every parameter."""
        return self.state

    def _rate_address(self, group: dict[str, Any]) -> int:
        """Return the address of the learning rate of `group`, or 0 if it is not on the device."""
        lr = group["lr"]
        if not isinstance(lr, Tensor) or not uses_triton(lr, self._op):
            return 0
        if lr.dtype != torch.float32:
            raise TypeError(
                f"{self._op}: lr on the device must be float32, got {lr.dtype}; convert it"
            )
        return lr.data_ptr()

    def _step_reference(self, found: Tensors) -> None:
        coef, sums = 1.0, self._sums_of(found, len(found.items))
        if self.max_grad_norm is not None:
            squares_N = squares_reference(found.grads)
            counts = [item.replicas for item in found.items]
            norm = self.grad_norm = norm_reference(squares_N, counts, found.mesh)
            if not norm.isfinite():
                self.skipped += 1
                if sums is not None:
                    sums[:, GRADS.value], sums[:, UPDATES.value] = squares_N, 0
                return
            coef = clip_coefficient_reference(norm, self.max_grad_norm).item()
        groups = [
            group | {name: float(x) for name, x in group.items() if isinstance(x, Tensor)}
            for group in self.param_groups
        ]
        terms = [self._terms(group, coef) for group in groups]
        taken = self._taken(found, groups, terms, coef, sums)
        for i, (item, g) in enumerate(zip(found.items, found.grads, strict=True)):
            if i in taken:
                continue
            t = 0.0 if item.step is None else item.step.add_(1).item()
            update_reference(
                item, g, partial(self._rule_reference, groups[item.group], t), terms[item.group],
                key_reference(found.key(item), int(t)) if item.draws else 0,
                None if sums is None else sums[i].zero_(),
            )  # fmt: skip

    def _taken(
        self, found: Tensors, groups: list[dict[str, Any]], terms: list[Terms], coef: float,
        sums: Tensor | None,
    ) -> set[int]:  # fmt: skip
        """Take the steps for which there is a faster way; return of which parameters."""
        fused = None if self._options["cautious_decay"] else self.fused
        return step_fused(fused, found, groups, coef, sums)

    def _terms(self, group: dict[str, Any], coef: float) -> Terms:
        decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
        return Terms(
            -coef if group["maximize"] else coef, 0.0 if decoupled else decay, group["l1"],
            group["lr"] * decay if decoupled else 0.0, 1 - (self._options["ema_decay"] or 0.0),
            self._options["cautious_decay"],
        )  # fmt: skip

    def _step_kernels(self, found: Tensors) -> None:
        options = self._options
        tables, formats = found.tables()
        partials_P, norm, sums = None, None, self._sums_of(found, len(tables.chunks))
        self._summed = self._summed if sums is None else tables
        if self.max_grad_norm is not None:
            partials_P = launch_partials(tables, sums, found.mesh)
            norm = self.grad_norm = partials_P.new_empty(())
        rows = list(map(self._table_row, self.param_groups))
        self._launch(
            found, tables, formats, self._hyper_table(rows, found.device), partials_P, norm, sums,
            StepFlags(
                l1=any(row[PENALTY1.value] for row in rows),
                l2=any(row[PENALTY2.value] for row in rows),
                zero=options["zero_grads"], ema_weight=1 - (options["ema_decay"] or 0.0),
                cautious=options["cautious_decay"],
            ),
        )  # fmt: skip

    def _launch(
        self, found: Tensors, tables: Tables, formats: list[Format], hyper: Tensor,
        partials_P: Tensor | None, norm: Tensor | None, sums: Tensor | None, flags: StepFlags,
    ) -> None:  # fmt: skip
        """Launch the update of all parameters."""
        launch_update(
            self.rule, tables, formats, hyper, partials_P, norm, self.skipped,
            self.max_grad_norm or 0.0, sums, flags,
        )  # fmt: skip

    def _sums_of(self, found: Tensors, count: int) -> Tensor | None:
        """Allocate the sums of squares `[count, 3]` if norms are recorded."""
        if not self.records_norms:
            return None
        if self._sums is None or len(self._sums) != count:
            shape = count, SUMS.value
            self._sums = torch.zeros(shape, dtype=torch.float32, device=found.device)
        return self._sums

    def _hyper_table(self, rows: list[tuple[float, ...]], device: torch.device) -> Tensor:
        if rows == self._hyper_rows and self._hyper.device == device:
            return self._hyper
        made = upload(torch.tensor(rows, dtype=torch.float64), device)
        if not is_capturing():
            self._hyper, self._hyper_rows = made, rows
        return made

    def _table_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
        return (
            0.0 if self._rate_address(group) else float(group["lr"]),
            -1.0 if group["maximize"] else 1.0,
            0.0 if decoupled else decay,
            group["l1"],
            decay if decoupled else 0.0,
            *self._hyper_row(group),
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            wrong = lr.numel() != 1 or (lr.device.type == "cpu" and not lr >= 0)
        else:
            wrong = not (is_number(lr) and lr >= 0)
        if wrong:
            raise ValueError(
                f"{self._op}: lr must be at least 0, a float or a tensor of one element, got {lr!r}"
            )
        check_flags(self._op, group)
        self._check_not_negative(group, ("weight_decay", "l1"))

    def _check_not_negative(self, group: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            if not (is_number(group[name]) and group[name] >= 0):
                raise ValueError(f"{self._op}: {name} must be at least 0, got {group[name]!r}")

    def _check_betas(self, group: dict[str, Any]) -> None:
        check_betas(self._op, group["betas"])

    def _check_param(self, p: Tensor) -> None:
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"{self._op}: parameters must be float32 or bfloat16, got {p.dtype}; convert the "
                "model with .float() or .bfloat16(), and compute in float16 under torch.autocast"
            )
        if self._options["state_dtype"] == torch.uint8 and hasattr(p, "to_local"):
            raise TypeError(
                f"{self._op}: state_dtype must be float32 or bfloat16 for distributed tensors, got "
                "torch.uint8, whose scales could not be resharded"
            )
        check_memory(self._op, local(p), local(p).device)

    def _before_load(self, _optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
        for group in saved["param_groups"]:
            optional = OPTIONAL_GROUP_KEYS | self.optional_keys
            if missing := self.defaults.keys() - optional - group.keys():
                raise ValueError(
                    f"{self._op}: groups must hold {sorted(missing)}, got {sorted(group)}; "
                    "load what the same rule saved"
                )
        state = {
            number: {name: _AsSaved(x) for name, x in own.items()}
            for number, own in saved["state"].items()
        }
        return saved | {"state": state}


KEYS_TORCH_ADDS = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}
"""Flags of torch.optim, where a class of torch's has them, by their defaults."""
OPTIONAL_GROUP_KEYS = {*KEYS_TORCH_ADDS, "capturable", "amsgrad", "l1", "decoupled_weight_decay"}
"""Keys of groups that a state may lack."""


@dataclass(frozen=True)
class _AsSaved:
    """Saved state in a wrapper that torch.optim does not recognize and hence leaves as it is."""

    saved: Any
