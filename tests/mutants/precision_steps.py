"""Faults of _step_kernels.py and its reference: formats, masks, streams, keys."""

from functools import partial

from tests.mutants import Mutant

_formats = partial(Mutant, file="kernels/optimizers/_storage.py")
_update = partial(Mutant, file="kernels/optimizers/_step_kernels.py")
_reference = partial(Mutant, file="kernels/optimizers/_step_reference.py")

MUTANTS = [
    _formats(
        what="a gradient in bfloat16 read as float32",
        original="    if FORMAT & 1:\n        g = load(address, offs, end, tl.bfloat16, FULL)",
        replacement="    if FORMAT & 2:\n        g = load(address, offs, end, tl.bfloat16, FULL)",
    ),
    _formats(
        what="the parameter not written beside its master",
        original="        store(extra, offs, p, end, tl.float32, FULL)\n"
        "        store(address, offs, p, end, tl.bfloat16, FULL)\n",
        replacement="        store(extra, offs, p, end, tl.float32, FULL)\n",
    ),
    _formats(
        what="the master not written",
        original="        store(extra, offs, p, end, tl.float32, FULL)\n"
        "        store(address, offs, p, end, tl.bfloat16, FULL)\n",
        replacement="        store(address, offs, p, end, tl.bfloat16, FULL)\n",
    ),
    _formats(
        what="the remainder not written",
        original="        store(extra, offs, low, end, tl.int16, FULL)\n",
        replacement="",
    ),
    _formats(
        what="parameters rounded to nearest",
        original="store(address, offs, to_bfloat16(p, random_bits(bits, 0)), end,",
        replacement="store(address, offs, p, end,",
    ),
    _formats(
        what="states rounded to nearest",
        original="store(address, offs, to_bfloat16(x, random_bits(bits, STREAM)), end,",
        replacement="store(address, offs, x, end,",
    ),
    _update(
        what="random bits that do not depend on the step",
        original="key_N = hash_bits(seed_N ^ hash_bits(t_N.to(tl.uint32)))",
        replacement="key_N = hash_bits(seed_N)",
    ),
    _update(
        what="random bits that do not depend on the parameter",
        original="key_N = hash_bits(seed_N ^ hash_bits(t_N.to(tl.uint32)))",
        replacement="key_N = hash_bits(hash_bits(t_N.to(tl.uint32)))",
    ),
    _update(
        what="random bits that start again in every block",
        original="bits = element_bits(offs, key)",
        replacement="bits = element_bits(offs - first, key)",
    ),
    _formats(
        what="memory after a tensor in the scale of its last block",
        original="            x = tl.where(offs < end, x, 0.0)\n",
        replacement="            x = x\n",
    ),
    _formats(
        what="scales of the first block for all",
        original="        scale_ptr_B = scales.to(tl.pointer_type(tl.float32)) + offs_B\n"
        "        scale_B = tl.load(",
        replacement="        scale_ptr_B = scales.to(tl.pointer_type(tl.float32)) + offs_B * 0\n"
        "        scale_B = tl.load(",
    ),
    _formats(
        what="scales not written",
        original="        tl.store(scale_ptr_B, scale_B, mask=offs_B * Q < end)\n",
        replacement="",
    ),
    _update(
        what="all states in the format of the first",
        original="addresses[4 + STATES + i], first, offs, end,\n"
        "                state_kind(FORMAT, i), N, FULL,",
        replacement="addresses[4 + STATES + i], first, offs, end,\n"
        "                state_kind(FORMAT, 0), N, FULL,",
    ),
    _reference(
        what="the parameter's bits for the states too, by reference",
        original="bits = random_bits_reference(bits, i + 1)",
        replacement="bits = random_bits_reference(bits, 0)",
    ),
    _reference(
        what="the same key in every step, by reference",
        original="hash_bits_reference(t % (1 << 32))",
        replacement="hash_bits_reference(1)",
    ),
]
