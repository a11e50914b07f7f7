"""Faults of the prediction of training on many GPUs: times, memory, choices."""

from functools import partial

from tests.mutants import Mutant

_predict = partial(Mutant, file="bench/scale/predict.py")
_scale = partial(Mutant, file="bench/scale/scale.py")

MUTANTS = [
    _predict(
        what="all communication hidden",
        original="StepTime(arithmetic, total, exposed)",
        replacement="StepTime(arithmetic, total, 0.0)",
    ),
    _predict(
        what="recomputed blocks take no time",
        original="(block.backward + again) / efficiency",
        replacement="block.backward / efficiency",
    ),
    _predict(
        what="activations of float32 in bfloat16",
        original="round(activations * narrow / 4)",
        replacement="activations",
    ),
    _scale(
        what="what does not fit is chosen",
        original="if x.memory.total <= cluster.memory]",
        replacement="if True]",
    ),
    _scale(
        what="the slowest plan is chosen",
        original="fastest = min(fitting",
        replacement="fastest = max(fitting",
    ),
    _scale(
        what="a batch that cannot be shared out",
        original="if job.batch_size % mesh.readers:",
        replacement="if False:",
    ),
]
