"""A trained model and its tokenizer: out of a run, or of a folder in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tritium.data import Tokenizer
from tritium.model.pretrained import CONFIG
from tritium.model.transformer import Transformer
from tritium.training.run.checkpoint import CheckpointError, newest


def read(
    source: Path, device: str | torch.device = "cpu", *, checkpoint: str = "best"
) -> tuple[Transformer, Tokenizer]:
    """Return a model and its tokenizer, ready to be evaluated.

    Args:
        source: folder of a run, of one of its checkpoints, or in Hugging Face's layout with a
            tokenizer.json.
        device: where the model goes.
        checkpoint: "best" or "newest" of a run.

    Raises:
        ValueError: there is no model, it is damaged, or it has no tokenizer.
    """
    if is_pretrained(source):
        model = Transformer.from_pretrained(source, device=device)
    else:
        model = Transformer.load(source, device, checkpoint=checkpoint)
    return model, load_tokenizer(source)


def is_pretrained(source: Path) -> bool:
    """Whether a folder is in Hugging Face's layout: a run's config.json has no model_type."""
    try:
        return "model_type" in json.loads((source / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_tokenizer(source: Path) -> Tokenizer:
    """Return the tokenizer of a run, of the run of a checkpoint, or of such a folder.

    Raises:
        CheckpointError: there is none.
    """
    return Tokenizer.load(tokenizer_folder(source))


def tokenizer_folder(source: Path) -> Path:
    """Return the folder with the tokenizer.json of a model; as `load_tokenizer`."""
    parents = [] if is_pretrained(source) else newest(source).resolve().parents
    for folder in (source, *parents):
        if (folder / "tokenizer.json").is_file():
            return folder
        if (folder / "checkpoints").is_dir():
            break
    raise CheckpointError(f"{source} holds no tokenizer.json; a run of train.py writes one")
