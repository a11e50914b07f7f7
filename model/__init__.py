"""The architecture: a decoder-only transformer, composed by configuration."""

from tritium.model.config import ModelConfig, RopeScaling
from tritium.model.heads import Classifier, Embedder, Regressor, pad_sequences
from tritium.model.kv_cache import Cache
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
    "Cache",
    "Classifier",
    "Embedder",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "ModelConfig",
    "RMSNorm",
    "ReLUSquared",
    "Regressor",
    "RopeScaling",
    "SwiGLU",
    "Transformer",
    "pad_sequences",
]
