"""Faults of kernels/optimizers/_rounding.py: hashing, rounding, splitting, codes."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/optimizers/_rounding.py")

MUTANTS = [
    _mutant(
        what="bits of an element not mixed a second time",
        original="^ key, 0x7FEB352D, sanitize_overflow=False)\n"
        "    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)\n",
        replacement="^ key, 0x7FEB352D, sanitize_overflow=False)\n",
    ),
    _mutant(
        what="the same streams for all states",
        original="return bits >> 16 if STREAM % 2 else bits & 0xFFFF",
        replacement="return bits & 0xFFFF",
    ),
    _mutant(
        what="neighbours with neighbouring bits, by reference",
        original="    x = (offs & 0xFFFFFFFF ^ key) * 0x7FEB352D & 0xFFFFFFFF\n"
        "    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF\n    return x ^ (x >> 16)",
        replacement="    return offs & 0xFFFFFFFF ^ key",
    ),
    _mutant(
        what="NaN that a carry makes a number",
        original="    raw = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000)"
        ".to(tl.uint32, bitcast=True)\n    high = tl.add(raw, bits,",
        replacement="    raw = x.to(tl.uint32, bitcast=True)\n    high = tl.add(raw, bits,",
    ),
    _mutant(
        what="NaN of a CPU that a carry makes a number",
        original="torch.where(x.isnan(), 0x7FFF0000, x.view(torch.int32))",
        replacement="x.view(torch.int32).clamp(max=0x7FFF0000)",
    ),
    _mutant(
        what="half a unit added before stochastic rounding, by reference",
        original="(_raw(x) + bits.int() & ~0xFFFF)",
        replacement="(_raw(x) + bits.int() // 2 + 0x4000 & ~0xFFFF)",
    ),
    _mutant(
        what="a split that truncates",
        original="high = tl.add(raw, 0x8000, sanitize_overflow=False) & 0xFFFF0000",
        replacement="high = raw & 0xFFFF0000",
    ),
    _mutant(
        what="a remainder without its sign, by reference",
        original="high.float().view(torch.int32) + low.int()",
        replacement="high.float().view(torch.int32) + (low.int() & 0xFFFF)",
    ),
    _mutant(
        what="a remainder without its sign",
        original="low = low.to(tl.int32).to(tl.uint32, bitcast=True)",
        replacement="low = low.to(tl.uint16, bitcast=True).to(tl.uint32)",
    ),
    _mutant(
        what="signed codes of the wrong middle",
        original="        c -= 128\n",
        replacement="        c -= 127\n",
    ),
    _mutant(
        what="a signed code without its sign",
        original="scale * (c * tl.abs(c))",
        replacement="scale * (c * c)",
    ),
    _mutant(
        what="NaN that does not reach its scale",
        original="tl.max(size.to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)",
        replacement="tl.max(size, axis=1)",
    ),
    _mutant(
        what="division by a scale of zero",
        original="inverse = tl.where(scale >= SMALLEST, 1 / scale, 0.0)",
        replacement="inverse = 1 / scale",
    ),
    _mutant(
        what="codes rounded down",
        original="c = tl.where(u * width < y - low + width, c + 1, c)",
        replacement="c = c + 0 * u * width",
    ),
    _mutant(
        what="codes rounded to the next root, not by distance, by reference",
        original="low, width = c * c, 2 * c + 1\n    else:\n        low, width = c.square()",
        replacement="low, width = c * c, 2 * c + 2\n    else:\n        low, width = c.square()",
    ),
    _mutant(
        what="a largest value that runs over its code",
        original="        c = tl.minimum(c, 127.0)\n",
        replacement="",
    ),
    _mutant(
        what="a mean of squares of zero where there was one",
        original="c = tl.minimum(tl.maximum(c, tl.where(size > 0, 1.0, 0.0)), 255.0)",
        replacement="c = tl.minimum(c, 255.0)",
    ),
    _mutant(
        what="a mean of squares of zero where there was one, by reference",
        original="c.fmax((size > 0).float()).clamp(max=255)",
        replacement="c.fmax(c.new_tensor(0.0)).clamp(max=255)",
    ),
]
