"""The model and what trains, samples and stores it."""

from tritium.model.transformer import ModelConfig, Transformer

__all__ = ["ModelConfig", "Transformer"]
