"""The optimizer of a run: its settings, its options and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from inspect import signature
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tyro.conf import arg

from tritium.kernels import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
from tritium.kernels.optimizers import StepOptions

OPTIMIZERS = {
    "adamw": AdamW, "adam": Adam, "sgd": SGD, "rmsprop": RMSprop, "adagrad": Adagrad, "lion": Lion,
}  # fmt: skip
Optimizer = AdamW | Adam | SGD | RMSprop | Adagrad | Lion
BETAS = {"adamw": (0.9, 0.95), "adam": (0.9, 0.95), "lion": (0.9, 0.99)}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of the library. None leaves an option at the optimizer's default."""

    name: Annotated[
        Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "lion"], arg(name="optimizer")
    ] = "adamw"
    """Update rule."""
    weight_decay: float = 0.1
    """Weight decay of the matrices: decoupled for adamw and lion, added to the gradient by the
    others."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down to it."""
    beta1: float | None = None
    """Decay rate of the first moment (adamw, adam, lion). None: 0.9."""
    beta2: float | None = None
    """Decay rate of the second moment (adamw, adam; None: 0.95), or of the momentum
    (lion; None: 0.99)."""
    eps: float | None = None
    """Term added to the denominator (adamw, adam, rmsprop, adagrad)."""
    momentum: float | None = None
    """Decay rate of the running sum of gradients (sgd) or of updates (rmsprop)."""
    dampening: float | None = None
    """Fraction of the gradient withheld from the momentum buffer (sgd)."""
    nesterov: bool | None = None
    """Use Nesterov momentum (sgd)."""
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
        self.options()
        # Defaults pass them, and the first optimizer of a process imports torch._dynamo, 1.1 s of
        # processor time.
        if any(getattr(self, field.name) != field.default for field in fields(self)):
            self.make_of([{"params": [nn.Parameter(torch.zeros(1))]}])

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

    def make(self, model: nn.Module, *, record_norms: bool = False) -> Optimizer:
        """Make the optimizer of a model's trainable parameters, in the groups of the rule.

        Args:
            model: the model.
            record_norms: whether `norms()` returns the norms of each step.
        """
        return self.make_of(parameter_groups(model, self.weight_decay), record_norms=record_norms)

    def state_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Return the bytes of the states of such parameters, which may be fake tensors."""
        optimizer = self.make_of([{"params": [nn.Parameter(torch.zeros(1))]}])
        return sum(map(optimizer.state_bytes, parameters))

    def make_of(self, groups: list[dict], *, record_norms: bool = False) -> Optimizer:
        """Make the optimizer of parameter groups."""
        return OPTIMIZERS[self.name](groups, **self.options(), record_norms=record_norms)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group.

    On a GPU it is rounded to float32, so that a CUDA graph, which reads it from a tensor, takes the
    same step as without one.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = (
                torch.tensor(lr, dtype=torch.float32).item() if group["params"][0].is_cuda else lr
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
