"""The weights that a run begins with, if --init-from names some: fine-tuning, whole or by LoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from tritium.model.config import ModelConfig
from tritium.model.lora import adapt, adapters_of
from tritium.model.native import config_from_native
from tritium.model.pretrained import CONFIG
from tritium.model.saved import best, read_record
from tritium.model.transformer import Transformer
from tritium.training.settings import TrainConfig
from tritium.training.trained import is_pretrained, load_tokenizer, read, tokenizer_folder
from tritium.training.validation import ConfigError


def shaped(config: TrainConfig) -> TrainConfig:
    """Return the settings with shape and tokenizer of the model that --init-from names, if any.

    Its context is cut to the one that the settings ask for. A run that is resumed has them already,
    unless it was ended before it wrote its settings.

    Raises:
        ConfigError: there is no such model, its tokenizer has more tokens than it, or the adapters
            that --lora-rank asks for do not fit it.
    """
    if config.lora_rank is None and (config.lora_alpha is not None or config.lora_layers):
        raise ConfigError(
            "--lora-alpha and --lora-layers are about adapters; add --lora-rank, or drop them"
        )
    if config.lora_rank is not None and config.init_from is None:
        raise ConfigError(
            "--lora-rank trains adapters of weights that exist; add --init-from DIR_OR_RUN, or "
            "drop it"
        )
    begun = config.resume and Path(config.out or "", "config.json").is_file()
    if config.init_from is None or begun:
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
    if config.lora_rank is not None:
        try:
            with torch.device("meta"):
                adapt(Transformer(model), config.lora_rank, config.lora_alpha, config.lora_layers)
        except ValueError as error:
            raise ConfigError(f"--lora-rank, --init-from {source}: {error}") from error
    length = min(model.max_seq_len, config.model.max_seq_len)
    return replace(config, model=replace(model, max_seq_len=length), tokenizer=str(folder))


def _shape(source: Path) -> ModelConfig:
    if is_pretrained(source):
        return config_from_native(json.loads((source / CONFIG).read_text()))
    return ModelConfig(**read_record(best(source))["model"])


@torch.no_grad()
def copy_weights(source: str, model: Transformer) -> str:
    """Copy the weights that --init-from names into a model of that shape; return a line about them.

    Adapters that the model has stay as they are.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        trained, _ = read(Path(source))
    except ValueError as error:
        raise ConfigError(f"--init-from {source}: {error}") from error
    own = dict(model.named_parameters())
    for name, p in trained.named_parameters():
        own[name].copy_(p[: len(own[name])])  # of learned positions those of a shorter context
    context, whole = model.config.max_seq_len, trained.config.max_seq_len
    said = f"Weights of {source}, with a context of {context:,} of its {whole:,} tokens."
    if (adapters := adapters_of(model)) is None:
        return said
    ps = [p.numel() for p in model.parameters() if p.requires_grad]
    return (
        f"{said} They stay as they are: trained are {sum(ps):,} parameters of adapters of rank "
        f"{adapters.rank}, alpha {adapters.alpha:g}, on {', '.join(adapters.layers)}."
    )
