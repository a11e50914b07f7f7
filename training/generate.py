"""Sample text from a trained model: python -m tritium.training.generate RUN [--prompt TEXT ...]."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

import tritium
from tritium.data import DataError
from tritium.kernels.units import counted
from tritium.model.sampling import write_stream
from tritium.training.device import choose_device
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.trained import read


def main(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    interactive: bool = False,
    samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    cuda_graph: bool = True,
    checkpoint: Literal["best", "newest"] = "best",
) -> None:
    """Print, as it is sampled, how a trained model continues a prompt, up to the end of the text.

    The text goes to stdout, the tokens per second to stderr, and on a GPU whether a CUDA graph drew
    them.

    Args:
        run: folder of a run, of one checkpoint, or in Hugging Face's layout.
        prompt: text to continue; may be given several times. Without one a document begins.
        interactive: ask for prompts, a line each, until the input ends.
        samples: number of continuations of each prompt.
        max_new_tokens: length of a continuation, in tokens, at most.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities sum to p.
        min_p: sample among the tokens of at least p times the greatest probability.
        repetition_penalty: divides the logits of what is in the text already; 1 for none.
        seed: seed of a prompt's first continuation; each further one adds 1.
        device: device to sample on. auto: a GPU if there is one.
        cuda_graph: on a GPU replay a CUDA graph for each token behind a prompt, if there may be 64
            or more; they come in groups of 16.
        checkpoint: the one of a run with the lowest validation loss, if it was kept, or the newest.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    model, tokenizer = read(run, choose_device(device), checkpoint=checkpoint)
    rate = _Rate()
    for number, (text, own_seed) in enumerate(
        (text, seed + i)
        for text in (_asked() if interactive else prompt or ("",))
        for i in range(samples)
    ):
        if number:
            print("\n---")
        pieces = write_stream(
            model, tokenizer, text, max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=own_seed,
            on_token=rate.count, cuda_graph=cuda_graph, log=rate.note,
        )  # fmt: skip
        rate.begin()
        for piece in pieces:
            print(piece, end="", flush=True)
        rate.end()
        print(flush=True)
    print(rate, file=sys.stderr)


def _asked() -> Iterator[str]:
    """Yield the lines of the input as prompts; ask for each on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("\nprompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


class _Rate:
    """Tokens per second, without the time between samples."""

    def __init__(self):
        self._tokens, self._seconds, self._began = 0, 0.0, 0.0
        self._way: list[str] = []

    def begin(self) -> None:
        self._began = time.perf_counter()

    def count(self) -> None:
        self._tokens += 1

    def end(self) -> None:
        self._seconds += time.perf_counter() - self._began

    def note(self, line: str) -> None:
        """Take a line that says how tokens are drawn; the same one counts once."""
        self._way = [*dict.fromkeys((*self._way, line))]

    def __str__(self) -> str:
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return "; ".join((f"{counted(self._tokens, 'token')}, {rate:,.0f} tokens/s", *self._way))


if __name__ == "__main__":
    try:
        with tritium.interruptible(), tolerant_output():
            tyro.cli(main, prog="python -m tritium.training.generate")
    except (ValueError, DataError) as error:  # a checkpoint, or a sampling argument out of range
        print(f"tritium.training.generate: {error}", file=sys.stderr)
        sys.exit(2)
