"""Sample text from a trained model: python -m tritium.training.generate RUN [--prompt TEXT ...]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tritium.data import DataError, Tokenizer
from tritium.model.sampling import write_stream
from tritium.model.transformer import Transformer
from tritium.training.device import choose_device
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.run.checkpoint import CheckpointError, newest


def main(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    prompt: tuple[str, ...] = ("",),
    samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Print, as it is sampled, how a trained model continues a prompt, up to the end of the text.

    Args:
        run: folder of a run, whose newest checkpoint is used, or of one checkpoint.
        prompt: one or more texts to continue. An empty one begins a document.
        samples: number of continuations of each prompt.
        max_new_tokens: length of a continuation, in tokens, at most.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to p.
        seed: seed of a prompt's first continuation; each further one adds 1.
        device: device to sample on. auto: a GPU if there is one.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    model = Transformer.load(run, choose_device(device))
    tokenizer = load_tokenizer(run)
    texts = [(text, seed + i) for text in prompt for i in range(samples)]
    for number, (text, own_seed) in enumerate(texts):
        if number:
            print("\n---")
        pieces = write_stream(
            model, tokenizer, text, max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=own_seed,
        )  # fmt: skip
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def load_tokenizer(run: Path) -> Tokenizer:
    """Return the tokenizer of a run, whose folder or whose checkpoint's folder is given.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (run, *newest(run).resolve().parents):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
        if (folder / "checkpoints").is_dir():
            break
    raise CheckpointError(f"{run} holds no tokenizer.json; a run of train.py writes one")


if __name__ == "__main__":
    try:
        with tolerant_output():
            tyro.cli(main, prog="tritium.training.generate")
    except (ValueError, DataError) as error:  # a checkpoint, or a sampling argument out of range
        print(f"tritium.training.generate: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
