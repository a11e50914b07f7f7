"""Optimizers and gradient clipping, each a few launches for the whole model."""

from tritium.kernels.optimizers._base import MultiTensorOptimizer
from tritium.kernels.optimizers._dtensor import distributed_rows
from tritium.kernels.optimizers._options import StepOptions
from tritium.kernels.optimizers._rounding import join_reference
from tritium.kernels.optimizers.adagrad import Adagrad
from tritium.kernels.optimizers.adam import Adam
from tritium.kernels.optimizers.adamw import AdamW
from tritium.kernels.optimizers.clip_grad_norm import clip_grad_norm_, clip_grad_norms_
from tritium.kernels.optimizers.lion import Lion
from tritium.kernels.optimizers.muon import Muon
from tritium.kernels.optimizers.rmsprop import RMSprop
from tritium.kernels.optimizers.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "MultiTensorOptimizer",
    "Muon",
    "RMSprop",
    "StepOptions",
    "clip_grad_norm_",
    "clip_grad_norms_",
    "distributed_rows",
    "join_reference",
]
