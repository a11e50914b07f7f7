"""Faults of _base.py, _step_inputs.py and _state.py: tables out of date, state not kept."""

from functools import partial

from tests.mutants import Mutant

_optimizer = partial(Mutant, file="kernels/optimizers/_base.py")
_tensors = partial(Mutant, file="kernels/optimizers/_step_inputs.py")
_states = partial(Mutant, file="kernels/optimizers/_state.py")

MUTANTS = [
    _tensors(
        what="moved gradients not noticed",
        original="known = self._seen.get(key)",
        replacement="known = next(iter(self._seen.values()), None)",
    ),
    _tensors(
        what="moved parameters and moments not noticed",
        original="if (names, rates, counts, addresses) != self._last_inputs:",
        replacement="if (names, rates, counts) != self._last_inputs[:3]:",
    ),
    _tensors(
        what="parameters that joined not noticed",
        original="counts.append(len(ps))",
        replacement="counts.append(0)\n        ps = ps[: len(self.params) or None]\n"
        "        gs = gs[: len(ps)]",
    ),
    _tensors(
        what="moved moments not checked",
        original="                    self._check(self.items[-1])\n",
        replacement="",
    ),
    _tensors(
        what="gradients of another dtype not refused",
        original="if g.dtype not in (torch.float32, torch.bfloat16):",
        replacement="if not g.dtype.is_floating_point:",
    ),
    _tensors(
        what="one gradient of two parameters",
        original="chain(compress(key[0], held), *compress",
        replacement="chain((), *compress",
    ),
    _tensors(
        what="one address of two parameters",
        original="chain(compress(key[0], held), *compress(self._address_rows, held))",
        replacement="chain(compress(key[0], held))",
    ),
    _optimizer(
        what="changed options not uploaded",
        original="if rows == self._hyper_rows and",
        replacement="if self._hyper_rows and",
    ),
    _states(
        what="one step count for all parameters",
        original="step.to(p.device, torch.float32, copy=True)",
        replacement="step.to(p.device)",
    ),
    _optimizer(
        what="options lost in a copy",
        original="return super().__getstate__() | {name: getattr(self, name) for name in kept}",
        replacement="return super().__getstate__()",
    ),
    _optimizer(
        what="the device asked for the norm",
        original="            norm = self.grad_norm = partials_P.new_empty(())\n",
        replacement="            norm = self.grad_norm = partials_P.new_empty(())\n"
        "            partials_P.sum().item()\n",
    ),
]
