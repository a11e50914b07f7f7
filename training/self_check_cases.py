"""Self-check cases: the operations of a training step that have kernels, each as one call.

Widths, dtypes and options are the run's; inputs are random, from separate generators. There are
fewer rows if their float64 reference would take more memory than a step of the run: kernels are
compiled for widths, not for numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritium.kernels import (
    add_layer_norm,
    add_rms_norm,
    dropout_add,
    embedding,
    layer_norm,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    softmax,
)
from tritium.model.attention import float32_on_cpu
from tritium.model.block import ACTIVATIONS
from tritium.model.transformer import Transformer
from tritium.training.optim import Optimizer
from tritium.training.precision import Arithmetic

BYTES = 128  # at most per element of a comparison's largest tensor, most of it in float64
ROOM = 64 << 20  # bytes that a comparison may always take
ELEMENTS = 1 << 20  # of all parameters on which an optimizer is checked


@dataclass(frozen=True)
class Case:
    """One call of an operation, as the run makes it."""

    op: str
    """Name of the operation, as `kernels.fall_back` takes it."""
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    """The call, with the inputs as its only arguments."""
    inputs: tuple[Tensor, ...]
    gradients: tuple[int, ...] = ()
    """Indices of the inputs that get a gradient."""


def cases(
    model: Transformer, batch: int, arithmetic: Arithmetic, *, samples: bool
) -> Iterator[Case]:
    """Make the calls of the forward and backward pass, then those of validation and sampling.

    Args:
        model: the model to be trained.
        batch: sequences of a forward pass.
        arithmetic: arithmetic of the run.
        samples: whether text is sampled.
    """
    config, weights = model.config, model.embedding.weight.dtype
    products, cast = arithmetic
    L, D, K, V = config.max_seq_len, config.d_model, config.head_width, config.vocab_size
    room, random = max(ROOM, step_memory(model, batch)), Random(model.embedding.weight.device)

    def tensor(*axes: int, dtype: torch.dtype = products) -> Tensor:
        sequences = room // (BYTES * L * axes[0] * (axes[1] if len(axes) > 1 else 1))
        return random((max(1, min(batch, sequences)), L, *axes), dtype)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, config.norm_eps)

    def add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, config.norm_eps)

    def centred(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer_norm(x, weight.shape, weight, bias, config.norm_eps)

    def add_centred(x: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, *vectors, eps=config.norm_eps)

    def turn(heads: Tensor, *tables_and_weights: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(
            heads, *tables_and_weights, eps=config.norm_eps, kv_heads=config.kv_heads
        )

    def drop(x: Tensor, residual: Tensor) -> Tensor:
        return dropout_add(x, residual, model.dropout, seed=1)

    def loss(label_smoothing: float, z_loss: float) -> Callable[..., Tensor]:
        def call(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            with nullcontext() if hidden.dtype == torch.float64 else cast:
                return linear_cross_entropy(
                    hidden, weight, target, softcap=config.softcap,
                    label_smoothing=label_smoothing, z_loss=z_loss,
                )  # fmt: skip

        return call

    scale_D, scale_K = (1 + 0.1 * random((n,), weights) for n in (D, K))
    stream = model.residual_dtype
    if stream is None:
        stream = weights if model.device.type == "cpu" else products
    norm, add_norm, vectors = rms, add_rms, (scale_D,)
    if config.norm == "layer":
        norm, add_norm = centred, add_centred
        vectors = (scale_D, 0.1 * random((D,), weights)) if config.bias else (scale_D,)
    each = range(1, 1 + len(vectors))
    ids = random.ids(V, max(1, min(batch * L, room // (BYTES * D))))
    table = random((V, D), weights)
    yield Case("embedding", lambda weight: embedding(ids, weight, dtype=stream), (table,), (0,))
    yield Case(f"{config.norm}_norm", norm, (tensor(D, dtype=stream), *vectors), (0, *each))
    heads = float32_on_cpu(tensor(config.n_heads + 2 * config.kv_heads, K))
    if config.positions == "rope":
        scales = (scale_K, scale_K.clone()) if config.qk_norm else ()
        places = (0, 3, 4) if config.qk_norm else (0,)
        yield Case("qk_norm_rope", turn, (heads, model.cos_LK, model.sin_LK, *scales), places)
    elif config.qk_norm:
        yield Case("rms_norm", rms, (heads, scale_K), (0, 1))
    added = tensor(D), tensor(D, dtype=stream), *vectors
    yield Case(f"add_{config.norm}_norm", add_norm, added, (0, 1, *(1 + i for i in each)))
    if model.dropout:
        yield Case("dropout_add", drop, added[:2], (0, 1))
    if config.activation != "gelu":  # PyTorch's own
        wide = tensor((2 if config.gated else 1) * config.feed_forward_width)
        yield Case(config.activation, ACTIVATIONS[config.activation], (wide,), (0,))
    T = max(1, min(batch * L, room // (BYTES * V)))
    layer = random((T, D), stream), random((V, D), weights) * D**-0.5, random.ids(V, T)
    training = loss(model.label_smoothing, model.z_loss)
    yield Case("linear_cross_entropy", training, layer, (0, 1))
    yield Case("linear_cross_entropy", loss(0.0, 0.0), layer)
    if samples:
        row = random((1, V), torch.float32)
        yield Case("softmax", lambda x: softmax(x, scale=1.25), (row,))


def step_memory(model: Transformer, batch: int) -> int:
    """Return bytes that every training step holds at once, whatever the options.

    The gradients, and two tensors of the residual stream in every block.
    """
    config = model.config
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return gradients + 4 * batch * config.max_seq_len * config.d_model * config.n_layers


def sample_groups(optimizer: Optimizer) -> list[dict]:
    """Return groups like an optimizer's, with one parameter of every shape, its rows cut.

    All of them hold `ELEMENTS` elements, or 8 rows each if that is more.
    """
    shapes = [sorted({tuple(p.shape) for p in g["params"]}) for g in optimizer.param_groups]
    each = ELEMENTS // sum(map(len, shapes))
    groups = []
    for group, own in zip(optimizer.param_groups, shapes, strict=True):
        like = group["params"][0]
        random = Random(like.device)
        params = []
        for first, *rest in own:
            rows = min(first, max(8, each // torch.Size(rest).numel()))
            if group.get("splits"):
                rows = max(1, rows // len(group["splits"]))
                group = {**group, "splits": (rows,) * len(group["splits"])}
                rows *= len(group["splits"])
            params.append(nn.Parameter(0.02 * random((rows, *rest), like.dtype)))
        groups.append({**group, "params": params, "lr": 1e-3})
    return groups


class Random:
    """Random numbers from a separate generator, the same every time."""

    def __init__(self, device: torch.device):
        self._device, self._generator = device, torch.Generator(device).manual_seed(0)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return normal numbers."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device=self._device)
        return x.to(dtype)

    def ids(self, below: int, count: int) -> Tensor:
        """Return `count` integers in [0, below)."""
        return torch.randint(below, (count,), generator=self._generator, device=self._device)
