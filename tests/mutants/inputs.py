"""Faults of model/inputs.py: tokens and positions that are no such things pass."""

from functools import partial

from tests.mutants import Mutant

_inputs = partial(Mutant, file="model/inputs.py")

MUTANTS = [
    _inputs(
        what="positions of any shape",
        original="        or positions.shape != tokens.shape\n",
        replacement="",
    ),
    _inputs(
        what="positions of any dtype",
        original="        or positions.dtype not in INTEGERS\n",
        replacement="",
    ),
    _inputs(
        what="positions of any device",
        original="        or positions.device != tokens.device\n",
        replacement="",
    ),
    _inputs(
        what="a list of positions",
        original="        not isinstance(positions, Tensor)\n        or ",
        replacement="        ",
    ),
    _inputs(what="any steps", original="wrong_BL.any() or ", replacement=""),
    _inputs(what="a negative first", original=" or (first_B1 < 0).any()", replacement=""),
    _inputs(what="no document may begin", original=" & (place_BL != 0)", replacement=""),
    _inputs(what="one place too many", original=">= limit:", replacement="> limit:"),
    _inputs(what="a list of tokens", original="not isinstance(tokens, Tensor) or ", replacement=""),
    _inputs(what="tokens without rows", original="tokens.dim() != 2 or ", replacement=""),
    _inputs(
        what="tokens of any dtype", original=" or tokens.dtype not in INTEGERS:", replacement=":"
    ),
    Mutant(
        file="model/inspect.py",
        what="positions looked at by the model alone",
        original="        check_positions(positions, tokens)\n",
        replacement="        pass\n",
    ),
]
