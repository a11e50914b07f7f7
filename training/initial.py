"""The weights that a run begins with, if --init-from names some: fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from tritium.model.config import ModelConfig
from tritium.model.native import config_from_native
from tritium.model.pretrained import CONFIG
from tritium.model.saved import best, read_record
from tritium.model.transformer import Transformer
from tritium.training.settings import TrainConfig
from tritium.training.trained import is_pretrained, load_tokenizer, read, tokenizer_folder
from tritium.training.validation import ConfigError


def shaped(config: TrainConfig) -> TrainConfig:
    """Return the settings with shape and tokenizer of the model that --init-from names, if any.

    Its context is cut to the one that the settings ask for. A run that is resumed has them already.

    Raises:
        ConfigError: there is no such model, or its tokenizer has more tokens than it.
    """
    if config.init_from is None or config.resume:
        return config
    source = Path(config.init_from)
    try:
        model = _shape(source)
        tokenizer = load_tokenizer(source)
        folder = tokenizer_folder(source)
    except ValueError as error:
        raise ConfigError(f"--init-from {source}: {error}") from error
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"--init-from {source}: the tokenizer must have at most the model's "
            f"{model.vocab_size} tokens, got {tokenizer.vocab_size}"
        )
    length = min(model.max_seq_len, config.model.max_seq_len)
    return replace(config, model=replace(model, max_seq_len=length), tokenizer=str(folder))


def _shape(source: Path) -> ModelConfig:
    if is_pretrained(source):
        return config_from_native(json.loads((source / CONFIG).read_text()))
    return ModelConfig(**read_record(best(source))["model"])


@torch.no_grad()
def copy_weights(source: str, model: Transformer) -> str:
    """Copy the weights that --init-from names into a model of that shape; return a line about them.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        trained, _ = read(Path(source))
    except ValueError as error:
        raise ConfigError(f"--init-from {source}: {error}") from error
    given = dict(trained.named_parameters())
    for name, p in model.named_parameters():
        p.copy_(given[name][: len(p)])  # of learned positions those of a shorter context
    context, whole = model.config.max_seq_len, trained.config.max_seq_len
    return f"Weights of {source}, with a context of {context:,} of its {whole:,} tokens."
