"""Faults of the options beyond torch.optim's: penalties, mean, zeroing, norms, learning rate."""

from functools import partial

from tests.mutants import Mutant

_formats = partial(Mutant, file="kernels/optimizers/_storage.py")
_update = partial(Mutant, file="kernels/optimizers/_step_kernels.py")
_reference = partial(Mutant, file="kernels/optimizers/_step_reference.py")
_optimizer = partial(Mutant, file="kernels/optimizers/_base.py")
_tensors = partial(Mutant, file="kernels/optimizers/_step_inputs.py")

MUTANTS = [
    _update(
        what="l1 at zero",
        original="tl.where(p > 0, l1,",
        replacement="tl.where(p >= 0, l1,",
    ),
    _update(
        what="l1 clipped with the gradient",
        original="tl.load(hyper_ptr_N + PENALTY1).to(tl.float32), mask",
        replacement="tl.load(hyper_ptr_N + PENALTY1).to(tl.float32) * scale_N, mask",
    ),
    _update(
        what="a mean that forgets as fast as it should keep",
        original="store(ema, offs, mean + ema_weight * (p - mean)",
        replacement="store(ema, offs, p + ema_weight * (mean - p)",
    ),
    _update(
        what="gradients not zeroed",
        original="    if ZERO:\n        store_grad(grad",
        replacement="    if False:\n        store_grad(grad",
    ),
    _update(
        what="gradients of a skipped step kept",
        original="        if ZERO:\n            address",
        replacement="        if False:\n            address",
    ),
    _update(
        what="the norm of the update without decay",
        original="u_squares += tl.where(inside, u * u, 0.0)",
        replacement="u_squares += tl.where(inside, (u - decay * p) * (u - decay * p), 0.0)",
    ),
    _update(
        what="the norm of the weight before the step",
        original="w_squares += tl.where(inside, p * p, 0.0)",
        replacement="w_squares += tl.where(inside, (p + u) * (p + u), 0.0)",
    ),
    _update(
        what="the last update's norm kept in a skipped step",
        original="            tl.store(sums_ptr + chunk * SUMS + UPDATES, 0.0)\n",
        replacement="            pass\n",
    ),
    _update(
        what="norms of the first chunk alone",
        original="count = tl.maximum((size + CHUNK - 1) // CHUNK, 1)",
        replacement="count = 1",
    ),
    _update(
        what="tails left out of the norms",
        original="g_sum, u_sum, w_sum = tl.sum(g), tl.sum(u), tl.sum(w)\n    g = ",
        replacement="pass\n    g = ",
    ),
    _update(
        what="gradients' norms stored in another column",
        original="if norm_ptr is None:\n                        tl.store(sums_ptr",
        replacement="if True:\n                        tl.store(sums_ptr + 1",
    ),
    _update(
        what="a learning rate on the device not read",
        original="lr_N = tl.where(rate_N != 0, lr_N, tl.load(hyper_ptr_N + RATE))",
        replacement="lr_N = tl.load(hyper_ptr_N + RATE) + 0 * lr_N",
    ),
    _update(
        what="random bits the same in every step",
        original="key_N = hash_bits(seed_N ^ hash_bits(t_N.to(tl.uint32)))",
        replacement="key_N = hash_bits(seed_N ^ hash_bits(0 * t_N.to(tl.uint32)))",
    ),
    _formats(
        what="bfloat16 gradients read as float32",
        original="    if FORMAT & 1:\n        g = load",
        replacement="    if FORMAT & 0:\n        g = load",
    ),
    _reference(
        what="l1 of the reference without the sign",
        original="g_part.add(p.sign(), alpha=l1)",
        replacement="g_part.add(p, alpha=l1)",
    ),
    _reference(
        what="the mean of the reference weighted the other way",
        original="lerp_(p, ema_weight)",
        replacement="lerp_(p, 1 - ema_weight)",
    ),
    _reference(
        what="the norm of the clipped gradient",
        original="(raw, before - p, p)",
        replacement="(g_part, before - p, p)",
    ),
    _optimizer(
        what="a moved learning rate not noticed",
        original="rates = list(map(self._rate_address, self.param_groups))",
        replacement="rates = [0 for _ in self.param_groups]",
    ),
    _optimizer(
        what="a learning rate of float64 accepted",
        original="if lr.dtype != torch.float32:",
        replacement="if not lr.dtype.is_floating_point:",
    ),
    Mutant(
        what="decoupled decay by default in Adam",
        file="kernels/optimizers/adam.py",
        original="decoupled_weight_decay: bool = False,",
        replacement="decoupled_weight_decay: bool = True,",
    ),
    _optimizer(
        what="zeroed gradients not counted as changed",
        original="*(found.grads if zero else [])]",
        replacement="]",
    ),
    _optimizer(
        what="gradients held on to",
        original="            found.release()\n",
        replacement="",
    ),
    _tensors(
        what="gradients that were copied not zeroed",
        original="return [g for g, read in pairs if local(g).data_ptr() != read.data_ptr()]",
        replacement="return []",
    ),
]
