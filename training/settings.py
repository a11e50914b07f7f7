"""The settings of a training run, its presets, and shorter runs for little data.

These objects are inert: `tritium.training.command_line` makes them, `tritium.training.validation`
checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

import tyro

from tritium.data.corpus import INSTALLED
from tritium.data.tokenizer import CHARACTERS
from tritium.kernels.units import counted
from tritium.model.lora import Projection
from tritium.model.shapes import ShapeName
from tritium.model.transformer import ModelConfig
from tritium.training.memory.plan import MemoryConfig
from tritium.training.monitor.observer import ObserveConfig
from tritium.training.optim import OptimizerConfig
from tritium.training.precision import ComputeConfig
from tritium.training.recovery import RecoveryConfig
from tritium.training.run.saver import SaveConfig
from tritium.training.schedule import Length, Schedule

UNPREFIXED = tyro.conf.arg(name="")
EPOCHS = 20
"""Epochs after which a run of a preset's length ends, and above which any run warns."""
VALIDATIONS = 10  # of a shortened run, at least
WARM_UP = 10  # the warm-up takes at most one part in so many of a shortened run


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str | None = None
    """Text file, folder, .jsonl or .parquet to train on. None: Python's standard library."""
    text_field: str = "text"
    """Column of .jsonl and .parquet files that holds the text."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; or "characters", for tokens that are characters, the others spelled
    by their bytes. None: train one of model.vocab-size tokens on the data."""
    init_from: str | None = None
    """Begin with weights, shape and tokenizer of a run or of a folder in Hugging Face's layout."""
    lora_rank: int | None = None
    """Train low-rank adapters of that rank beside the weights of --init-from, which stay as they
    are. None: train all weights."""
    lora_alpha: float | None = None
    """Factor of the adapters' output, times lora-rank. None: lora-rank, for a factor of 1."""
    lora_layers: tuple[Projection, ...] = ()
    """Projections of each block that get an adapter. None given: all that the model has."""
    out: str | None = None
    """Run folder to make. None: runs/PRESET-DATE-TIME."""
    resume: bool = False
    """Resume a run, with the settings of its config.json: --resume RUN."""
    resume_anyway: bool = False
    """Resume even if data, settings, code or device differ from those of the checkpoint."""
    seed: int = 1
    """Seed of weights, dropout and data order."""
    eval_every: int = 100
    """Steps between validations; the last step is always validated."""
    eval_tokens: int = 32768
    """Tokens per validation, the same ones every time, of one half of the validation documents. As
    many of the other half give the loss that the end of the run reports."""
    stop_after: int | None = None
    """End the run after so many validations in a row without a lower loss. None: at its length."""
    log_every: int = 1
    """Steps between readings of the losses; each makes the host wait for the GPU."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary, in training."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the loss, in training."""
    dropout: float = 0.0
    """Dropout probability of the outputs of attention and feed-forward layers, in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: a GPU if there is one."""
    threads: int = 0
    """CPU threads. 0: all that this process may use."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp", "tp"] = "auto"
    """Sharing of the work by the processes of torchrun. ddp: every one has the whole model. fsdp:
    every one has a part of each weight. hsdp: fsdp within groups. tp: groups share each product,
    fsdp between them. auto: under torchrun ddp if it fits in memory, else fsdp."""
    group_size: int | None = None
    """Processes of a group of --parallel hsdp or tp. None: those of one machine."""
    packing: Literal["contiguous", "documents"] = "contiguous"
    """Packing of sequences: contiguous text, or complete documents, each attending to itself."""
    length: Annotated[Length, UNPREFIXED] = field(
        default_factory=lambda: Length(max_steps=1000, max_epochs=EPOCHS)
    )
    """Length of the run."""
    schedule: Annotated[Schedule, UNPREFIXED] = field(default_factory=Schedule)
    """The learning rate."""
    optimizer: Annotated[OptimizerConfig, UNPREFIXED] = field(default_factory=OptimizerConfig)
    """The optimizer."""
    compute: Annotated[ComputeConfig, UNPREFIXED] = field(default_factory=ComputeConfig)
    """The arithmetic of a step."""
    saving: Annotated[SaveConfig, UNPREFIXED] = field(default_factory=SaveConfig)
    """The checkpoints."""
    recovery: Annotated[RecoveryConfig, UNPREFIXED] = field(default_factory=RecoveryConfig)
    """Recovery from losses that are not finite or far too high."""
    observing: Annotated[ObserveConfig, UNPREFIXED] = field(default_factory=ObserveConfig)
    """Monitoring of the run."""
    memory: Annotated[MemoryConfig, UNPREFIXED] = field(default_factory=MemoryConfig)
    """Memory: micro-batch size and activation checkpointing."""
    depth: int | None = None
    """Layers of a new run, from which follow width, heads, batch, learning rates, decay and length,
    unless a flag sets them. None: all as in the preset."""
    shape: ShapeName | None = None
    """Shape of the model by name, with the preset's vocabulary and context. None: the preset's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""

    def reshaped(self, name: str) -> TrainConfig:
        """Return these settings with a named shape, of the vocabulary and context that they have.

        Raises:
            ValueError: there is none of that name.
        """
        sizes = {"vocab_size": self.model.vocab_size, "max_seq_len": self.model.max_seq_len}
        return replace(self, model=replace(ModelConfig.named(name), **sizes))

    def decisive(self) -> dict:
        """Return the settings that decide a run's weights.

        Data, tokenizer and device are left out, because their content is compared instead, and so
        is the length, which may be changed at a resume.
        """
        kept = {name: value for name, value in asdict(self).items() if name not in FREE}
        return kept | {
            "micro_batch_size": self.memory.micro_batch_size,
            "lora_layers": list(self.lora_layers),  # as JSON has it
        }


FREE = {
    "data", "text_field", "tokenizer", "out", "resume", "resume_anyway", "saving", "eval_every",
    "stop_after", "log_every", "compute", "device", "threads", "parallel", "group_size",
    "observing", "memory", "length",
    "depth", "shape",  # which the model's fields say
}  # fmt: skip

GPT2 = TrainConfig(
    model=ModelConfig.named("qwen3-98m"),
    batch_size=64,
    memory=MemoryConfig(micro_batch_size=32),
    schedule=Schedule(warmup_steps=100),
    log_every=10,
    eval_tokens=131072,
    saving=SaveConfig(save_async=True),  # a best checkpoint of 1.2 GB every 100 steps
)

PRESETS = {
    "small": TrainConfig(
        # What learned most in three minutes (bench/LOG.md): 96 wide, not 256, as a model so small
        # sees more text; squared ReLU; heads that are sharp from the first step, and whose keys and
        # values know the token before.
        model=replace(
            ModelConfig.named("qwen3-small"),
            activation="relu_squared",
            qk_gain=2.0,
            token_shift=True,
        ),
        length=Length(max_steps=1320, max_epochs=EPOCHS),
        schedule=Schedule(learning_rate=1.7e-2, warmup_steps=30),
        optimizer=OptimizerConfig(name="muon", muon_learning_rate=3.4e-2, row_beta2=0.95),
        batch_size=8,
        eval_every=660,
    ),
    "characters": TrainConfig(
        tokenizer=CHARACTERS,
        model=ModelConfig(vocab_size=2048, d_model=128, max_seq_len=256, activation="relu_squared"),
        length=Length(max_steps=500, max_epochs=EPOCHS),
        schedule=Schedule(learning_rate=8e-3, warmup_steps=30),
        optimizer=OptimizerConfig(name="muon", muon_learning_rate=1.6e-2, row_beta2=0.95),
        batch_size=6,
        eval_every=250,
    ),
    "gpt2": GPT2,
    "gpu": replace(GPT2, data=INSTALLED, memory=MemoryConfig(micro_batch_size=16)),
    "tiny": TrainConfig(
        model=ModelConfig.named("qwen3-tiny"),
        batch_size=4,
        length=Length(max_steps=20, max_epochs=EPOCHS),
        schedule=Schedule(warmup_steps=5),
        eval_every=10,
        eval_tokens=1024,
        observing=ObserveConfig(sample_tokens=20),
        compute=ComputeConfig(precision="float32"),
    ),
}

ABOUT_PRESETS = {
    "small": "3 layers of width 96, 1,320 steps of Muon: minutes on two CPU cores; what a CPU gets",
    "characters": "4 layers of width 128, 500 steps of Muon, on characters: minutes on a CPU core",
    "gpt2": "12 layers of width 768, 1,000 steps of 65,536 tokens",
    "gpu": "some five minutes on the GPU at hand, on Python's installed packages; what a GPU gets",
    "tiny": "2 layers of width 64, 20 steps: seconds, to try flags",
}


def fit_to_data(
    config: TrainConfig, preset: str, n_tokens: int, epoch: float, log: Callable[[str], None]
) -> TrainConfig:
    """Convert the length of a run to steps; shorten a preset's length that would memorise the data.

    Args:
        config: the settings.
        preset: name of the preset; its intervals and warm-up are shortened with the run, chosen
            ones are kept.
        n_tokens: tokens of the training split, for the message.
        epoch: steps of an epoch.
        log: called with one line if there is little data.
    """
    length = config.length
    budget = length.budget(config.batch_size * config.model.max_seq_len, epoch)
    if budget.steps is None:
        return config
    fitted = replace(config, length=Length(max_steps=budget.steps))
    epochs = budget.steps / epoch
    if length.max_steps and length.max_epochs and budget.steps < length.max_steps:
        usual = PRESETS[preset]
        if config.eval_every == usual.eval_every:
            every = max(1, min(config.eval_every, budget.steps // VALIDATIONS))
            fitted = replace(fitted, eval_every=every)
        if config.schedule.warmup_steps == usual.schedule.warmup_steps:
            steps = min(config.schedule.warmup_steps, budget.steps // WARM_UP)
            fitted = replace(fitted, schedule=replace(config.schedule, warmup_steps=steps))
        log(
            f"Little data, {n_tokens:,} tokens, which the model will memorise: the run ends after "
            f"{counted(length.max_epochs, 'epoch')}, {counted(budget.steps, 'step')} instead of "
            f"{length.max_steps:,}; --max-epochs or --max-steps choose another length."
        )
    elif epochs > EPOCHS:
        log(
            f"Little data, {n_tokens:,} tokens, which are read {epochs:,.0f} times: the model will "
            "memorise them, and its validation loss rise; --max-epochs makes the run shorter."
        )
    return fitted
