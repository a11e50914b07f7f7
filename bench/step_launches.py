"""Launches of a training step, counted without a GPU, by kind.

A step runs on CPU tensors as it would on a GPU: products in bfloat16, Tritium's operations through
their kernels. A dispatch mode sees PyTorch's operators, a recorder the launches of Tritium's
kernels, of which none is compiled or run: outputs hold whatever was in memory. Operators that
return a view or unwritten memory launch nothing and are left out; each other counts as one launch,
of which a GPU may make several (a product in two parts, a large sum, a sort). The optimizer's table
of addresses is made on the host, also beside a GPU: its upload counts, its making does not.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from tritium.kernels import runtime
from tritium.kernels.launcher import Launcher
from tritium.model import ModelConfig, Transformer, block, transformer
from tritium.training.optim import OptimizerConfig
from tritium.training.precision import ComputeConfig

PRODUCTS, ATTENTION, NORMS, POSITIONS = "products", "attention", "norms", "QK-norm, rotary"
ACTIVATION, LOSS, EMBEDDING, OPTIMIZER = "activation", "loss", "embedding", "optimizer"
ADDITIONS, CASTS, FILLS, SCALARS = "additions", "casts and copies", "fills", "scalars, targets"
OTHER = "other"
KINDS = (
    PRODUCTS, ATTENTION, NORMS, POSITIONS, ACTIVATION, LOSS, EMBEDDING, OPTIMIZER, ADDITIONS,
    CASTS, FILLS, SCALARS, OTHER,
)  # fmt: skip

OWN = {
    "_norm_": NORMS, "_qk_norm_rope_": POSITIONS, "_rope_": POSITIONS, "_activation_": ACTIVATION,
    "_swiglu_": ACTIVATION, "_geglu_": ACTIVATION, "_relu_squared_": ACTIVATION,
    "_cross_entropy_": LOSS, "_linear_cross_entropy_": LOSS, "_mse_loss_": LOSS,
    "_mean_loss_": LOSS, "_scale_gradient_": LOSS, "_log_prob_": LOSS, "_linear_kl_div_": LOSS,
    "_linear_topk_kl_div_": LOSS,
    "_optimizer_": OPTIMIZER, "_grad_norm_": OPTIMIZER, "_grad_norms_": OPTIMIZER,
    "_norms_": OPTIMIZER, "_muon_": OPTIMIZER,
    "_embedding_": EMBEDDING,
}  # fmt: skip
"""Kinds of Tritium's kernels, by how their names begin: those of the source and of a profile."""
ATEN = {
    "mm": PRODUCTS, "addmm": PRODUCTS, "addmm_": PRODUCTS, "bmm": PRODUCTS,
    "embedding": EMBEDDING, "embedding_dense_backward": EMBEDDING,
    "_to_copy": CASTS, "copy_": CASTS, "clone": CASTS, "cat": CASTS, "_foreach_copy_": CASTS,
    "zeros": FILLS, "zero_": FILLS, "zeros_like": FILLS, "fill_": FILLS, "new_ones": FILLS,
    "ones_like": FILLS, "new_zeros": FILLS, "full_like": FILLS,
    "add": ADDITIONS, "add_": ADDITIONS, "_foreach_add_": ADDITIONS,
}  # fmt: skip
"""Kinds of PyTorch's operators; those of attention have it in their names."""
NO_LAUNCH = {
    "empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "promote_types",
    "_record_function_enter_new", "_record_function_exit", "is_same_size",
}  # fmt: skip
EMBEDDINGS = import_module("tritium.kernels.embedding")
POINTER_TABLE = import_module("tritium.kernels.optimizers._pointer_table")
MAKE_TABLE = POINTER_TABLE._tables.__wrapped__  # not from its cache
UPLOAD = "upload"
REASONS = {
    "forward": "the weights of all blocks in bfloat16, one call a step; in each micro-batch the "
    "output layer's weight and the losses of its rows",
    "backward": "each weight's first bfloat16 gradient of a step in float32; in each micro-batch "
    "the tokens as int32, to be sorted",
}
"""Reasons for casts and copies, by phase."""
OF_OPTIMIZER = {
    UPLOAD: "addresses of the gradients, where these are not where they were before",
    "_grad_norm_partials_kernel": "sums of squares of all gradients",
    "_optimizer_prepare_kernel": "their norm, the clipping, step counts and rates",
    "_optimizer_update_kernel": "all weights and moments",
}
"""The optimizer's launches."""


@dataclass(frozen=True)
class Launch:
    """One kernel that a device is asked for."""

    kind: str
    name: str
    phase: str
    """forward, backward or optimizer."""


class Recorder(TorchDispatchMode):
    """Records the launches of what runs inside it."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []
        self.phase = "forward"
        self._on_host = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tritium" and func._schema.is_mutable:
            return func(*args, **(kwargs or {}))  # always dispatched; its kernel is recorded below
        if func.namespace == "tritium":
            raise RuntimeError(f"bench step: {func} hides what it launches; call it undispatched")
        name = func._schema.name.partition("::")[2]
        views = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not views and name not in NO_LAUNCH and not self._on_host:
            self._append(_kind(name, args), name)
        return func(*args, **(kwargs or {}))

    def kernel(self, launcher: Launcher) -> None:
        """Record the launch of one of Tritium's kernels."""
        name = launcher._kernel.fn.__name__
        self._append(next((OWN[start] for start in OWN if name.startswith(start)), OTHER), name)

    def address_table(self, *rows: Any) -> Any:
        """Make an optimizer's table of addresses, always anew."""
        self._on_host = True
        try:
            return MAKE_TABLE(*rows)
        finally:
            self._on_host = False

    def upload(self, x: Tensor, device: torch.device) -> Tensor:
        """Record what is copied from the host."""
        self._append(CASTS, UPLOAD)
        return x

    def _append(self, kind: str, name: str) -> None:
        kind = OPTIMIZER if self.phase == OPTIMIZER else kind
        self.launches.append(Launch(kind, name, self.phase))


def _kind(name: str, args: tuple) -> str:
    if "scaled_dot_product" in name:
        return ATTENTION
    kind = ATEN.get(name, SCALARS)
    small = isinstance(args[0], Tensor) and args[0].dim() < 2 and not args[0].is_floating_point()
    scalar = isinstance(args[0], Tensor) and args[0].dim() == 0
    return SCALARS if kind == ADDITIONS and (small or scalar) else kind


@contextmanager
def recorded() -> Iterator[Recorder]:
    """Run what is inside as on a GPU, and record its launches."""
    recorder = Recorder()
    backward = torch.Tensor.backward

    def in_backward(*args, **options) -> None:
        recorder.phase = "backward"
        backward(*args, **options)
        recorder.phase = "forward"

    with (
        mock.patch.object(runtime, "CPU_KERNELS", True),
        mock.patch.object(runtime, "_is_watched", return_value=False),
        mock.patch.object(Launcher, "launch", lambda x, *_, **__: recorder.kernel(x)),
        mock.patch.object(block, "float32_on_cpu", lambda x: x),
        mock.patch.object(transformer, "as_multiplied", lambda x: x.to(torch.bfloat16)),
        mock.patch.object(transformer, "multiplied_dtype", return_value=torch.bfloat16),
        mock.patch("tritium.kernels._packed_rows.keeps_rows", return_value=False),  # asks a driver
        # It is dispatched, below where this mode sees anything.
        mock.patch.object(EMBEDDINGS, "_backward_into", EMBEDDINGS._launch_sums),
        mock.patch.object(POINTER_TABLE, "_tables", recorder.address_table),
        mock.patch.object(POINTER_TABLE, "upload", recorder.upload),
        mock.patch.object(torch.Tensor, "backward", in_backward),
        recorder,
    ):
        yield recorder


def step_launches(n_layers: int, micro_batches: int) -> list[Launch]:
    """Return the launches of a step after the first, which also makes the optimizer's state."""
    config = ModelConfig(vocab_size=64, n_layers=n_layers, d_model=32, n_heads=2, max_seq_len=16)
    model = Transformer(config)
    arithmetic = ComputeConfig(precision="bfloat16").apply(model, torch.device("cpu"))
    optimizer = OptimizerConfig().make(model)
    tokens = torch.zeros(micro_batches, config.max_seq_len, dtype=torch.long)
    with recorded() as recorder:
        for _ in range(2):
            recorder.launches.clear()
            recorder.phase = "forward"
            train.accumulate_gradients(model, (tokens, tokens), 1, arithmetic.cast)
            recorder.phase = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
    return recorder.launches


Counts = Counter[tuple[str, str]]  # by phase and kind


def counts(n_layers: int, micro_batches: int) -> Counts:
    """Count the launches of a step by phase and kind."""
    return Counter((x.phase, x.kind) for x in step_launches(n_layers, micro_batches))


@dataclass(frozen=True)
class Account:
    """Launches of a step, by what they are repeated for."""

    first_block: Counts
    """Launches of each block in the first micro-batch of a step."""
    block: Counts
    """The same in each further micro-batch."""
    first_rest: Counts
    """Launches outside the blocks in the first micro-batch, and of the optimizer."""
    rest: Counts
    """Launches outside the blocks in each further micro-batch."""

    def total(self, n_layers: int, micro_batches: int) -> Counts:
        """Return the launches of a step of that many blocks and micro-batches."""
        further = micro_batches - 1
        return _sum(
            (n_layers, self.first_block), (n_layers * further, self.block), (1, self.first_rest),
            (further, self.rest),
        )  # fmt: skip


def account() -> Account:
    """Count steps of two and three blocks, one and two micro-batches, and take them apart."""
    c = {(n, m): counts(n, m) for n in (2, 3) for m in (1, 2)}
    first_block = _sum((1, c[3, 1]), (-1, c[2, 1]))
    block = _sum((1, c[3, 2]), (-1, c[2, 2]), (-1, first_block))
    first_rest = _sum((1, c[2, 1]), (-2, first_block))
    rest = _sum((1, c[2, 2]), (-1, c[2, 1]), (-2, block))
    return Account(first_block, block, first_rest, rest)


def _sum(*parts: tuple[int, Counts]) -> Counts:
    total: Counts = Counter()
    for times, part in parts:
        for key, n in part.items():
            total[key] += times * n
    return Counter({key: n for key, n in total.items() if n})
