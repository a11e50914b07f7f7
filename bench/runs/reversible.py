"""Reversible models: rounding by depth, and loss of trained ones: `... bench reversible`.

The streams are run through every block and back. What comes out is compared with what went in, and
the gradients of the recomputed graph with those of the ordinary one, in the same precision: of a
fresh model, whose blocks add little, and of one whose blocks are not scaled down by depth. There
the streams grow far beyond the embedding, and what is small is reconstructed from what is large.

Then a small language model learns the bytes of Python's standard library, as in `bench residual`,
with one residual stream and with two, from the same seeds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least
from tritium.bench.harness import device_name
from tritium.bench.runs import low_precision, residual
from tritium.model import ModelConfig, Transformer
from tritium.model import reversible as reversible_file

RESULTS = "reversible.md"  # in the folder of results
WIDTH = 120
DEPTHS = 4, 8, 16, 32
CONFIG = ModelConfig(
    vocab_size=256, d_model=128, n_heads=4, n_kv_heads=2, max_seq_len=64, reversible=True
)
SEQUENCES = 4
PRECISIONS = {  # dtypes of the streams and of the products
    "float32": (torch.float32, torch.float32),
    "float32, products in bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


class Rounding(NamedTuple):
    """Relative errors at one depth."""

    streams: str
    depth: int
    embedding: float
    """The embedding, reconstructed from the last streams."""
    gradient: float
    """All gradients together, compared with those of the ordinary graph."""


def rounding(streams: str, depth: int, *, grown: bool) -> Rounding:
    """Measure one depth in one precision, of a fresh model or of one whose streams have grown."""
    dtype, products = PRECISIONS[streams]
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, n_layers=depth), residual_dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():  # the reverse of what `initialise` did
            if grown and name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                p.mul_(10 * (2 * depth) ** 0.5)
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES, CONFIG.max_seq_len))
    with torch.autocast("cpu", products, enabled=products != torch.float32):
        embedding = _embedding_error(model, tokens)
        found, wanted = (_gradient(model, tokens, recomputed=x) for x in (True, False))
    gradient = ((found - wanted).norm() / wanted.norm()).item()
    return Rounding(streams, depth, embedding, gradient)


@torch.no_grad()
def _embedding_error(model: Transformer, tokens: Tensor) -> float:
    x_BLD = model.embedding(tokens).to(model.residual_dtype)
    places = model.cos_LK, model.sin_LK, None
    halves = list(reversible_file.half_blocks(model.blocks, x_BLD, places, None, 0.0))
    a, b = x_BLD, x_BLD
    for half in halves:
        a, b = b, a + half(b)
    for half in reversed(halves):
        a, b = b - half(a), a
    return ((a.double() - x_BLD).norm() / x_BLD.double().norm()).item()


def _gradient(model: Transformer, tokens: Tensor, *, recomputed: bool) -> Tensor:
    with mock.patch.object(reversible_file, "sees_through", return_value=not recomputed):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([x.double().flatten() for x in gradients])


def roundings() -> Iterator[tuple[Rounding, Rounding]]:
    """Measure every depth in every precision: a fresh model, and one whose streams have grown."""
    for streams in PRECISIONS:
        for depth in DEPTHS:
            yield rounding(streams, depth, grown=False), rounding(streams, depth, grown=True)


def main(steps: int = 500, seeds: int = 3, write: bool = False) -> None:
    """Measure the rounding, on the CPU; train with one stream and with two; compare the losses.

    Args:
        steps: optimizer steps of each run.
        seeds: runs of each; two or more.
        write: keep both tables in reversible.md, in the folder of results.
    """
    if seeds < 2:
        raise WrongInputError(f"two seeds or more have a standard error, got {seeds}")
    at_least(1, steps=steps)
    kinds = ("fresh: embedding", "gradients", "grown: embedding", "gradients")
    rounded = Table("streams", "blocks", *kinds)
    for pair in roundings():
        errors = (f"{x:.1e}" for each in pair for x in (each.embedding, each.gradient))
        rounded.add_row(pair[0].streams, f"{pair[0].depth}", *errors)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, validation = low_precision.sequences()
    shape = residual.CONFIG
    makers: dict[str, Callable[[], Transformer]] = {
        name: partial(Transformer, replace(shape, reversible=x), residual_dtype=torch.float32)
        for name, x in (("one stream", False), ("reversible", True))
    }
    losses = residual.compare(makers, seeds, steps, (tokens.to(device), validation.to(device)))
    lines = [
        f"`python -m tritium.bench reversible --steps {steps} --seeds {seeds} --write`, torch "
        f"{torch.__version__}, {device_name(device)}",
        f"Relative errors, width {CONFIG.d_model}, {SEQUENCES} × {CONFIG.max_seq_len} tokens, of "
        "the embedding reconstructed from the last streams, and of all gradients, compared with "
        "the ordinary graph's, in the first table: of a fresh model, and of one whose blocks are "
        "not scaled down by depth, so that the streams grow far beyond the embedding.",
        f"Validation loss in nats per byte: {shape.n_layers} layers, {shape.d_model} wide, {steps} "
        f"steps of {residual.BATCH} sequences of {shape.max_seq_len} bytes, products in bfloat16, "
        "streams in float32.",
        residual.verdict(losses),
    ]
    path = tables.results() / RESULTS if write else None
    learned = residual.table_of("residual stream", losses)
    tables.present(lines, rounded, learned, width=WIDTH, write_to=path)
