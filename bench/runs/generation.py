"""Speed of greedy generation on a CPU: `python -m tritium.bench generation`.

`Transformer.generate`, with its cache and without, and transformers' `generate` of the same weights
continue one prompt, in turns. All must write the same tokens. What is measured is the CPU time of
the process, which other work on the machine slows less than the clock's; each round gives the
ratio of what was measured one after the other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tritium.bench import tables
from tritium.bench.ends import FailedError, as_wrong_input, at_least
from tritium.bench.harness import device_name
from tritium.model import ModelConfig, Transformer

RESULTS = "generation.md"  # in the folder of results
WIDTH = 110
MODEL = ModelConfig(
    vocab_size=16384, n_layers=6, d_model=576, n_heads=9, n_kv_heads=3, max_seq_len=512
)
CACHED, PEER = "Transformer.generate", "transformers' generate"


def main(
    rounds: int = 5, prompt: int = 64, tokens: int = 96, uncached: bool = False,
    shape: str | None = None, write: bool = False,
) -> None:  # fmt: skip
    """Generate in turns, and print the tokens per second of CPU time.

    Args:
        rounds: how many times each generates.
        prompt: tokens of the prompt.
        tokens: how many are generated.
        uncached: generate without a cache too, which takes several times as long.
        shape: name of a shape of `tritium.model.shapes`. None: 30.7M parameters, 6 layers of width
            576, 9 heads of 3 groups.
        write: keep the table in generation.md in the folder of results.
    """
    at_least(1, rounds=rounds, prompt=prompt, tokens=tokens)
    torch.manual_seed(1)
    with as_wrong_input(ValueError):
        config = MODEL if shape is None else ModelConfig.named(shape)
    model = Transformer(config).eval()
    given = torch.randint(model.config.vocab_size, (1, prompt))
    calls = {CACHED: lambda: model.generate(given, tokens, temperature=0)}
    if uncached:
        calls["the same without a cache"] = lambda: _uncached(model, given, tokens)
    calls[PEER] = _peer(model, given, tokens)
    rates = _measured(calls, rounds, tokens)
    table = Table("", "tokens per CPU second", "median", "of transformers'")
    for name, found in rates.items():
        shares = [x / y for x, y in zip(found, rates[PEER], strict=True)]
        table.add_row(
            name, ", ".join(f"{x:.1f}" for x in found), f"{median(found):.1f}",
            f"{median(shares):.2f}",
        )  # fmt: skip
    options = f"--rounds {rounds}{' --uncached' * uncached}{f' --shape {shape}' if shape else ''}"
    import transformers

    head = (
        f"`python -m tritium.bench generation {options} --write`, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {device_name(model.device)}",
        f"{model.num_parameters() / 1e6:.1f}M parameters in float32; a prompt of {prompt} tokens, "
        f"{tokens} greedy ones, the same of all; last column: median of the rounds' ratios",
    )
    tables.present(
        head, table, width=WIDTH, write_to=tables.results() / RESULTS if write else None
    )  # fmt: skip


def _measured(
    calls: dict[str, Callable[[], Tensor]], rounds: int, tokens: int
) -> dict[str, list[float]]:
    """Return the tokens per CPU second of each call and round; every other round goes backwards."""
    first, *others = (call() for call in calls.values())
    for written in others:
        if not torch.equal(written, first):
            raise FailedError("generation: all must write the same tokens; the models differ")
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            began = time.process_time()
            calls[name]()
            rates[name].append(tokens / (time.process_time() - began))
    return rates


@torch.no_grad()
def _uncached(model: Transformer, given: Tensor, tokens: int) -> Tensor:
    for _ in range(tokens):
        last = model.logits(model.hidden(given)[:, -1:])
        given = torch.cat((given, last.argmax(-1)), dim=1)
    return given


def _peer(model: Transformer, given: Tensor, tokens: int) -> Callable[[], Tensor]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        theirs: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
    theirs.eval()
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(given), "max_new_tokens": tokens, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    return lambda: theirs.generate(given, **options)
