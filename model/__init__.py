"""The architecture: a decoder-only transformer, composed by configuration."""

from tritium.model.transformer import ModelConfig, Transformer

__all__ = ["ModelConfig", "Transformer"]
