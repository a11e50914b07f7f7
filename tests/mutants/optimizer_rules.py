"""Faults of the update rules, of what they share, and of the state that they save."""

from functools import partial

from tests.mutants import Mutant

_adam = partial(Mutant, file="kernels/optimizers/adam.py")
_sgd = partial(Mutant, file="kernels/optimizers/sgd.py")
_rmsprop = partial(Mutant, file="kernels/optimizers/rmsprop.py")
_adagrad = partial(Mutant, file="kernels/optimizers/adagrad.py")
_lion = partial(Mutant, file="kernels/optimizers/lion.py")
_update = partial(Mutant, file="kernels/optimizers/_step_kernels.py")
_reference = partial(Mutant, file="kernels/optimizers/_step_reference.py")
_states = partial(Mutant, file="kernels/optimizers/_state.py")
_optimizer = partial(Mutant, file="kernels/optimizers/_base.py")

MUTANTS = [
    _update(
        what="Adam without decay",
        original="        g += coefs[1] * p\n",
        replacement="        g += 0 * p\n",
    ),
    _adam(
        what="the largest second moment not used",
        original="        square = largest\n",
        replacement="        pass\n",
    ),
    _sgd(
        what="the first gradient dampened",
        original="tl.where(t_N > 1, 1 - tl.load",
        replacement="tl.where(t_N > 0, 1 - tl.load",
    ),
    _sgd(
        what="Nesterov's momentum without the gradient",
        original="g = nesterov * g + ahead * b",
        replacement="g = ahead * b",
    ),
    _sgd(
        what="plain momentum taken one step ahead",
        original="tl.where(nesterov_N != 0, momentum_N, 1.0)",
        replacement="momentum_N",
    ),
    _reference(
        what="decay in the reference only half",
        original="g_part.add(p, alpha=l2)",
        replacement="g_part.add(p, alpha=l2 / 2)",
    ),
    _sgd(
        what="momentum that no step reached saved",
        original="(count is not None and not count)",
        replacement="False",
    ),
    _sgd(
        what="a loaded momentum begun anew",
        original='{"step": 1.0} | state',
        replacement='{"step": 0.0} | state',
    ),
    _sgd(
        what="momentum kept where none is wanted",
        original='if not group["momentum"]:',
        replacement='if group["momentum"] < 0:',
    ),
    _rmsprop(
        what="eps under the root",
        original="divide(g, tl.sqrt(variance) + eps)",
        replacement="divide(g, tl.sqrt(variance + eps))",
    ),
    _rmsprop(
        what="variance not centered",
        original="variance = v - a * a\n",
        replacement="variance = v\n",
    ),
    _rmsprop(
        what="variance below zero",
        original="        variance = tl.where(variance < 0, 0.0, variance)\n",
        replacement="",
    ),
    _rmsprop(
        what="momentum without a past",
        original="b = momentum * b + u",
        replacement="b = u",
    ),
    _rmsprop(
        what="momentum kept of the gradient",
        original="b = momentum * b + u",
        replacement="b = momentum * b + g",
    ),
    _adagrad(
        what="step size falls from the first step",
        original="(1 + (t_N - 1) * tl.load(",
        replacement="(1 + t_N * tl.load(",
    ),
    _adagrad(
        what="sum that forgets",
        original="s = state[0] + g * g",
        replacement="s = 0.99 * state[0] + g * g",
    ),
    _adagrad(
        what="sum begun at zero",
        original='return group["initial_accumulator_value"]',
        replacement="return 0.0",
    ),
    _adagrad(
        what="no state before the first step",
        original="            self._start(p, group)",
        replacement="            pass",
    ),
    _lion(
        what="the decay rates swapped",
        original="return 1 - beta1, 1 - beta2",
        replacement="return 1 - beta2, 1 - beta1",
    ),
    _lion(
        what="zero counts as a negative sign",
        original="tl.where(u < 0, -lr, 0.0)",
        replacement="-lr",
    ),
    _lion(
        what="decay inside the gradient",
        original="decoupled_weight_decay: bool = True",
        replacement="decoupled_weight_decay: bool = False",
    ),
    _update(
        what="maximize ignored",
        original="tl.load(hyper_ptr_N + SIGN).to(tl.float32) * clip",
        replacement="clip + 0.0 * tl.load(hyper_ptr_N + SIGN).to(tl.float32)",
    ),
    _update(
        what="every tensor updated as those of the first kind",
        original="if code == FORMATS[i]:\n                g, u, w",
        replacement="if FORMATS[0] == FORMATS[i]:\n                g, u, w",
    ),
    _states(
        what="states that are not held taken for held",
        original="self.kind(name, p) if name in held else ABSENT.value for",
        replacement="self.kind(name, p) for",
    ),
    _states(
        what="the state of another rule accepted",
        original='if saved.keys() - {"step", *self.states, *scales, *names} or not',
        replacement="if not",
    ),
    _optimizer(
        what="a state without momentum not converted",
        original="{name: _AsSaved(x) for name, x in own.items()}",
        replacement="{name: x if x is None else _AsSaved(x) for name, x in own.items()}",
    ),
    _sgd(
        what="momentum saved that there is not",
        original=" is None or not self._names(group):",
        replacement=" is None:",
    ),
]
