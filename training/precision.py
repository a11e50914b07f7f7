"""Arithmetic of a step: its precision, the self-check, the CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from tritium.kernels.runtime import fallen_back
from tritium.model.transformer import Transformer
from tritium.training.device import choose_precision
from tritium.training.mixed_precision import MixedPrecision
from tritium.training.optim import OptimizerConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Arithmetic(NamedTuple):
    """Dtype and autocast of a model."""

    dtype: torch.dtype
    """Dtype of the matrix products."""
    cast: AbstractContextManager
    """The autocast around a forward pass."""


@dataclass(frozen=True)
class ComputeConfig:
    """Arithmetic of a step."""

    precision: Literal["auto", "float32", "bfloat16", "bfloat16-true"] = "auto"
    """Precision. float32; bfloat16: matrix products in bfloat16 (autocast), weights in float32;
    bfloat16-true: weights and activations in bfloat16, see --master-weights. auto: bfloat16 where
    the device multiplies it natively, else float32."""
    cuda_graph: bool = True
    """On a GPU, capture the whole training step in a CUDA graph, which the host launches as one:
    the same bits in less time. Where that cannot be, a line at the start says why."""
    deterministic: bool = False
    """On a GPU, take PyTorch's deterministic algorithms, so that runs that are alike have the same
    bits: the gradient of attention is summed in a fixed order, which is slower. Tritium's own
    kernels always do. On one CPU runs have the same bits in any case."""
    residual: Literal["auto", "float32"] = "auto"
    """Dtype of the residual stream. auto: on a GPU that of the matrix products, else float32 under
    --precision bfloat16."""
    self_check: bool = True
    """Compare every kernel with its reference at the start, at the run's shapes; one that is wrong
    or does not run is replaced by its reference. Without a GPU no kernel runs."""

    def check(self, optimizer: OptimizerConfig) -> None:
        """Raise ValueError unless a run can be computed like this.

        Args:
            optimizer: what keeps the weights.
        """
        if optimizer.master_weights is not None and self.precision != "bfloat16-true":
            raise ValueError(
                "--master-weights says what is kept beside weights in bfloat16; add --precision "
                "bfloat16-true, or leave it out"
            )

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the matrix products."""
        true = self.precision == "bfloat16-true"
        return torch.bfloat16 if true else choose_precision(self.precision, device)

    def convert(self, model: Transformer) -> Transformer:
        """Return the model, with its weights in the dtype that they are trained in."""
        if self.precision == "bfloat16-true":
            model.bfloat16()
        return model

    def apply(self, model: Transformer, device: torch.device, *, plain: bool = False) -> Arithmetic:
        """Move a model to where and into what it is trained in.

        Args:
            model: the model.
            device: where it goes.
            plain: take autocast as it is, with the same sums, where others wait for each gradient.
        """
        dtype = self.product_dtype(device)
        self.convert(model).to(device)
        if dtype == torch.bfloat16 and self.precision != "bfloat16-true":
            if plain:
                return Arithmetic(dtype, torch.autocast(device.type, torch.bfloat16))
            return Arithmetic(dtype, MixedPrecision(model))
        return Arithmetic(dtype, nullcontext())

    @contextmanager
    def matmul_precision(self, device: torch.device) -> Iterator[None]:
        """Set how PyTorch multiplies float32 inside the block, and put it back behind it.

        PyTorch keeps one setting for the whole process. What autocast leaves in float32 may be
        multiplied in bfloat16 too.
        """
        before = torch.get_float32_matmul_precision()
        narrow = self.product_dtype(device) == torch.bfloat16
        torch.set_float32_matmul_precision("medium" if narrow else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def determinism(self) -> AbstractContextManager:
        """Return the block in which PyTorch's algorithms are those that the settings ask for."""
        return deterministic() if self.deterministic else nullcontext()

    def fingerprint(self, arithmetic: Arithmetic) -> dict:
        """Return what decides the rounding of a step; what is as usual is left out."""
        unusual = {
            "weights": "torch.bfloat16" if self.precision == "bfloat16-true" else None,
            "residual": None if self.residual == "auto" else self.residual,
            "references": ", ".join(sorted(fallen_back())) or None,
        }
        decided = {"dtype": str(arithmetic.dtype)} | unusual
        return {name: value for name, value in decided.items() if value is not None}


@contextmanager
def deterministic() -> Iterator[None]:
    """Take PyTorch's deterministic algorithms inside the block, and what was set before behind it.

    Where an operator has none, PyTorch raises a RuntimeError that names it. Fresh memory is not
    filled, as PyTorch's setting alone would do.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    setting: Any = torch.utils.deterministic  # whose module has the attribute without saying so
    fills = setting.fill_uninitialized_memory
    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")  # as cuBLAS wants it, or it raises
    setting.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        setting.fill_uninitialized_memory = fills
        if workspace is None:
            del os.environ[WORKSPACE]
