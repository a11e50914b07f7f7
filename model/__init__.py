"""The architecture: a decoder-only transformer, composed by configuration."""

from tritium.model.config import ModelConfig, RopeScaling
from tritium.model.modules import (
    GEGLU,
    LayerNorm,
    LinearCrossEntropyLoss,
    ReLUSquared,
    RMSNorm,
    SwiGLU,
)
from tritium.model.transformer import Transformer

__all__ = [
    "GEGLU",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "ModelConfig",
    "RMSNorm",
    "ReLUSquared",
    "RopeScaling",
    "SwiGLU",
    "Transformer",
]
