"""Train a transformer on text: python train.py [PRESET] [--flag value ...].

Without arguments it trains on the standard library of the running Python: on a CPU a small model,
in about three minutes on two cores; on a GPU one of GPT-2's size. Read it from `train` downward.

SIGTERM, SIGINT and SIGUSR1 finish the step and save; `main` lists the exit statuses.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tritium

tritium.require("train.py", "train", "tyro", "rich", "matplotlib", "datasets", "tokenizers")

import torch
import tyro

from tritium.data import LOADERS, DataError, Loader, Tokenizer, atomic, prepare
from tritium.data.verification import Verification
from tritium.model import ModelConfig, Transformer
from tritium.training.cuda_graph import training_step
from tritium.training.device import choose_device, describe, keep_freed_memory, set_threads
from tritium.training.evaluation import evaluate
from tritium.training.gc_pause import collected_on_request
from tritium.training.memory.plan import MemoryConfig, Planner
from tritium.training.memory.predict import Memory
from tritium.training.memory.retry import Fallback
from tritium.training.monitor.display import Display, console, count, group_table, show_end
from tritium.training.monitor.observer import ObserveConfig, Observer
from tritium.training.monitor.plot import LossPicture
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.monitor.throughput import Meter
from tritium.training.optim import Optimizer, OptimizerConfig, set_rate
from tritium.training.precision import ComputeConfig
from tritium.training.recovery import Recovery, RecoveryConfig, UnrecoverableError, restore
from tritium.training.run import checkpoint, random_state
from tritium.training.run.checkpoint import CheckpointError
from tritium.training.run.fingerprint import FingerprintError, code_version, require_same
from tritium.training.run.json_text import to_json
from tritium.training.run.run_folder import RunFolderError, RunLog, claim
from tritium.training.run.saver import SaveConfig, SaveError, Saver
from tritium.training.schedule import Budget, Length, Schedule
from tritium.training.self_check import check
from tritium.training.signals import StopRequest
from tritium.training.waiting import ThreadWaiting

UNPREFIXED = tyro.conf.arg(name="")
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


class ConfigError(ValueError):
    """The command line asks for something that cannot be done."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str | None = None
    """Text file, folder, .jsonl or .parquet to learn from. None: Python's standard library."""
    text_field: str = "text"
    """Column of .jsonl and .parquet files that holds the text."""
    tokenizer: str | None = None
    """A tokenizer.json to use. None: learn one of model.vocab-size tokens from the data."""
    out: str | None = None
    """Run folder, made by the run. None: runs/PRESET-DATE-TIME."""
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    resume_anyway: bool = False
    """Resume although data, settings, code or device differ from those of the checkpoint."""
    seed: int = 1
    """Seed of the weights, of dropout and of the order of the data."""
    eval_every: int = 100
    """Steps from one validation to the next; the last step is always validated."""
    eval_tokens: int = 32768
    """Validation tokens, the same ones every time."""
    log_every: int = 1
    """Steps from one reading of the losses to the next; each stalls a GPU for a moment."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over the vocabulary, in training."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator in the loss, in training."""
    dropout: float = 0.0
    """Probability with which an element of a block's output is left out, in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: a GPU if there is one."""
    threads: int = 0
    """CPU threads. 0: as many as this process may use."""
    packing: Literal["contiguous", "documents"] = "contiguous"
    """What a sequence holds: text as it comes, or whole documents, each attending to itself."""
    length: Annotated[Length, UNPREFIXED] = field(default_factory=Length)
    """When the run ends."""
    schedule: Annotated[Schedule, UNPREFIXED] = field(default_factory=Schedule)
    """The learning rate."""
    optimizer: Annotated[OptimizerConfig, UNPREFIXED] = field(default_factory=OptimizerConfig)
    """The update of the parameters."""
    compute: Annotated[ComputeConfig, UNPREFIXED] = field(default_factory=ComputeConfig)
    """The arithmetic of a step."""
    saving: Annotated[SaveConfig, UNPREFIXED] = field(default_factory=SaveConfig)
    """The checkpoints."""
    recovery: Annotated[RecoveryConfig, UNPREFIXED] = field(default_factory=RecoveryConfig)
    """Losses that are not finite or far too high."""
    observing: Annotated[ObserveConfig, UNPREFIXED] = field(default_factory=ObserveConfig)
    """What is looked at."""
    memory: Annotated[MemoryConfig, UNPREFIXED] = field(default_factory=MemoryConfig)
    """What is kept of a step, so that it fits the device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""

    def __post_init__(self):
        for name in ("eval_every", "log_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("threads", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        self.memory.check(self.model.n_layers)
        redraws = self.dropout > 0 and self.memory.activation_checkpointing != "none"
        self.compute.check(choose_device(self.device), self.optimizer, redraws=redraws)

    def decisive(self) -> dict:
        """Return the settings that decide a run's weights.

        Data, tokenizer and device are left out: what they turn out to be is compared instead.
        """
        free = FREE if self.schedule.has_end else FREE | {"length"}
        kept = {name: value for name, value in asdict(self).items() if name not in free}
        return kept | {"micro_batch_size": self.memory.micro_batch_size}


FREE = {
    "data", "text_field", "tokenizer", "out", "resume", "resume_anyway", "saving", "eval_every",
    "log_every", "compute", "device", "threads", "observing", "memory",
}  # fmt: skip

PRESETS = {
    "small": TrainConfig(
        model=ModelConfig(n_layers=2, d_model=256, n_heads=4, max_seq_len=256),
        length=Length(max_steps=1500),
        schedule=Schedule(learning_rate=1.5e-3, warmup_steps=75),
        batch_size=4,
        eval_every=250,
    ),
    "gpt2": TrainConfig(
        model=ModelConfig(vocab_size=16384, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024),
        batch_size=64,
        memory=MemoryConfig(micro_batch_size=32),
        schedule=Schedule(warmup_steps=100),
        log_every=10,
        eval_tokens=131072,
    ),
    "tiny": TrainConfig(
        model=ModelConfig(
            vocab_size=512, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, max_seq_len=64
        ),
        batch_size=4,
        length=Length(max_steps=20),
        schedule=Schedule(warmup_steps=5),
        eval_every=10,
        eval_tokens=1024,
        observing=ObserveConfig(sample_tokens=20),
        compute=ComputeConfig(precision="float32"),
    ),
}


def train(config: TrainConfig, preset: str, run: Path) -> bool:
    """Run a training from start, or from its last checkpoint, to its end.

    Args:
        config: the settings.
        preset: their origin, to be shown.
        run: the run folder, which nobody else uses.

    Returns:
        Whether it came to its end: False after a signal, which is saved and can be resumed.

    Raises:
        SaveError: the last step could not be saved.
        UnrecoverableError: the losses went wrong and nothing helped.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    saver = Saver(run / "checkpoints", config.saving, report=console.print)
    last = saver.to_resume()
    if config.resume and last is None:
        console.print(f"No checkpoint in {run} yet: starting from the beginning.")
    saved = {} if last is None else checkpoint.read_record(last)["state"]
    threads = set_threads(config.threads or saved.get("threads", 0))
    if device.type == "cpu":
        keep_freed_memory()

    random_state.seed(config.seed)
    folder = prepare(
        config.data, vocab_size=config.model.vocab_size, tokenizer=config.tokenizer,
        field=config.text_field,
    )  # fmt: skip
    verification = Verification(folder)
    tokenizer = Tokenizer.load(folder)
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
    shape = replace(config.model, vocab_size=tokenizer.vocab_size)
    config = replace(config, model=shape)
    per_step = config.batch_size * shape.max_seq_len
    budget = config.length.budget(per_step)
    plan = Fallback(make_planner(config, device), saved.get("plan"), console.print)
    loader, validation = (
        LOADERS[config.packing](
            folder, split, batch_size=size, length=shape.max_seq_len, seed=config.seed
        )
        for split, size in (("train", config.batch_size), ("val", plan.first.micro_batch_size))
    )
    model = make_model(config, shape)
    arithmetic = config.compute.apply(model, device)
    cast = arithmetic.cast
    optimizer = config.optimizer.make(model, record_norms=config.observing.records_norms)
    if config.compute.self_check:
        check(
            model, optimizer, config.optimizer, batch=plan.now.micro_batch_size,
            arithmetic=arithmetic, samples=config.observing.sample_tokens > 0,
            report=console.print,
        )  # fmt: skip
    fingerprint = {
        "data": loader.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "config": config.decisive(),
        "machine": {"device": describe(device), "threads": threads}
        | config.compute.fingerprint(arithmetic),
        "code": code_version(),
    }
    recovery = Recovery(config.recovery, model, config.batch_size, console.print)
    step = 0
    if last is not None:
        differ = require_same(saved["fingerprint"], fingerprint, last, anyway=config.resume_anyway)
        console.print(differ, end="")
        same = not config.resume_anyway
        step, saved = restore(last, model, optimizer, device, same_model=same)
        go_to(loader, saved["loader"], anyway=config.resume_anyway)
        recovery.load_state(saved.get("recovery", {}), same_data=not differ)

    record = {"preset": preset, "config": asdict(config), "fingerprint": fingerprint}
    atomic.write(run / "config.json", f"{to_json(record, indent=2)}\n")
    tokenizer.save(run / "tokenizer.json")
    times = len(recovery.went_back)
    log = RunLog(run / "log.jsonl", step, console.print, times)
    observer = Observer(run, config.observing, model, tokenizer, step, record, console.print, times)
    saver.on_failure = observer.save_failed
    print_start(config, preset, run, model, optimizer, loader, fingerprint["machine"], step, budget)

    best, used_before = saved.get("best"), saved.get("seconds", 0.0)
    unread: list[dict] = []  # steps whose loss is still on the device
    meter = Meter(shape, per_step, device, arithmetic.dtype)
    console.print(meter)

    def gradients(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        def of_batch(micro_batch: int) -> torch.Tensor:
            return accumulate_gradients(model, batch, micro_batch, cast)

        return recovery.guard(plan.attempt(model, of_batch))

    take_step = training_step(
        gradients, optimizer, graph=config.compute.cuda_graph, report=console.print
    )

    def seconds() -> float:
        return used_before + time.perf_counter() - started

    picture = LossPicture(run / "loss.png", f"{run.name}: {count(model)}", console.print)
    display = Display(budget, step, seconds(), run.name, log.entries)
    with saver, observer, StopRequest() as stop, display, collected_on_request() as collect:
        meter.start()
        final, stopping = budget.spent(step, seconds()), False
        while not final and not stopping:
            lr = recovery.lr_factor * config.schedule.rate(step, budget, seconds())
            set_rate(optimizer, lr)
            observer.prepare(step + 1, optimizer)
            loss, grad_norm = take_step(loader.next_batch())
            step += 1
            observer.take(step, optimizer)
            unread.append(
                {"step": step, "tokens": step * per_step, "epoch": round(loader.epoch, 4),
                 "loss": loss, "lr": lr, "grad_norm": grad_norm}
            )  # fmt: skip
            # Decided once: a signal that comes from here on stops after the next step.
            final, stopping = budget.spent(step, seconds()), stop.name is not None
            evaluates = final or step % config.eval_every == 0
            saves = final or stopping or step % config.saving.save_every == 0
            samples = observer.samples(step) and not final
            if not (evaluates or saves or samples or step % config.log_every == 0):
                continue
            entries = read_losses(unread)
            recovery.judge(entries, loader.state()["windows"])
            meter.read(entries)
            if evaluates:
                batches = validation.fixed_batches(config.eval_tokens)
                entries[-1] |= evaluate(model, batches, byte_lengths, cast)
                val_loss = entries[-1]["val_loss"]
                if math.isfinite(val_loss) and (best is None or val_loss < best["val_loss"]):
                    best = {"step": step, "val_loss": val_loss}
                    saves = saves or config.saving.keep_best
            log.append(entries)
            observer.log(entries)
            display.show(entries, seconds())
            if evaluates:
                picture.refresh(log.entries)
            if samples:
                observer.sample(step)
            if back := recovery.climb(saver, log, model, optimizer):
                (step, best), final, stopping = back, False, False
                observer.rewind(step, len(recovery.went_back))
            elif saves:
                log.sync()
                state = {
                    "loader": loader.state(), "random": random_state.capture(device),
                    "seconds": seconds(), "best": best, "skipped": optimizer.skipped.item(),
                    "threads": threads, "plan": plan.state(), "fingerprint": fingerprint,
                    "recovery": recovery.state(),
                }  # fmt: skip
                saver.save(
                    step, model, optimizer, state, healthy=recovery.healthy(model, optimizer),
                    best_step=best["step"] if best else None,
                )  # fmt: skip
            verification.check()
            collect()
            unread = []
            meter.resume()
        if step:
            saver.finish(step)

    if not final:
        console.print(f"Stopped by {stop.name} after step {step:,}, which is saved in {run}.")
        return False
    picture.draw(log.entries)
    observer.draw(f"{run.name}: {count(model)}")
    show_end(run, log.entries, observer.sample(step), time.perf_counter() - started)
    return True


def make_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """Make the model of a shape, on the host."""
    return Transformer(
        shape, dropout=config.dropout, label_smoothing=config.label_smoothing, z_loss=config.z_loss
    )


def make_planner(config: TrainConfig, device: torch.device) -> Planner:
    """Make what knows how a step fits the device."""
    memory = Memory(
        lambda shape: config.compute.convert(make_model(config, shape)), config.model,
        config.optimizer, device, config.compute.product_dtype(device), config.batch_size,
    )  # fmt: skip
    return Planner(memory, config.memory)


def accumulate_gradients(
    model: Transformer, batch: tuple[torch.Tensor, ...], micro_batch: int,
    cast: AbstractContextManager,
) -> torch.Tensor:  # fmt: skip
    """Add the gradient of one whole batch; return its mean loss in nats per token, on the device.

    Each micro-batch counts by its share of the targets, so the means are those of the whole batch
    however it is cut.
    """
    device = model.embedding.weight.device
    n_targets = (batch[1] >= 0).sum().clamp(min=1)  # on the host, but in a CUDA graph
    total = torch.zeros((), dtype=torch.float32, device=device)
    for inputs in zip(*(x.split(micro_batch) for x in batch), strict=True):
        share = (inputs[1] >= 0).sum() / n_targets
        with cast:
            loss = model(*(x.to(device, non_blocking=True) for x in inputs)) * share
        loss.backward()
        total += loss.detach()
    return total


def read_losses(unread: list[dict]) -> list[dict]:
    """Turn what is still on the device into numbers: the one place where the host waits for it."""
    return [
        {key: x.item() if isinstance(x, torch.Tensor) else x for key, x in entry.items()}
        for entry in unread
    ]


def show_plan(config: TrainConfig) -> None:
    """Print what would fit; of data that is not prepared yet the vocabulary is as asked for."""
    given = config.tokenizer or config.data
    if given and (config.tokenizer or Path(given, "tokenizer.json").is_file()):
        vocab_size = Tokenizer.load(given).vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    make_planner(config, choose_device(config.device)).show(console.print)


def go_to(loader: Loader, position: dict, *, anyway: bool) -> None:
    """Put the loader where the checkpoint was; other data is begun at its start, if `anyway`."""
    try:
        loader.load_state(position)
    except DataError as error:
        if not anyway:
            raise
        console.print(f"The data is read from its beginning: {error}")


def print_start(
    config: TrainConfig, preset: str, run: Path, model: Transformer,
    optimizer: Optimizer, loader: Loader, machine: dict, step: int,
    budget: Budget,
) -> None:  # fmt: skip
    """Say what is about to run, and where."""
    batch = config.batch_size * model.config.max_seq_len
    length = f"{config.length.max_minutes} minutes, steps of {batch:,} tokens"
    if budget.steps is not None:
        epochs = budget.steps * config.batch_size / loader.n_windows
        length = f"{budget.steps:,} steps of {batch:,} tokens, {epochs:.2f} epochs"
    console.print(
        f"Preset {preset}: {count(model)}, {model.config.n_layers} layers of width "
        f"{model.config.d_model}, on {machine['device']}, {machine['threads']} threads, in "
        f"{machine['dtype'][6:]}\n"
        f"Data: {loader.n_tokens:,} tokens from {config.data or 'the Python standard library'}, "
        f"vocabulary {loader.vocab_size:,}\n"
        f"Length: {length}"
        + (f", resuming from step {step:,}, epoch {loader.epoch:.2f}" if step else "")
        + f"\nRun folder: {run}"
    )
    console.print(group_table(optimizer))


def parse(arguments: list[str]) -> tuple[TrainConfig, str, Path]:
    """Return the configuration that a command line asks for, its preset, and the run folder."""
    preset = "gpt2" if torch.cuda.is_available() else "small"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    try:
        config = tyro.cli(
            TrainConfig, prog=f"train.py {preset}", args=arguments, default=PRESETS[preset],
            description=f"Presets: {', '.join(PRESETS)}. Shown are the settings of {preset}.",
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.resume and config.out is None:
        raise ConfigError("--resume needs --out, the folder of the run to continue with")
    return config, preset, Path(config.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")


@tolerant_output()
def main() -> None:
    """Run the command line.

    Exit status: 0 after the last step; 2 for a wrong input, with nothing changed; 70 if the losses
    went wrong and nothing on the recovery ladder helped; 74 if the run folder could not be written;
    75 after a signal, with the step saved, to be resumed; that of the signal if it killed the
    process, before the first step or as the second one.
    """
    try:
        config, preset, run = parse(sys.argv[1:])
        if config.memory.plan:
            show_plan(config)
            return
        precision = config.compute.matmul_precision(choose_device(config.device))
        with claim(run, resume=config.resume), ThreadWaiting(console.print), precision:
            finished = train(config, preset, run)
    except (ConfigError, DataError, CheckpointError, FingerprintError, RunFolderError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except UnrecoverableError as report:
        print(f"train.py: {report}", file=sys.stderr)
        sys.exit(70)
    except (SaveError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        print(f"train.py: {error}; make room, then --resume", file=sys.stderr)
        sys.exit(74)
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; --resume resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if not finished:
        sys.exit(75)


if __name__ == "__main__":
    main()
