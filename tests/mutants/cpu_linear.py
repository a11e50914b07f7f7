"""Faults of model/cpu_linear.py: another product, or the usual one where another is faster."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="model/cpu_linear.py")

MUTANTS = [
    _mutant(
        what="the row that was added is returned too",
        original="columns.T).T[:M].contiguous()",
        replacement="columns.T).T.contiguous()",
    ),
    _mutant(
        what="results in columns",
        original="columns.T).T[:M].contiguous()",
        replacement="columns.T).T[:M]",
    ),
    _mutant(
        what="the bias forgotten",
        original="return y if self.bias is None else y + self.bias",
        replacement="return y",
    ),
    _mutant(
        what="few rows with a gradient go the other way",
        original="rows <= FEW and from_memory and not torch.is_grad_enabled()",
        replacement="rows <= FEW and from_memory",
    ),
    _mutant(
        what="a row less",
        original="if rows <= FEW and",
        replacement="if rows < FEW and",
    ),
    _mutant(
        what="weights that a cache holds",
        original="FROM_MEMORY = 3 << 19",
        replacement="FROM_MEMORY = 1 << 19",
    ),
    _mutant(
        what="rows of any width",
        original="and x.shape[-1] in WIDTHS and",
        replacement="and",
    ),
    _mutant(
        what="oneDNN for one row",
        original="return _Product.apply if rows > 1 or size < LARGE else None",
        replacement="return _Product.apply",
    ),
    _mutant(
        what="oneDNN for few rows of a small weight",
        original="LARGE = 1 << 19",
        replacement="LARGE = 1 << 18",
    ),
    _mutant(
        what="oneDNN for few rows of no weight",
        original="(rows < ROWS and size < LARGE)",
        replacement="rows < ROWS",
    ),
    _mutant(
        what="oneDNN for what is no float32",
        original="or not x.dtype == weight.dtype == torch.float32\n",
        replacement="",
    ),
    _mutant(
        what="oneDNN under autocast",
        original='not torch.is_autocast_enabled("cpu")\n        and ',
        replacement="",
    ),
    _mutant(
        what="gradients of input and weight change places",
        original="wants_a, wants_b = ctx.needs_input_grad",
        replacement="wants_b, wants_a = ctx.needs_input_grad",
    ),
]
