"""The optimizer of a run: its settings, its options and its parameter groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import signature
from typing import Annotated, Any, Literal

import torch
from torch import nn
from tyro.conf import arg

from tritium.kernels import SGD, Adagrad, Adam, AdamW, Lion, Muon, RMSprop
from tritium.kernels.optimizers import StepOptions
from tritium.training.tensor_parallel import packed

OPTIMIZERS = {
    "adamw": AdamW, "adam": Adam, "sgd": SGD, "rmsprop": RMSprop, "adagrad": Adagrad, "lion": Lion,
    "muon": Muon,
}  # fmt: skip
Optimizer = AdamW | Adam | SGD | RMSprop | Adagrad | Lion | Muon
BETAS = {"adamw": (0.9, 0.95), "adam": (0.9, 0.95), "lion": (0.9, 0.99), "muon": (0.9, 0.95)}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of the library. None leaves an option at the optimizer's default."""

    name: Annotated[
        Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "lion", "muon"],
        arg(name="optimizer"),
    ] = "adamw"
    """Update rule. muon: of the matrices in the blocks; AdamW's of the rest."""
    muon_learning_rate: float | None = None
    """Peak learning rate of the matrices (muon). None: learning-rate, also that of the rest."""
    weight_decay: float = 0.1
    """Weight decay of the matrices: decoupled for adamw, lion and muon, added to the gradient by
    the others."""
    cautious_decay: bool | None = None
    """Decay only elements that the step does not push away from 0 (adamw, lion, muon)."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down to it."""
    beta1: float | None = None
    """Decay rate of the first moment (adamw, adam, lion, muon's AdamW). None: 0.9."""
    beta2: float | None = None
    """Decay rate of the second moment (adamw, adam, muon's AdamW; None: 0.95), or of the momentum
    (lion; None: 0.99)."""
    eps: float | None = None
    """Term added to the denominator (adamw, adam, rmsprop, adagrad, muon's AdamW)."""
    momentum: float | None = None
    """Decay rate of the running sum of gradients (sgd) or of updates (rmsprop), or of the mean of
    gradients (muon; None: 0.95)."""
    dampening: float | None = None
    """Fraction of the gradient withheld from the momentum buffer (sgd)."""
    nesterov: bool | None = None
    """Use Nesterov momentum (sgd, muon)."""
    ns_coefficients: Literal["polar_express", "quintic"] | None = None
    """Coefficients of the Newton-Schulz iteration (muon). None: polar_express."""
    ns_steps: int | None = None
    """Steps of the Newton-Schulz iteration (muon). None: 5."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] | None = None
    """Scale of a step by the shape of the matrix (muon). None: match_rms_adamw, with which a
    learning rate means what it means to AdamW."""
    row_beta2: float | None = None
    """Decay rate of the second moment of rows (muon). None: rows are not normalized."""
    alpha: float | None = None
    """Decay rate of the moments (rmsprop)."""
    centered: bool | None = None
    """Divide by the standard deviation of gradients instead of their root mean square (rmsprop)."""
    lr_decay: float | None = None
    """Decay of the learning rate with the count of steps (adagrad)."""
    initial_accumulator_value: float | None = None
    """Initial value of the sum of squares (adagrad)."""
    master_weights: Literal["float32", "split", "stochastic"] | None = None
    """Master copy of bfloat16 weights (--precision bfloat16-true). float32; split: the other 16
    bits, for the same arithmetic in two bytes less; stochastic: none, stochastic rounding. None:
    float32."""
    state_dtype: Literal["float32", "bfloat16", "uint8"] | None = None
    """Dtype of the moments: bfloat16 (stochastic rounding) or uint8 (8 bits, one scale per 128).
    None: float32."""

    def check(self) -> None:
        """Raise ValueError unless the optimizer accepts these options."""
        self.make_of([{"params": [nn.Parameter(torch.zeros(1, 1))]}])

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the optimizer's class.

        Raises:
            ValueError: an option is set that the optimizer "has no".
        """
        accepted = {*signature(OPTIMIZERS[self.name]).parameters, *StepOptions.__annotations__}
        given = {
            field.name: value
            for field in fields(self)[1:]
            if (value := getattr(self, field.name)) is not None
        }
        if self.name in BETAS:
            own = BETAS[self.name]
            given["betas"] = (given.pop("beta1", own[0]), given.pop("beta2", own[1]))
        if self.name == "muon":
            given = self._muon_options(given)
        if "master_weights" in given:
            kept = given.pop("master_weights")
            given["master"] = None if kept == "stochastic" else kept
        if "state_dtype" in given:
            given["state_dtype"] = getattr(torch, given["state_dtype"])
        for name in given:
            if name not in accepted:
                raise ValueError(
                    f"{self.name} has no {name}; leave it out, or choose another --optimizer"
                )
        return given

    @staticmethod
    def _muon_options(given: dict[str, Any]) -> dict[str, Any]:
        """Return the options of `Muon`, whose names for some differ, and which has other rates."""
        renamed = {"eps": "adamw_eps", "row_beta2": "beta2"}
        usual = {"ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw"}
        return usual | {
            renamed.get(name, name): x for name, x in given.items() if name != "muon_learning_rate"
        }

    def groups(self, model: nn.Module, learning_rate: float = 1.0) -> list[dict]:
        """Return the parameter groups of the rule; `learning_rate` is that of a run."""
        if self.name != "muon":
            return parameter_groups(model, self.weight_decay)
        ratio = (self.muon_learning_rate or learning_rate) / learning_rate
        return muon_groups(model, self.weight_decay, ratio)

    def make(
        self, model: nn.Module, *, learning_rate: float = 1.0, record_norms: bool = False
    ) -> Optimizer:
        """Make the optimizer of a model's trainable parameters, in the groups of the rule.

        Args:
            model: the model.
            learning_rate: peak of the schedule; muon's own is a multiple of it.
            record_norms: whether `norms()` returns the norms of each step.
        """
        return self.make_of(self.groups(model, learning_rate), record_norms=record_norms)

    def state_bytes(self, model: nn.Module) -> int:
        """Return the bytes of the states of a model, whose parameters may be fake tensors."""
        total = 0
        for group in self.groups(model):
            # Rules ask for the rows of a matrix, and for nothing else of it.
            empty = nn.Parameter(torch.zeros(len(group["params"][0]), 0))
            optimizer = self.make_of([group | {"params": [empty]}])
            total += sum(map(optimizer.state_bytes, group["params"]))
        return total

    def make_of(self, groups: list[dict], *, record_norms: bool = False) -> Optimizer:
        """Make the optimizer of parameter groups."""
        return OPTIMIZERS[self.name](groups, **self.options(), record_norms=record_norms)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr`, times the group's `lr_scale` if it has one.

    On a GPU it is rounded to float32, so that a CUDA graph, which reads it from a tensor, takes the
    same step as without one.
    """
    for group in optimizer.param_groups:
        own = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = (
                torch.tensor(own, dtype=torch.float32).item() if group["params"][0].is_cuda else own
            )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters for an optimizer: matrices decay; norms, biases and embeddings do not.

    Args:
        model: the model; parameters that are frozen are left out.
        weight_decay: decay of the matrices per step, in the optimizer's units.

    Returns:
        Groups in `torch.optim`'s form with a `name`, each parameter in exactly one of them. A
        weight that is embedding and output layer at once is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = {"matrices": [], "embeddings": [], "norms and biases": []}
    for p in model.parameters():
        if p.requires_grad:
            kind = "matrices" if p.dim() >= 2 else "norms and biases"
            named["embeddings" if id(p) in embeddings else kind].append(p)
    return [
        {"name": name, "params": ps, "weight_decay": weight_decay if name == "matrices" else 0.0}
        for name, ps in named.items()
        if ps
    ]


def muon_groups(model: nn.Module, weight_decay: float, ratio: float) -> list[dict]:
    """Split the parameters for Muon: matrices of the blocks, and the rest for AdamW.

    Args:
        model: the model, whose blocks are `model.blocks`; parameters that are frozen are left out.
        weight_decay: decay of the matrices per step, in units of their learning rate.
        ratio: learning rate of the blocks' matrices, in units of that of the rest.

    Returns:
        Groups as `parameter_groups` returns them, those of Muon first: one for the matrices, and
        one for each way in which projections are stacked in one (`splits`), shard by shard where
        tensor parallelism splits them. The output layer is no hidden matrix: its rows are tokens,
        of unlike frequency, and AdamW follows each.
    """
    blocks = [block for block in model.children() if isinstance(block, nn.ModuleList)]
    splits = {
        id(m.weight): getattr(m, "splits", None)
        for stack in blocks for m in stack.modules() if isinstance(m, nn.Linear)
    }  # fmt: skip
    hidden: dict[tuple[int, ...] | None, list[nn.Parameter]] = {}
    rest = []
    for group in parameter_groups(model, weight_decay):
        others = []
        for p in group["params"]:
            if id(p) in splits and p.dim() == 2:
                hidden.setdefault(splits[id(p)], []).append(p)
            else:
                others.append(p)
        if others:
            rest.append(group | {"params": others, "use_muon": False})
    by_shard = bool(packed(model))
    named = [
        {
            "name": "hidden matrices" if rows is None else f"hidden, {len(rows)} in each",
            "params": ps, "weight_decay": weight_decay, "splits": rows, "lr_scale": ratio,
            "splits_by_shard": by_shard and rows is not None,
        }
        for rows, ps in sorted(hidden.items(), key=lambda each: each[0] or ())
    ]  # fmt: skip
    return named + rest
