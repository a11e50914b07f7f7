"""Faults of the update rules, of what they share, and of the state that they save."""

from functools import partial

from . import Mutant

_adam = partial(Mutant, file="kernels/adam.py")
_sgd = partial(Mutant, file="kernels/sgd.py")
_rmsprop = partial(Mutant, file="kernels/rmsprop.py")
_adagrad = partial(Mutant, file="kernels/adagrad.py")
_lion = partial(Mutant, file="kernels/lion.py")
_update = partial(Mutant, file="kernels/_update.py")
_optimizer = partial(Mutant, file="kernels/_optimizer.py")

MUTANTS = [
    _adam(
        what="Adam without decay",
        original="    g += coefs[0] * p\n",
        replacement="",
    ),
    _adam(
        what="a state of decoupled decay accepted",
        original='refused = ("amsgrad", "decoupled_weight_decay")',
        replacement='refused = ("amsgrad",)',
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
    _sgd(
        what="decay left out",
        original="    g += decay * p\n",
        replacement="",
    ),
    _sgd(
        what="momentum that no step reached saved",
        original='state.get("momentum_buffer") if state.get("step") else None',
        replacement='state.get("momentum_buffer")',
    ),
    _sgd(
        what="a loaded momentum begun anew",
        original='state.setdefault("step", 1.0)',
        replacement='state.setdefault("step", 0.0)',
    ),
    _sgd(
        what="momentum kept where none is wanted",
        original='if group["momentum"] else ()',
        replacement='if group["momentum"] >= 0 else ()',
    ),
    _rmsprop(
        what="eps under the root",
        original="(tl.sqrt(variance) + eps)",
        replacement="tl.sqrt(variance + eps)",
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
        original='return group["weight_decay"], 1 - beta1, 1 - beta2',
        replacement='return group["weight_decay"], 1 - beta2, 1 - beta1',
    ),
    _lion(
        what="zero counts as a negative sign",
        original="tl.where(u < 0, -lr, 0.0)",
        replacement="-lr",
    ),
    _lion(
        what="decay not in units of the learning rate",
        original="lr_N * tl.load(hyper_ptr_N + WEIGHT_DECAY)",
        replacement="tl.load(hyper_ptr_N + WEIGHT_DECAY)",
    ),
    _update(
        what="maximize ignored",
        original="tl.load(hyper_ptr_N + SIGN).to(tl.float32) * clip",
        replacement="clip + 0.0 * tl.load(hyper_ptr_N + SIGN).to(tl.float32)",
    ),
    _update(
        what="every kind of state updates the first chunks",
        original="tables.tensors, chunks, coefs, norm,",
        replacement="tables.tensors, tables.chunks, coefs, norm,",
    ),
    _optimizer(
        what="states that are not held taken for held",
        original="if name in names))",
        replacement="if name))",
    ),
    _optimizer(
        what="the state of another rule accepted",
        original="if others or not state.keys() >= {*names}:",
        replacement="if not state.keys() >= {*names}:",
    ),
]
