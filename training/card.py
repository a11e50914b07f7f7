"""The default run of a GPU, fitted to its rate, its memory and the text at hand.

Five minutes are given. Of a few shapes the largest is taken that can see a token per parameter in
that time, and whose step fits the memory. What a step takes is known of one card: GPT-2 124M in
bfloat16 on an H100 took 121 ms for 65,536 tokens of 0.854 GFLOP, 58 % of the rate of a large
product, and held 8.7 and 13.6 GiB with 16 and 32 sequences in a micro-batch (bench/LOG.md). What is
chosen here for that card ran there for a minute, at 640K tokens/s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from tritium.kernels.units import quantity
from tritium.model.shapes import flops_per_token, num_parameters
from tritium.model.transformer import ModelConfig
from tritium.training.schedule import Length
from tritium.training.settings import EPOCHS, VALIDATIONS, WARM_UP, TrainConfig

SECONDS = 300.0
UTILIZATION = 0.5  # of the rate of a large product, with validations and the start
# Text that is read up to four times teaches nearly as much as new text does. Muennighoff et al.,
# "Scaling Data-Constrained Language Models", 2023. https://arxiv.org/abs/2305.16264
MOST_EPOCHS = 4
SHAPES = {768: (12, 12), 512: (8, 8), 384: (6, 6), 256: (4, 4)}
"""Layers and heads of each width, the largest first."""
BATCHES = 64, 32, 16, 8  # sequences of a step
LEAST_STEPS = 500  # fewer: a smaller batch
BYTES_PER_PARAMETER = 17  # weight, gradient, states, the copy to multiply by
BYTES_PER_FEATURE = 48  # of each token and block, kept for the backward pass
USABLE = 0.8  # of the memory that is free


@dataclass(frozen=True)
class Card:
    """A GPU, as far as it decides its default run."""

    rate: float
    """FLOP/s that a large matrix product reaches."""
    memory: int
    """Bytes that are free."""


def fit_to_card(
    config: TrainConfig, usual: TrainConfig, card: Card, corpus_tokens: int
) -> tuple[TrainConfig, str]:
    """Return the settings fitted to a card, and a line that says what was chosen and why.

    What was set otherwise than the preset has it stays: shape, batch, micro-batch, length,
    intervals. Without side effects, and the same for the same arguments.

    Args:
        config: the settings, with the vocabulary of the data's tokenizer.
        usual: those of the preset.
        card: the GPU.
        corpus_tokens: tokens of the training split.
    """
    length, V = config.model.max_seq_len, config.model.vocab_size
    free_length = config.length == usual.length
    own_shape = replace(config.model, vocab_size=usual.model.vocab_size) != usual.model
    shapes = [config.model] if own_shape else [_shaped(config.model, D) for D in SHAPES]
    fitting = (shape for shape in shapes if _suits(shape, card, corpus_tokens))
    shape = next(fitting, shapes[-1])
    tokens = _affordable(shape, card, corpus_tokens)
    batch = config.batch_size
    if batch == usual.batch_size:
        enough = (n for n in BATCHES if tokens >= LEAST_STEPS * n * length)
        batch = next(enough, BATCHES[-1])
    steps = max(1, int(tokens // (batch * length)))
    memory = config.memory
    if memory.micro_batch_size == usual.memory.micro_batch_size:
        most = min(batch, max(1, _sequences(shape, card)))
        even = max(n for n in range(1, most + 1) if batch % n == 0)
        memory = replace(memory, micro_batch_size=even)
    fitted = replace(config, model=shape, batch_size=batch, memory=memory)
    lasts = f"steps of {batch} × {length:,} tokens"
    if free_length:
        fitted = replace(fitted, length=Length(max_steps=steps, max_epochs=EPOCHS))
        epochs = steps * batch * length / corpus_tokens
        lasts = f"{steps:,} {lasts}, {epochs:.1f} epochs of {corpus_tokens:,}"
        if config.eval_every == usual.eval_every:
            every = max(1, min(config.eval_every, steps // VALIDATIONS))
            fitted = replace(fitted, eval_every=every)
        if config.schedule == usual.schedule:
            warmup = min(config.schedule.warmup_steps, steps // WARM_UP)
            fitted = replace(fitted, schedule=replace(config.schedule, warmup_steps=warmup))
    line = (
        f"Fitted to {quantity(card.rate, 'FLOP/s')} and {card.memory / 2**30:.1f} GiB, for some "
        f"{SECONDS / 60:.0f} minutes: {shape.n_layers} layers of width {shape.d_model} "
        f"({_parameters(shape) / 1e6:.0f}M parameters, vocabulary {V:,}), {lasts}, "
        f"micro-batches of {memory.micro_batch_size}. train.py gpt2 fits nothing."
    )
    return fitted, line


@cache
def _parameters(shape: ModelConfig) -> int:
    return num_parameters(shape)


def _shaped(model: ModelConfig, D: int) -> ModelConfig:
    layers, heads = SHAPES[D]
    return replace(model, n_layers=layers, d_model=D, n_heads=heads)


def _affordable(shape: ModelConfig, card: Card, corpus_tokens: int) -> float:
    """Return the tokens that a run may read."""
    in_time = SECONDS * UTILIZATION * card.rate / flops_per_token(shape)
    return min(in_time, MOST_EPOCHS * corpus_tokens)


def _sequences(shape: ModelConfig, card: Card) -> int:
    """Return how many sequences of a micro-batch fit the memory; 0 where none does."""
    left = USABLE * card.memory - BYTES_PER_PARAMETER * _parameters(shape)
    each = BYTES_PER_FEATURE * shape.n_layers * shape.d_model * shape.max_seq_len
    return max(0, int(left // each))


def _suits(shape: ModelConfig, card: Card, corpus_tokens: int) -> bool:
    enough = _affordable(shape, card, corpus_tokens) >= _parameters(shape)
    return enough and _sequences(shape, card) >= 1
