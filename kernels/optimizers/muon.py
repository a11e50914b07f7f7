"""Muon for hidden matrices, and AdamW for all other parameters, in one optimizer.

For gradient g of a matrix, in which clipping is already:

    m := m + (1 - momentum) · (g - m)
    u  = g + momentum · (m - g)  with Nesterov's momentum, else m
    o  = orthogonalized u                            _orthogonalize.py
    p := p - lr · decay · p - lr · scale · o

so that a step is as long in every direction of the matrix. `scale` depends on its shape [R, C]:

    "original"          sqrt(max(1, R / C))          Jordan 2024: as long a step for every shape
    "match_rms_adamw"   0.2 · sqrt(max(R, C))        Liu et al. 2025: elements move as AdamW's do

NorMuon (Li et al. 2025) divides every row of o by the root of its second moment

    v := v + (1 - beta2) · (mean of o² over the row - v)

and keeps the norm of the matrix. A parameter may be a stack of matrices, such as a projection to
queries, keys and values in one product: each is orthogonalized alone. Together they would have to
share the directions of their common columns, although they do different work.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
https://kellerjordan.github.io/posts/muon/
Liu et al., "Muon is Scalable for LLM Training", 2025. https://arxiv.org/abs/2502.16982
Li et al., "NorMuon: Making Muon more efficient and scalable", 2025.
https://arxiv.org/abs/2510.05491
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.optimizers import _pointer_table
from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._dtensor import local
from tritium.kernels.optimizers._exchange import Exchange
from tritium.kernels.optimizers._matrices import (
    Recipe,
    check_matrices,
    step_matrices_reference,
)
from tritium.kernels.optimizers._muon_launch import (
    Plan,
    launch_momentum,
    launch_orthogonalization,
    make_plan,
)
from tritium.kernels.optimizers._options import StepOptions, is_number
from tritium.kernels.optimizers._orthogonalize import QUINTIC, Triple, triples
from tritium.kernels.optimizers._pointer_table import (
    DTYPE,
    DTYPES,
    FIRST,
    FORMAT_COLUMN,
    GRAD,
    Tables,
    is_capturing,
)
from tritium.kernels.optimizers._pointer_table import tables as pointer_tables
from tritium.kernels.optimizers._rounding import ABSENT
from tritium.kernels.optimizers._state import Item
from tritium.kernels.optimizers._step_inputs import REMEMBERED, Tensors
from tritium.kernels.optimizers._step_kernels import (
    GRADS,
    HYPER,
    STATE,
    Rule,
    StepFlags,
    launch_elements,
    launch_prepare,
)
from tritium.kernels.optimizers._step_reference import Move, Terms
from tritium.kernels.optimizers._step_torch import step_fused
from tritium.kernels.optimizers._storage import Format, has_state
from tritium.kernels.optimizers.adam import Adam, adam_reference, adam_row
from tritium.kernels.optimizers.grad_norm import launch_partials

# Columns of the table of parameter groups behind Adam's.
ONE_MINUS_MOMENTUM = tl.constexpr(HYPER.value + 6)
BEHIND = tl.constexpr(HYPER.value + 7)

SCALES = {
    "original": lambda rows, columns: sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


_adam_prepare, _adam_update = Adam.rule.prepare, Adam.rule.update


@triton.jit
def _muon_prepare(lr_N, hyper_ptr_N, t_N):
    weight_N = tl.load(hyper_ptr_N + ONE_MINUS_MOMENTUM)
    own = lr_N, weight_N, tl.load(hyper_ptr_N + BEHIND)
    return _adam_prepare(lr_N, hyper_ptr_N, t_N) + own


@triton.jit
def _muon_update(g, state, coefs, FORMAT: tl.constexpr):
    # In the order of `Muon.states`: Adam's are absent from a matrix, whose g is orthogonalized.
    if has_state(FORMAT, 1):
        u, moments = _adam_update(g, (state[1], state[2], 0.0), coefs[:6], ADAM)
        state = (state[0], moments[0], moments[1])
    else:
        u = coefs[6] * g
    return u, state


ADAM = tl.constexpr(int(Format(False, 0, False, (0, 0, ABSENT.value))))  # without amsgrad


class Muon(MultiTensorOptimizer):
    """Update hidden matrices by Muon and all other parameters by AdamW.

    Arguments, groups and state of the matrices are those of `torch.optim.Muon`, and each loads the
    other's `state_dict`; a group with `use_muon=False` is updated by AdamW and has its arguments.
    What `AdamW` says of clipping, skipped steps and storage applies here too. Embeddings and the
    output layer belong in a group of AdamW's, although they are matrices.

        Muon([
            {"params": matrices},
            {"params": qkv, "splits": (768, 256, 256)},
            {"params": others, "use_muon": False, "lr": 3e-4, "weight_decay": 0.0},
        ], lr=0.02)

    Args:
        params: parameters or groups, as for `AdamW`. Those of Muon's are contiguous matrices
            `[R, C]`. Of distributed ones each rank updates its shard, and each matrix is
            orthogonalized by one rank, its owner: two all-to-alls for all of them. They are
            sharded by rows, columns or both, each along one dimension of the mesh.
        lr: step size; a float, or a tensor of one element, which may change on the device.
        weight_decay: decay of a parameter per step, in units of `lr`.
        momentum: decay rate of the mean of gradients, in [0, 1).
        nesterov: use Nesterov momentum.
        ns_coefficients: "polar_express" or "quintic" (the default); or three numbers, or a sequence
            of three for every step, the last of which serve all further steps.
        eps: least norm that a matrix is divided by before it is orthogonalized.
        ns_steps: steps of the Newton-Schulz iteration.
        adjust_lr_fn: scale of a step by shape, "match_rms_adamw" or "original". None: "original".
        use_muon: False in groups of AdamW.
        splits: numbers of rows of the matrices that are stacked in each parameter of the group.
            None: it is one matrix.
        splits_by_shard: whether a parameter whose rows are sharded has, shard by shard, a part of
            each matrix, as tensor parallelism splits projections that are packed in one; else they
            are stacked in the parameter as a whole.
        beta2: decay rate of the second moment of rows (NorMuon), in [0, 1). None: rows are not
            normalized.
        betas: decay rates of the two moments of AdamW, in [0, 1).
        adamw_eps: added to the root of the second moment of AdamW.

    Attributes:
        grad_norm, skipped: as in `AdamW`.

    Raises:
        TypeError, ValueError: as `AdamW`; parameters of Muon "must be contiguous matrices", splits
            "must add up to the rows", a hyper-parameter "must be" otherwise.
    """

    rule = Rule(_muon_prepare, _muon_update, coefs=9)
    states = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    squares = ("exp_avg_sq",)
    rows = ("row_second_moment",)
    optional_keys = frozenset(
        {"use_muon", "splits", "splits_by_shard", "beta2", "betas", "adamw_eps"}
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Literal["polar_express", "quintic"] | Triple | Sequence[Triple] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        *,
        use_muon: bool = True,
        splits: Sequence[int] | None = None,
        splits_by_shard: bool = False,
        beta2: float | None = None,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "use_muon": use_muon, "splits": splits,
            "splits_by_shard": splits_by_shard, "beta2": beta2, "betas": betas,
            "adamw_eps": adamw_eps, "amsgrad": False, "maximize": maximize, "foreach": foreach,
            "capturable": capturable, "differentiable": differentiable, "fused": fused,
            "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(params, defaults, options)

    def _forget(self) -> None:
        super()._forget()
        self._plan: tuple[list[Item], dict[int, Recipe], Plan] | None = None
        self._seen: dict[int, tuple[Any, tuple[Tables, list[Format]]]] = {}
        self._shared: tuple[list[Item], dict[int, Recipe], Exchange] | None = None

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        if not group["use_muon"]:
            return "step", "exp_avg", "exp_avg_sq"
        return ("momentum_buffer", *(self.rows if group["beta2"] is not None else ()))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_betas(group)
        self._check_not_negative(group, ("eps", "adamw_eps"))
        steps = group["ns_steps"]
        if not (is_number(steps) and steps >= 1 and steps % 1 == 0):
            raise ValueError(f"Muon: ns_steps must be at least 1, got {steps!r}")
        for name in ("momentum", "beta2"):
            x = group[name]
            if x is not None and not (is_number(x) and 0 <= x < 1):
                raise ValueError(f"Muon: {name} must be in [0, 1), got {x!r}")
        if group["adjust_lr_fn"] not in (None, *SCALES):
            raise ValueError(
                f"Muon: adjust_lr_fn must be one of {[*SCALES]}, or None for the first, got "
                f"{group['adjust_lr_fn']!r}"
            )
        triples(group["ns_coefficients"], group["ns_steps"])
        if group["use_muon"]:
            check_matrices(group)

    def _before_load(self, optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
        # torch.optim's Muon has no such options: those of the groups here stay as they are.
        both = zip(saved["param_groups"], self.param_groups, strict=False)
        groups = [{name: own[name] for name in self.optional_keys} | group for group, own in both]
        if len(saved["param_groups"]) == len(self.param_groups):  # else torch says what is wrong
            saved = saved | {"param_groups": groups}
        return super()._before_load(optimizer, saved)

    def _rule_reference(
        self, group: dict[str, Any], t: float, g: Tensor, states: list[Any]
    ) -> Move:
        betas, (_, m, v) = (float(group["betas"][0]), float(group["betas"][1])), states
        return adam_reference(g, m, v, None, t, lr=group["lr"], betas=betas, eps=group["adamw_eps"])

    def _taken(
        self, found: Tensors, groups: list[dict[str, Any]], terms: list[Terms], coef: float,
        sums: Tensor | None,
    ) -> set[int]:  # fmt: skip
        recipes = self._recipes(found)
        moments = self._moments(found, recipes)
        exchange = self._exchange(found, recipes)
        step_matrices_reference(found, recipes, groups, terms, moments, exchange, sums)
        fused = None if self._options["cautious_decay"] else Adam.fused
        groups = [group | {"eps": group["adamw_eps"]} for group in groups]
        return {*recipes} | step_fused(fused, found, groups, coef, sums, frozenset(recipes))

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        behind = 1 - group["momentum"] if group["nesterov"] else 0.0
        return (*adam_row(group["betas"], group["adamw_eps"]), 1 - group["momentum"], behind)

    def _launch(
        self, found: Tensors, tables: Tables, formats: list[Format], hyper: Tensor,
        partials_P: Tensor | None, norm: Tensor | None, sums: Tensor | None, flags: StepFlags,
    ) -> None:  # fmt: skip
        coefs = launch_prepare(
            self.rule, tables, hyper, partials_P, norm, self.skipped, self.max_grad_norm or 0.0
        )
        if sums is not None and norm is None:
            launch_partials(tables, sums)
        plan = self._planned(found)
        if plan is None:
            launch_elements(self.rule, tables, formats, coefs, norm, sums, flags)
            return
        squares_K = None if sums is None else sums[:, GRADS.value].clone()
        launch_momentum(plan, tables, formats, coefs, norm, len(self.states), flags.zero)
        launch_orthogonalization(plan, coefs, norm)
        self._finish(found, plan, coefs, norm, sums, flags)
        if sums is not None:  # the last launch saw other gradients
            sums[:, GRADS.value] = squares_K

    def _planned(self, found: Tensors) -> Plan | None:
        """Return the layout of the matrices in a step, or None if there are none."""
        recipes = self._recipes(found)
        if not recipes:
            return None
        known = self._plan
        if known is None or known[0] is not found.items or known[1] != recipes:
            ps, moments = [item.p for item in found.items], self._moments(found, recipes)
            exchange = self._made_exchange(found, recipes, torch.bfloat16)
            plan = make_plan(ps, recipes, moments, exchange)
            known = self._plan = found.items, recipes, plan
            self._seen.clear()
        return known[2]

    def _finish(
        self, found: Tensors, plan: Plan, coefs: Tensor, norm: Tensor | None, sums: Tensor | None,
        flags: StepFlags,
    ) -> None:  # fmt: skip
        """Launch the last update: matrices are moved by what was made of their gradients."""
        known = found.tables()
        _, made = self._seen.get(id(known), (None, None))
        if made is None:
            made = _result_tables(found, plan)
            if not is_capturing():
                if len(self._seen) == REMEMBERED:
                    self._seen.clear()
                self._seen[id(known)] = known, made
        launch_elements(self.rule, *made, coefs, norm, sums, flags)

    def _moments(self, found: Tensors, recipes: dict[int, Recipe]) -> dict[int, Tensor]:
        """Return the second moments of rows of the matrices that have them, by index."""
        return {
            i: local(self.state[found.params[i]][self.rows[0]])
            for i, recipe in recipes.items()
            if recipe.beta2 is not None
        }

    def _exchange(self, found: Tensors, recipes: dict[int, Recipe]) -> Exchange | None:
        """Return the way to whole matrices in float32, None where none is sharded."""
        known = self._shared
        if known is None or known[0] is not found.items or known[1] != recipes:
            made = self._made_exchange(found, recipes, torch.float32)
            if made is None:
                return None
            made.connect({i: torch.empty(x, device=found.device) for i, x in made.owned.items()})
            known = self._shared = found.items, recipes, made
        return known[2]

    def _made_exchange(
        self, found: Tensors, recipes: dict[int, Recipe], dtype: torch.dtype
    ) -> Exchange | None:
        if found.mesh is None:
            return None
        moments = self._moments(found, recipes)
        matrices = {
            i: recipe.shared(found.params[i], moments.get(i)) for i, recipe in recipes.items()
        }
        return Exchange(self._op, matrices, dtype, found.device)

    def _recipes(self, found: Tensors) -> dict[int, Recipe]:
        """Return how the matrices among the parameters of a step are orthogonalized, by index."""
        by_group = {
            index: Recipe(
                None if group["splits"] is None else tuple(group["splits"]),
                triples(group["ns_coefficients"], group["ns_steps"]), group["eps"],
                SCALES[group["adjust_lr_fn"] or "original"], group["beta2"],
                group["splits_by_shard"],
            )
            for index, group in enumerate(self.param_groups)
            if group["use_muon"]
        }  # fmt: skip
        if len({len(recipe.coefficients) for recipe in by_group.values()}) > 1:
            raise ValueError("Muon: ns_steps must be the same in all groups; give it to Muon(...)")
        return {
            i: by_group[item.group] for i, item in enumerate(found.items) if item.group in by_group
        }


def _result_tables(found: Tensors, plan: Plan) -> tuple[Tables, list[Format]]:
    """Return the tables of the last update, whose gradients of matrices are orthogonalized."""
    rows, formats = found.rows(), list(map(Item.format, found.items, found.grads))
    for i in plan.starts:
        own = found.items[i]
        formats[i] = Format(True, own.param, own.ema is not None, (ABSENT.value,) * len(own.kinds))
        row = [*rows[i]]
        row[DTYPE.value], row[FORMAT_COLUMN.value] = DTYPES[torch.bfloat16], int(formats[i])
        # Addresses begin where the host's columns end, with the gradient's.
        first = FIRST.value + STATE.value - GRAD.value
        row[FIRST.value], row[first:] = plan.result(i), [0] * (len(row) - first)
        rows[i] = tuple(row)
    by_code = {int(x): x for x in formats}
    made = pointer_tables(tuple(rows), _pointer_table.CHUNK, found.device)
    return made, [by_code[code] for code in sorted(by_code)]
