"""Faults of kernels/optimizers/_state.py: initial state, storage, loading."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/optimizers/_state.py")

MUTANTS = [
    _mutant(
        what="a remainder that begins half a unit off",
        original='state["remainder"] = torch.zeros_like(p, dtype=torch.int16)',
        replacement='state["remainder"] = torch.full_like(p, -0x8000, dtype=torch.int16)',
    ),
    _mutant(
        what="small states in 8 bits",
        original="if self.dtype == torch.uint8 and p.numel() >= SMALL:",
        replacement="if self.dtype == torch.uint8:",
    ),
    _mutant(
        what="means of squares in signed codes",
        original="return UNSIGNED.value if name in self.squares else SIGNED.value",
        replacement="return SIGNED.value",
    ),
    _mutant(
        what="steps not counted where only rounding needs them",
        original='counts = "step" in held or self.draws(p, held)',
        replacement='counts = "step" in held',
    ),
    _mutant(
        what="a state of another master taken",
        original='scales = {f"{name}_scale" for name in self.states}',
        replacement='scales = {f"{name}_scale" for name in self.states} | {*EXTRAS.values()}',
    ),
    _mutant(
        what="a master that is not loaded",
        original='kept = {"master": torch.float32, "ema": torch.float32, "remainder": torch.int16}',
        replacement='kept = {"ema": torch.float32, "remainder": torch.int16}',
    ),
    _mutant(
        what="a remainder that is not loaded",
        original='kept = {"master": torch.float32, "ema": torch.float32, "remainder": torch.int16}',
        replacement='kept = {"master": torch.float32, "ema": torch.float32}',
    ),
    _mutant(
        what="codes without their scales taken",
        original="if wanted != (got := None if scale is None else list(scale.shape)):",
        replacement="if wanted is None and (got := scale) is not None:",
    ),
    _mutant(
        what="codes in another order than their scales",
        original="if kind in _EIGHT_BITS and x.shape == p.shape and x.stride() == p.stride():",
        replacement="if kind in _EIGHT_BITS:",
    ),
    _mutant(
        what="codes decoded as of the other kind",
        original="saved = UNSIGNED if name in self.squares else SIGNED",
        replacement="saved = SIGNED if name in self.squares else UNSIGNED",
    ),
    _mutant(
        what="moments rounded down on loading",
        original="halves = torch.full((x.numel(),), 1 << 15, device=x.device)",
        replacement="halves = torch.full((x.numel(),), (1 << 16) - 1, device=x.device)",
    ),
    _mutant(
        what="moments of bfloat16 not converted to float32",
        original="return {name: x.to(torch.bfloat16 if kind == BFLOAT16.value else torch.float32)}",
        replacement="return {name: x}",
    ),
]
