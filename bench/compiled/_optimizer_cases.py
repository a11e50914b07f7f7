"""The optimizers' launches that `static` compiles: one step of each, on a few small parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from tritium.bench.compiled._case import Case, Limit, name_of
from tritium.kernels.optimizers import MultiTensorOptimizer
from tritium.kernels.optimizers.adagrad import Adagrad
from tritium.kernels.optimizers.adam import Adam
from tritium.kernels.optimizers.adamw import AdamW
from tritium.kernels.optimizers.clip_grad_norm import clip_grad_norm_, clip_grad_norms_
from tritium.kernels.optimizers.lion import Lion
from tritium.kernels.optimizers.muon import Muon
from tritium.kernels.optimizers.rmsprop import RMSprop
from tritium.kernels.optimizers.sgd import SGD

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8


def _parameters(dtype: torch.dtype, smallest: int = 768) -> list[Tensor]:
    parameters = [torch.empty(size, dtype=dtype) for size in (smallest, 4097, 100_000)]
    for p in parameters:
        p.grad = torch.empty_like(p)
    return parameters


GRAD_NORM = {
    "_grad_norm_partials_kernel": Limit(bytes=4, instructions=4),
    "_grad_norm_clip_kernel": Limit(bytes=8, instructions=4),
}


def _optimizer(
    rule: type[MultiTensorOptimizer],
    moved: float,
    *,
    dtype: torch.dtype = F32,
    instructions: float = 35,
    **options,
) -> Case:
    """One step of `rule` with `options`, which moves so many bytes per element.

    Multiplications and additions are not fused there, so that all variants of a kernel round alike:
    up to 10 instructions more, far below what an H100 issues while it moves the bytes.
    """
    name = "adam" if rule is AdamW else rule.__name__.lower()
    limits = GRAD_NORM | {
        f"_{name}_prepare_kernel": Limit(single=True),
        f"_{name}_update_kernel": Limit(bytes=moved, instructions=instructions),
    }
    # In 8 bits small parameters would be stored in another format, and add a branch.
    step = rule(_parameters(dtype, smallest=4096), **options).step
    eight_bits = options.get("state_dtype") == torch.uint8
    label = ", ".join([name_of(dtype), *(f"{key} {value}" for key, value in options.items())])
    return Case(label, step, limits=limits, narrow_on=("gfx942",) if eight_bits else ())


def _muon(dtype: torch.dtype = F32, **options) -> Case:
    """One step of Muon, of matrices of both orientations and of vectors by AdamW.

    Its products have no limit of bytes or instructions per element: they are bound by arithmetic.
    """
    shapes = [(1536, 768), (768, 1536)][: 1 if "splits" in options else 2]
    matrices = [torch.empty(shape, dtype=dtype) for shape in shapes]
    others = _parameters(dtype)
    for p in matrices:
        p.grad = torch.empty_like(p)
    limits = GRAD_NORM | {"_muon_prepare_kernel": Limit(single=True)}
    step = Muon([{"params": matrices}, {"params": others, "use_muon": False}], **options).step
    label = ", ".join([name_of(dtype), *(f"{key} {value}" for key, value in options.items())])
    return Case(label, step, limits=limits)


def _clip_grad_norm_() -> Case:
    parameters = [*_parameters(F32), *_parameters(BF16), *_parameters(torch.float16)]
    label = "float32, bfloat16, float16"
    return Case(label, lambda: clip_grad_norm_(parameters, 1.0), limits=GRAD_NORM)


def _clip_grad_norms_() -> Case:
    layers = [_parameters(dtype) for dtype in (F32, BF16, torch.float16)]
    limits = GRAD_NORM | {
        "_grad_norms_layers_kernel": Limit(single=True),
        "_grad_norms_clip_kernel": Limit(bytes=8, instructions=5),
    }
    return Case("layers", lambda: clip_grad_norms_(layers, 1.0), limits=limits)


OPTIMIZER_CASES: dict[str, Callable[[], list[Case]]] = {
    "AdamW": lambda: [
        *(_optimizer(AdamW, 28, max_grad_norm=norm) for norm in (None, 1.0)),
        _optimizer(AdamW, 28, dtype=BF16),
        _optimizer(AdamW, 26, dtype=BF16, master="split"),
        _optimizer(AdamW, 22, dtype=BF16, master=None, instructions=48),
        _optimizer(AdamW, 14, dtype=BF16, master=None, state_dtype=BF16, instructions=48),
        _optimizer(AdamW, 20, state_dtype=BF16, instructions=48),
        # Two roots and a maximum over the block for each state: bound by memory all the same.
        _optimizer(AdamW, 16.2, state_dtype=U8, instructions=118),
        _optimizer(AdamW, 10.2, dtype=BF16, master=None, state_dtype=U8, instructions=118),
        _optimizer(
            AdamW,
            40,
            max_grad_norm=1.0,
            ema_decay=0.999,
            zero_grads=True,
            record_norms=True,
            l1=1e-6,
            instructions=48,
        ),
    ],
    "Adam": lambda: [_optimizer(Adam, 28), _optimizer(Adam, 28, weight_decay=0.1)],
    "SGD": lambda: [_optimizer(SGD, 12), _optimizer(SGD, 20, momentum=0.9)],
    "RMSprop": lambda: [
        _optimizer(RMSprop, 20),
        _optimizer(RMSprop, 28, momentum=0.9),
        _optimizer(RMSprop, 28, centered=True),
        _optimizer(RMSprop, 36, momentum=0.9, centered=True),
    ],
    "Adagrad": lambda: [_optimizer(Adagrad, 20)],
    "Lion": lambda: [_optimizer(Lion, 20)],
    "Muon": lambda: [
        _muon(),
        _muon(BF16, max_grad_norm=1.0, master=None, state_dtype=BF16, record_norms=True),
        _muon(beta2=0.95, cautious_decay=True, splits=(1024, 512)),
    ],
    "clip_grad_norm_": lambda: [_clip_grad_norm_()],
    "clip_grad_norms_": lambda: [_clip_grad_norms_()],
}
