"""State of one parameter: its tensors, their storage, initial values and loading.

Each state of the rule is in `optimizer.state[p]` under its name in torch.optim, in the shape of the
parameter. In addition there may be:

    step        the count of steps, float32, 0-dim
    master      the parameter in float32, or
    remainder   what float32 adds to a bfloat16 parameter, in units of its own last bit, int16
    ema         the exponential moving average of the parameter, float32
    NAME_scale  the scales of a state NAME in 8 bits: one for every Q elements in order of memory
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritium.kernels.optimizers._dtensor import distributed_rows
from tritium.kernels.optimizers._pointer_table import flat, in_order_of
from tritium.kernels.optimizers._rounding import (
    ABSENT,
    BFLOAT16,
    FLOAT32,
    MASTER,
    SIGNED,
    SPLIT,
    STOCHASTIC,
    UNSIGNED,
    Q,
    decode_reference,
    encode_reference,
)
from tritium.kernels.optimizers._storage import Format

SMALL = 4096  # elements; states of smaller parameters, norms and biases mostly, stay float32
EXTRAS = {MASTER.value: "master", SPLIT.value: "remainder"}


class Item(NamedTuple):
    """One parameter and its state, as tensors that hold their own memory."""

    p: Tensor
    group: int
    """Index of its group."""
    number: int
    """Index among all parameters of the optimizer."""
    replicas: int
    """Number of ranks that have these elements."""
    shard: int
    """Number of the shard."""
    param: int
    """Storage of the parameter, as in `Format`; `kinds` likewise of the states."""
    kinds: tuple[int, ...]
    draws: bool
    """True if a step draws random bits."""
    step: Tensor | None
    extra: Any
    """The master, or the remainder, or None."""
    ema: Tensor | None
    states: tuple[Any, ...]
    """States in the order of the rule, None for an absent one."""
    scales: tuple[Any, ...]

    def format(self, g: Tensor) -> Format:
        """Return the format of this parameter with gradient `g`."""
        return Format(g.dtype == torch.bfloat16, self.param, self.ema is not None, self.kinds)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return its tensors in the order of the columns from PARAM."""
        return self.p, self.extra, self.ema, *self.states, *self.scales


@dataclass(frozen=True)
class Storage:
    """Storage options of one optimizer."""

    states: tuple[str, ...]
    """Names of the states that its rule may have."""
    squares: tuple[str, ...]
    """Names of states that are never negative."""
    master: str | None
    dtype: torch.dtype
    ema: bool
    rows: tuple[str, ...] = ()
    """Names of states that hold one float32 per row of a matrix, `[rows, 1]`."""

    def param(self, p: Tensor) -> int:
        """Return the storage of `p`: FLOAT32, MASTER, SPLIT or STOCHASTIC."""
        if p.dtype == torch.float32:
            return FLOAT32.value
        kinds = {"float32": MASTER, "split": SPLIT, None: STOCHASTIC}
        return kinds[self.master].value

    def kind(self, name: str, p: Tensor) -> int:
        """Return the storage of state `name` of `p`."""
        if self.dtype == torch.bfloat16:
            return BFLOAT16.value
        if self.dtype == torch.uint8 and p.numel() >= SMALL:
            return UNSIGNED.value if name in self.squares else SIGNED.value
        return FLOAT32.value

    def names(self, p: Tensor, held: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names in the state of `p`; `held` are the rule's, perhaps with "step"."""
        kinds = {name: self.kind(name, p) for name in held if name in self.states}
        scales = [f"{name}_scale" for name, kind in kinds.items() if kind in _EIGHT_BITS]
        extra = EXTRAS.get(self.param(p))
        counts = "step" in held or self.draws(p, held)
        return (
            *(["step"] if counts else []), *kinds, *scales,
            *[name for name in held if name in self.rows],
            *([extra] if extra else []), *(["ema"] if self.ema else []),
        )  # fmt: skip

    def draws(self, p: Tensor, held: tuple[str, ...]) -> bool:
        """Return whether a step of `p` draws random bits."""
        kinds = {self.kind(name, p) for name in held if name in self.states}
        return self.param(p) == STOCHASTIC.value or kinds != {FLOAT32.value} & kinds

    def start(
        self, p: Tensor, held: tuple[str, ...], state: dict[str, Any], initial: float
    ) -> None:
        """Add to `state` of `p` the tensors that it lacks."""
        names = self.names(p, held)
        if "step" in names and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in self.states:
            if name in names and name not in state:
                state[name], scale = _constant(p, initial, self.kind(name, p))
                if scale is not None:
                    state[f"{name}_scale"] = scale
        for name in self.rows:
            if name in names and name not in state:
                zeros = torch.zeros(len(p), 1, dtype=torch.float32, device=p.device)
                state[name] = distributed_rows(p, zeros)
        for name in ("master", "ema"):
            if name in names and name not in state:
                state[name] = p.detach().float().clone(memory_format=torch.preserve_format)
        if "remainder" in names and "remainder" not in state:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16)

    def adopted(
        self, op: str, p: Tensor, held: tuple[str, ...], saved: dict[str, Any]
    ) -> dict[str, Any]:
        """Convert a saved state of `p` to the storage of this optimizer.

        Raises:
            ValueError: it lacks a state of the rule, has one that the rule does not have, was
                saved with another `master`, for another shape, or without its scales.
        """
        names = self.names(p, held)
        if p.dtype == torch.float32 and (bits := sorted(saved.keys() & {*EXTRAS.values()})):
            raise ValueError(
                f"{op}: the state of a float32 parameter must hold no {bits[0]}, got that of a "
                "bfloat16 one; load it into such a one, or copy its master to the parameter and "
                "drop that from the state"
            )
        scales = {f"{name}_scale" for name in self.states}
        if saved.keys() - {"step", *self.states, *scales, *names} or not saved.keys() >= {*held}:
            raise ValueError(
                f"{op}: the state of a parameter must hold {sorted(held)} and what the options "
                f"add, got {sorted(saved)}; load what the same rule saved, with the same options"
            )
        state = {}
        if "step" in saved:
            # A copy: one tensor may serve all parameters, and every one is counted up.
            step = torch.as_tensor(saved["step"])
            state["step"] = step.to(p.device, torch.float32, copy=True)
        for name in [name for name in self.states if name in saved]:
            state |= self._adopted_state(op, p, name, saved[name], saved.get(f"{name}_scale"))
        for name in filter(saved.__contains__, self.rows):
            if saved[name].shape != (len(p), 1):
                raise ValueError(
                    f"{op}: {name} must have the shape {[len(p), 1]}, got "
                    f"{list(saved[name].shape)}; load what was saved for this parameter"
                )
            state[name] = distributed_rows(p, saved[name].to(p.device, torch.float32))
        kept = {"master": torch.float32, "ema": torch.float32, "remainder": torch.int16}
        for name in filter(saved.__contains__, kept):  # in one order on all ranks
            state[name] = in_order_of(op, p, saved[name].to(p.device, kept[name]))
        return state

    def _adopted_state(
        self, op: str, p: Tensor, name: str, x: Tensor, scale: Tensor | None
    ) -> dict[str, Tensor]:
        kind, x = self.kind(name, p), x.to(p.device)
        wanted = [-(-x.numel() // Q)] if x.dtype == torch.uint8 else None
        if wanted != (got := None if scale is None else list(scale.shape)):
            raise ValueError(
                f"{op}: {name}_scale must have the shape {wanted} where {name} is {x.dtype}, got "
                f"{got}; load both as they were saved"
            )
        if scale is not None:
            scale = scale.to(p.device)
            if kind in _EIGHT_BITS and x.shape == p.shape and x.stride() == p.stride():
                return {name: x, f"{name}_scale": scale}
            # In the order of memory in which it was saved: that is how scales belong to codes.
            saved = UNSIGNED if name in self.squares else SIGNED
            code, x = x, torch.empty_like(x, dtype=torch.float32)
            flat(x).copy_(decode_reference(flat(code), scale, saved.value))
        x = in_order_of(op, p, x)
        if kind not in _EIGHT_BITS:
            return {name: x.to(torch.bfloat16 if kind == BFLOAT16.value else torch.float32)}
        halves = torch.full((x.numel(),), 1 << 15, device=x.device)
        flat_code, scale = encode_reference(flat(x.float()), halves, kind)
        code = torch.empty_like(x, dtype=torch.uint8)
        flat(code).copy_(flat_code)
        return {name: code, f"{name}_scale": scale}

    def kinds(self, p: Tensor, held: tuple[str, ...]) -> tuple[int, ...]:
        """Return the storage of every possible state of the rule, ABSENT if `p` lacks it."""
        return tuple([self.kind(name, p) if name in held else ABSENT.value for name in self.states])


_EIGHT_BITS = (SIGNED.value, UNSIGNED.value)


def _constant(p: Tensor, value: float, kind: int) -> tuple[Tensor, Tensor | None]:
    """Return a state of `p` that holds `value`, and its scales if it has 8 bits."""
    if kind not in _EIGHT_BITS:
        dtype = torch.bfloat16 if kind == BFLOAT16.value else torch.float32
        return torch.full_like(p, value, dtype=dtype), None
    unit = 127**2 if kind == SIGNED.value else 255**4
    n_scales = -(-p.numel() // Q)
    scale = torch.full((n_scales,), value / unit, dtype=torch.float32, device=p.device)
    return torch.full_like(p, 255, dtype=torch.uint8), scale
