"""Faults of kernels/optimizers/_torch_optimizer.py: a compiler imported, or decorators lost."""

from functools import partial

from tests.mutants import Mutant

_torch = partial(Mutant, file="kernels/optimizers/_torch_optimizer.py")

MUTANTS = [
    _torch(
        what="the compiler is always imported",
        original="    return MethodType(method.__wrapped__, method.__self__)",
        replacement="    return method",
    ),
    _torch(
        what="the decorators of others are passed by",
        original=" or method.__code__ is not _DECORATED:",
        replacement=":",
    ),
    _torch(
        what="a compiler that is there is not kept out",
        original='if "torch._dynamo" in sys.modules or ',
        replacement="if ",
    ),
    _torch(
        what="zero_grad imports the compiler",
        original="_plain(super().zero_grad)(set_to_none)",
        replacement="super().zero_grad(set_to_none)",
    ),
]
