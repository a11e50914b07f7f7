"""Sample text from a finished run: python -m model.generate RUN [--prompt TEXT]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer

from . import checkpoint
from .checkpoint import CheckpointError
from .terminal import tolerant_output
from .transformer import Transformer


def main(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    prompt: str = "def ",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 1,
) -> None:
    """Print a continuation of the prompt by the newest checkpoint of a run.

    Args:
        run: the run's folder.
        prompt: text to go on from.
        max_new_tokens: length of the continuation, in tokens.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to p.
        seed: seed of the sampling.
    """
    model, tokenizer = load_run(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = tokenizer.encode(prompt).ids or [tokenizer.token_to_id("<|endoftext|>")]
    tokens = model.to(device).generate(
        torch.tensor([ids], device=device), max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    print(tokenizer.decode(tokens[0].tolist()))


def load_run(run: Path) -> tuple[Transformer, Tokenizer]:
    """Return the model of a run's newest checkpoint, and its tokenizer.

    Raises:
        CheckpointError: the folder holds no run, or one that is damaged.
    """
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found or not (run / "tokenizer.json").exists():
        raise CheckpointError(f"{run} holds no checkpoint; name the folder of a run of train.py")
    return checkpoint.load_model(found[-1]), Tokenizer.from_file(str(run / "tokenizer.json"))


if __name__ == "__main__":
    try:
        with tolerant_output():
            tyro.cli(main, prog="model.generate")
    except ValueError as error:  # CheckpointError, or a sampling argument out of its range
        print(f"model.generate: {error}", file=sys.stderr)
        sys.exit(2)
