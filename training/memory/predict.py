"""The bytes of a training step, predicted from the shape of the model.

There are no formulas of a step's memory to maintain: its forward and backward pass run on tensors
that have a shape, a dtype and a device, but no memory (`FakeTensorMode`), through the kernels or
the references, whichever serve that device. Two shallow models and two micro-batches are enough.
Beyond the first block every block takes the same bytes, and all of it grows linearly with the
micro-batch, except for the buffer of logits, whose size `linear_cross_entropy` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tritium.kernels.linear_cross_entropy import chunk_rows
from tritium.model.activation_checkpointing import Ledger, checkpointed
from tritium.model.cpu_linear import Linear
from tritium.model.transformer import ModelConfig, Transformer
from tritium.training.mixed_precision import MixedPrecision
from tritium.training.optim import OptimizerConfig


@dataclass(frozen=True)
class StepBytes:
    """The bytes of one step; together those of the moment that takes the most."""

    parameters: int
    """Parameters, and the copies of them in the dtype of the products."""
    gradients: int
    states: int
    """Optimizer states."""
    activations: int
    """Activations that the forward pass keeps for the backward pass."""
    logits: int
    """The buffer of the output layer, which holds one chunk of the logits at a time."""
    other: int
    """Transient memory: recomputed blocks, temporaries."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


@dataclass(frozen=True)
class _Pass:
    """Bytes of one forward and backward pass of a micro-batch."""

    kept: float = 0.0
    forward_peak: float = 0.0
    backward_peak: float = 0.0

    def plus(self, times: float, other: _Pass) -> _Pass:
        """Add `times` the bytes of `other`."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return _Pass(*(x + times * y for x, y in pairs))

    def line_to(self, other: _Pass, steps: float) -> _Pass:
        """Extrapolate linearly: `self` plus `steps` times the difference to `other`."""
        return self.plus(steps, other.plus(-1, self))


class Memory:
    """Predictions for one model, on one device.

    Args:
        make: makes the model of a shape, with its dropout.
        config: the shape.
        optimizer: its settings.
        device: where to train.
        dtype: dtype of the matrix products; in bfloat16, with weights in float32, as
            `MixedPrecision` computes them.
        batch_size: sequences per optimizer step.
    """

    def __init__(
        self, make: Callable[[ModelConfig], Transformer], config: ModelConfig,
        optimizer: OptimizerConfig, device: torch.device, dtype: torch.dtype, batch_size: int,
    ):  # fmt: skip
        self._make, self.config, self._optimizer = make, config, optimizer
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self._pass = lru_cache(maxsize=None)(self._traced)

    @cached_property
    def fixed(self) -> tuple[int, int, int]:
        """Bytes of parameters, gradients and the optimizer's states, whatever the plan."""
        with _without_memory(self.device):
            model = self._make(self.config)
            weights = sum(p.nbytes for p in model.parameters())
            gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            with self._cast(model):
                copies = sum(x.nbytes for x in _copies(model))
        return weights + copies, gradients, self._optimizer.state_bytes(model)

    @cached_property
    def _parameters(self) -> list[Tensor]:
        with _without_memory(self.device):
            return list(self._make(self.config).parameters())

    def step(self, policy: str, micro_batch: int) -> StepBytes:
        """Predict a step with micro-batches of that many sequences."""
        one = self._of_micro_batch(policy, micro_batch)
        logits = self._logits_buffer(micro_batch)
        peak = max(one.forward_peak + logits, one.backward_peak)
        other = peak - one.kept - logits
        return StepBytes(*self.fixed, round(one.kept), logits, round(other))

    def peaks(self, policy: str, micro_batch: int) -> tuple[float, float, float]:
        """Predict what a forward pass keeps, its peak without logits, and the backward peak."""
        one = self._of_micro_batch(policy, micro_batch)
        return one.kept, one.forward_peak, one.backward_peak

    def _of_micro_batch(self, policy: str, micro_batch: int) -> _Pass:
        if self.batch_size == 1:
            return self._of_depth(policy, 1)
        one, whole = (self._of_depth(policy, size) for size in (1, self.batch_size))
        return one.line_to(whole, (micro_batch - 1) / (self.batch_size - 1))

    def _of_depth(self, policy: str, micro_batch: int) -> _Pass:
        n_layers = self.config.n_layers
        if n_layers == 1:
            return self._pass(1, policy, micro_batch)
        if policy.startswith("every-") and policy != "every-1":
            return self._of_some_blocks(policy, micro_batch)
        shallow, deeper = (self._pass(n, policy, micro_batch) for n in (2, 3))
        return shallow.line_to(deeper, n_layers - 2)

    def _of_some_blocks(self, policy: str, micro_batch: int) -> _Pass:
        """Checkpointed blocks with others between them, of which perhaps one is the last block."""
        n_layers = self.config.n_layers
        at_end = checkpointed(policy, n_layers) - checkpointed(policy, n_layers - 1)
        between = checkpointed(policy, n_layers - 1)
        result = self._of_depth("none", micro_batch)
        for times, depth in ((between, 3), (at_end, 2)):
            every, none = (self._pass(depth, x, micro_batch) for x in ("every-2", "none"))
            result = result.plus(times, every.plus(-1, none))
        last = self._pass(2 if at_end else 3, "every-2", micro_batch)
        return replace(result, backward_peak=result.kept + last.backward_peak - last.kept)

    def _logits_buffer(self, micro_batch: int) -> int:
        V, D = self.config.vocab_size, self.config.d_model
        with _without_memory(self.device):
            hidden_TD = torch.empty(micro_batch * self.config.max_seq_len, D, dtype=self.dtype)
        narrow = self._parameters[0].dtype == self.dtype == torch.bfloat16
        rows = chunk_rows("linear_cross_entropy", hidden_TD, V, self.dtype, narrow, None)
        return min(rows, len(hidden_TD)) * -(-V // 64) * 64 * self.dtype.itemsize

    def _traced(self, n_layers: int, policy: str, micro_batch: int) -> _Pass:
        with _without_memory(self.device):
            model = self._make(replace(self.config, n_layers=n_layers))
            model.activation_checkpointing = policy
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = [torch.zeros_like(p) for p in trained]
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            tokens = torch.zeros(micro_batch, self.config.max_seq_len, dtype=torch.long)
            tables = model.cos_LK, model.sin_LK
            with self._cast(model):
                given = [tokens, *model.parameters(), *_copies(model), *gradients, *tables]
                with Ledger(given) as ledger:
                    loss = model(tokens, tokens)
                    kept, forward_peak = ledger.live - loss.nbytes, ledger.peak
                    ledger.peak = 0
                    with torch.autocast(self.device.type, enabled=False):
                        loss.backward()
        return _Pass(kept, forward_peak, ledger.peak)

    def _cast(self, model: Transformer) -> AbstractContextManager:
        """Return what training computes a pass in."""
        mixed = self.dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.float32
        return MixedPrecision(model) if mixed else nullcontext()


def _copies(model: Transformer) -> list[Tensor]:
    """Return the copies of weights by which the layers multiply."""
    return [x.narrow for x in model.modules() if isinstance(x, Linear) and x.narrow is not None]


@contextmanager
def _without_memory(device: torch.device) -> Iterator[None]:
    """Make new tensors have no memory, and drawing random numbers draw none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device(device):
        yield
