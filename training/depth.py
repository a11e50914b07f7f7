"""Settings that follow from a depth: `train.py --depth N`.

    layers N, width 64 · N, heads of 64
    D = 20 · parameters                       tokens (Hoffmann et al.)
    B = B' · (D / D')^0.383                   batch, to a power of two of sequences (Bergsma et al.)
    η = η' · √(B / B') · √(width' / width)    learning rates (nanochat; Yang et al.)
    λ = λ' · (B / B') · (η' / η) · (D' / D)   decay: B / (η λ D) stays (Wang and Aitchison)

Values with a prime are those of the preset, at its own shape, batch and length. Parameters are
those that multiply a token: an embedding that is not also the output layer is left out. nanochat
has 64 columns of width for each layer too. It leaves Muon's rate as it is, because its Muon scales
a step to one spectral norm at every width ("original"); with "match_rms_adamw" that norm grows with
the root of the width, so the rate falls with it. None of this was tuned here, and the batch's
exponent, the decay and √B were found for AdamW.

Karpathy, nanochat, 2025, scripts/base_train.py. https://github.com/karpathy/nanochat
Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022.
https://arxiv.org/abs/2203.15556
Bergsma et al., "Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM Pre-training",
2025. https://arxiv.org/abs/2505.13738
Yang et al., "A Spectral Condition for Feature Learning", 2023. https://arxiv.org/abs/2310.17813
Wang, Aitchison, "How to Set AdamW's Weight Decay as You Scale Model and Dataset Size", 2024.
https://arxiv.org/abs/2405.13698
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import log2, sqrt

from tritium.model.shapes import num_parameters
from tritium.model.transformer import ModelConfig
from tritium.training.schedule import Length
from tritium.training.settings import EPOCHS, WARM_UP, TrainConfig

COLUMNS = 64  # of width for each layer, and of a head
TOKENS_PER_PARAMETER = 20
BATCH_EXPONENT = 0.383


def deep(model: ModelConfig, depth: int) -> ModelConfig:
    """Return the shape of so many layers, with everything else as `model` has it."""
    return replace(
        model, n_layers=depth, d_model=COLUMNS * depth, n_heads=depth, n_kv_heads=None, d_head=None,
        d_ff=None,
    )  # fmt: skip


def fit_to_depth(
    config: TrainConfig, usual: TrainConfig, given: Collection[str], *, power_of_two: bool = True
) -> TrainConfig:
    """Return settings whose length, batch, rates and decay follow from the shape.

    Args:
        config: the settings, of a shape that `deep` made.
        usual: those of the preset, as they are without a depth.
        given: flags on the command line, without dashes. What they set stays, and what follows from
            it follows from their value.
        power_of_two: whether the batch is one, of sequences. Else it is the nearest whole number,
            which runs of a ladder want: steps between powers would be steps of their losses.
    """
    context = config.model.max_seq_len
    usual_batch = usual.batch_size * usual.model.max_seq_len
    usual_steps = usual.length.max_steps or 1
    asked = config.length if {"max-steps", "max-tokens"} & {*given} else Length()

    # Tokens and batch, each of which may be given, or steps, their ratio.
    tokens = asked.max_tokens or TOKENS_PER_PARAMETER * parameters(config.model)
    growth = (tokens / (usual_steps * usual_batch)) ** BATCH_EXPONENT
    if asked.max_steps:
        growth = (asked.max_steps / usual_steps) ** (BATCH_EXPONENT / (1 - BATCH_EXPONENT))
    batch = config.batch_size
    if "batch-size" not in given:
        batch = growth * usual_batch / context
        batch = 2 ** max(0, round(log2(batch))) if power_of_two else max(1, round(batch))
    if asked.max_steps:
        tokens = asked.max_steps * batch * context
    steps = max(1, round(tokens / (batch * context)))
    length = Length(max_steps=steps, max_epochs=EPOCHS)
    if {"max-steps", "max-tokens", "max-epochs", "max-minutes"} & {*given}:
        length = config.length

    # Rates and decay, and a warm-up that is not most of a short run.
    larger = batch * context / usual_batch
    narrower = usual.model.d_model / config.model.d_model
    schedule, optimizer = config.schedule, config.optimizer
    if "learning-rate" not in given:
        lr = usual.schedule.learning_rate * sqrt(larger * narrower)
        schedule = replace(schedule, learning_rate=lr)
    if "warmup-steps" not in given:
        schedule = replace(schedule, warmup_steps=min(schedule.warmup_steps, steps // WARM_UP))
    muon = usual.optimizer.muon_learning_rate
    if "muon-learning-rate" not in given and muon and optimizer.muon_learning_rate:
        width = 1.0 if optimizer.adjust_lr_fn == "original" else narrower
        optimizer = replace(optimizer, muon_learning_rate=muon * sqrt(larger * width))
    if "weight-decay" not in given:
        before = muon or usual.schedule.learning_rate
        now = optimizer.muon_learning_rate or schedule.learning_rate
        longer = tokens / (usual_steps * usual_batch)
        decay = usual.optimizer.weight_decay * larger * (before / now) / longer
        optimizer = replace(optimizer, weight_decay=decay)
    return replace(
        config, batch_size=batch, length=length, schedule=schedule, optimizer=optimizer
    )  # fmt: skip


def described(config: TrainConfig) -> str:
    """Return a line that says what a run's depth has set."""
    muon = config.optimizer.muon_learning_rate
    rates = f"learning rate {config.schedule.learning_rate:.3g}"
    rates += "" if muon is None else f", Muon's {muon:.3g}"
    return (
        f"Depth {config.depth}: width {config.model.d_model}, steps of {config.batch_size} × "
        f"{config.model.max_seq_len:,} tokens, {rates}, weight decay "
        f"{config.optimizer.weight_decay:.3g}, warm-up of {config.schedule.warmup_steps} steps. "
        "Each given as a flag stays."
    )


def parameters(model: ModelConfig) -> int:
    """Return the parameters that multiply a token."""
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    return num_parameters(model) - embedding
