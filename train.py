"""Train a transformer on text: python train.py [PRESET] [--flag value ...].

Without arguments it trains on the standard library of the running Python: on a CPU a small model,
in about three minutes on two cores; on a GPU one of GPT-2's size. Read it from `train` downward.
"""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import triton
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from triton import knobs

from data import DataError, Tokenizer, TokenLoader, prepare
from data.shards import write_durably
from model import ModelConfig, Transformer, checkpoint
from model.optim import adamw, learning_rate

console = Console(highlight=False, soft_wrap=True)


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
    seed: int = 1
    """Seed of the weights and of the order of the data."""
    max_steps: int = 1000
    """Optimizer steps of the whole run."""
    save_every: int = 500
    """Steps from one checkpoint to the next; the last step is always saved."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    eval_every: int = 100
    """Steps from one validation to the next; the last step is always validated."""
    eval_tokens: int = 32768
    """Validation tokens, the same ones every time."""
    log_every: int = 1
    """Steps from one reading of the losses to the next; each stalls a GPU for a moment."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass, a divisor of batch_size; less memory. None: batch_size."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = 50
    """Steps in which the learning rate grows linearly to its peak."""
    final_lr: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decay of the weight matrices per step, in units of the learning rate."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down to it."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """What the forward pass keeps: everything, or each block's inputs only."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matrix products. auto: bfloat16 where the device multiplies it natively."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: a GPU if there is one."""
    threads: int = 0
    """CPU threads. 0: as many as this process may use."""
    sample_prompt: str = "def "
    """Text that the sample at the end goes on from."""
    sample_tokens: int = 200
    """Length of the sample, in tokens. 0: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""

    def __post_init__(self):
        for name in ("max_steps", "save_every", "keep_checkpoints", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 1 or self.micro_batch < 1 or self.batch_size % self.micro_batch:
            raise ConfigError(
                "micro_batch_size must divide batch_size, "
                f"got {self.micro_batch_size} for {self.batch_size}"
            )
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "final_lr", "threads", "sample_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


PRESETS = {
    "small": TrainConfig(
        model=ModelConfig(n_layers=2, d_model=256, n_heads=4, max_seq_len=256),
        batch_size=4,
        learning_rate=1.5e-3,
        max_steps=1500,
        warmup_steps=75,
        eval_every=250,
    ),
    "gpt2": TrainConfig(
        model=ModelConfig(vocab_size=16384, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024),
        batch_size=64,
        micro_batch_size=32,
        max_steps=1000,
        warmup_steps=100,
        log_every=10,
        eval_tokens=131072,
    ),
    "tiny": TrainConfig(
        model=ModelConfig(
            vocab_size=512, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, max_seq_len=64
        ),
        batch_size=4,
        max_steps=20,
        warmup_steps=5,
        eval_every=10,
        eval_tokens=1024,
        sample_tokens=20,
        precision="float32",
    ),
}


def train(config: TrainConfig, preset: str) -> Path:
    """Run a training from start, or from its last checkpoint, to end; return the run folder."""
    started = time.perf_counter()
    device = choose_device(config.device)
    run = run_folder(config, preset)
    last = resume_from(run) if config.resume else None
    saved = checkpoint.read_record(last)["state"] if last else {}
    threads = set_threads(config.threads or saved.get("threads", 0))

    torch.manual_seed(config.seed)
    folder = prepare(
        config.data, vocab_size=config.model.vocab_size, tokenizer=config.tokenizer,
        field=config.text_field,
    )  # fmt: skip
    tokenizer = Tokenizer.load(folder)
    shape = replace(config.model, vocab_size=tokenizer.vocab_size)
    loader, validation = (
        TokenLoader(
            folder, split, batch_size=config.micro_batch, length=shape.max_seq_len,
            seed=config.seed,
        )
        for split in ("train", "val")
    )  # fmt: skip
    model = Transformer(shape, activation_checkpointing=config.activation_checkpointing)
    model.to(device)
    optimizer = adamw(
        model, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
    dtype = choose_precision(config.precision, device)
    # What autocast leaves in float32 may be multiplied in bfloat16 too.
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    cast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    step = 0
    if last:
        step, saved = checkpoint.load(last, model, optimizer)
        loader.load_state(saved["loader"])
        restore_random_state(saved["random"])

    run.mkdir(parents=True, exist_ok=True)
    write_durably(run / "config.json", describe(config, preset, model, device, threads))
    tokenizer.save(run / "tokenizer.json")
    history = read_log(run / "log.jsonl", step)
    print_start(config, preset, run, model, loader, device, dtype, threads, step)

    per_step = config.batch_size * shape.max_seq_len
    unread: list[dict] = []  # steps whose loss is still on the device
    with (run / "log.jsonl").open("a") as log, Display(config.max_steps, step) as display:
        last_read = time.perf_counter()
        while step < config.max_steps:
            lr = learning_rate(
                step, peak=config.learning_rate, warmup_steps=config.warmup_steps,
                max_steps=config.max_steps, schedule=config.schedule, final=config.final_lr,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = accumulate_gradients(model, loader, cast, config, device)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            unread.append(
                {"step": step, "tokens": step * per_step, "loss": loss, "lr": lr,
                 "grad_norm": optimizer.grad_norm}
            )  # fmt: skip
            final = step == config.max_steps
            evaluates = final or step % config.eval_every == 0
            saves = final or step % config.save_every == 0
            if not (evaluates or saves or step % config.log_every == 0):
                continue
            entries = read_losses(unread)
            seconds = time.perf_counter() - last_read
            for entry in entries:
                entry["tokens_per_s"] = round(len(entries) * per_step / seconds)
            if evaluates:
                entries[-1] |= evaluate(model, validation, tokenizer, cast, config, device)
            for entry in entries:
                log.write(json.dumps(entry) + "\n")
            log.flush()
            history += entries
            display.show(entries[-1])
            if saves:
                os.fsync(log.fileno())
                state = {
                    "loader": loader.state(), "random": random_state(device), "threads": threads,
                    "config": asdict(config),
                }  # fmt: skip
                checkpoint.save(
                    run / "checkpoints", step, model, optimizer, state,
                    keep=config.keep_checkpoints,
                )  # fmt: skip
            unread, last_read = [], time.perf_counter()

    if any("val_loss" in entry for entry in history):  # not so if the log of a whole run is lost
        plot(history, run / "loss.png", f"{run.name}: {count(model)}")
    print_end(config, run, model, tokenizer, history, device, time.perf_counter() - started)
    return run


def accumulate_gradients(
    model: Transformer, loader: TokenLoader, cast: AbstractContextManager, config: TrainConfig,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Add the gradient of one whole batch; return its mean loss in nats per token, on the device.

    All micro-batches have the same number of tokens, so the mean of their means is exact.
    """
    parts = config.batch_size // config.micro_batch
    total = torch.zeros((), device=device)
    for _ in range(parts):
        tokens, targets = (x.to(device, non_blocking=True) for x in loader.next_batch())
        with cast:
            loss = model(tokens, targets) / parts
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: Transformer, validation: TokenLoader, tokenizer: Tokenizer,
    cast: AbstractContextManager, config: TrainConfig, device: torch.device,
) -> dict:  # fmt: skip
    """Measure the loss on the fixed validation tokens, in nats per token and in bits per byte."""
    lengths = torch.from_numpy(tokenizer.byte_lengths)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    for tokens, targets in validation.fixed_batches(config.eval_tokens):
        with cast:
            nats += model(tokens.to(device), targets.to(device)).double() * targets.numel()
        n_tokens += targets.numel()
        n_bytes += int(lengths[targets].sum())
    loss = nats.item() / n_tokens
    return {"val_loss": loss, "val_bits_per_byte": loss * n_tokens / n_bytes / math.log(2)}


def read_losses(unread: list[dict]) -> list[dict]:
    """Turn what is still on the device into numbers: the one place where the host waits for it."""
    return [
        {key: x.item() if isinstance(x, torch.Tensor) else x for key, x in entry.items()}
        for entry in unread
    ]


def choose_device(name: str) -> torch.device:
    """Return the device that the name stands for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU was found; use --device cpu, or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_threads(wanted: int) -> int:
    """Set the number of CPU threads: `wanted`, else as many cores as this process may use."""
    allowed = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    torch.set_num_threads(wanted or max(1, min(allowed, cgroup_cores())))
    return torch.get_num_threads()


def cgroup_cores() -> int:
    """Return the whole cores that a container's quota allows; every core where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or the quota is "max"
        return os.cpu_count() or 1


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products."""
    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return getattr(torch, name)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; Triton's interpreter has not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"}) and not knobs.runtime.interpret


def run_folder(config: TrainConfig, preset: str) -> Path:
    """Return the run's folder, or raise ConfigError if the run would overwrite another."""
    if config.resume and config.out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    run = Path(config.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"--out {run} is a file; name a folder")
    if not config.resume and run.exists() and any(run.iterdir()):
        raise ConfigError(
            f"--out {run} is not empty; pass --resume to go on with that run, or name a new folder"
        )
    return run


def resume_from(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None, which it says."""
    found = checkpoint.checkpoints(run / "checkpoints")
    if not found:
        console.print(f"No checkpoint in {run} yet: starting from the beginning.")
        return None
    return found[-1]


def random_state(device: torch.device) -> dict[str, str]:
    """Return the states of PyTorch's random number generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {k: base64.b64encode(x.numpy().tobytes()).decode() for k, x in states.items()}


def restore_random_state(states: dict[str, str]) -> None:
    """Undo `random_state`."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def read_log(path: Path, step: int) -> list[dict]:
    """Return the log up to `step`, and cut the file there: what came later is done again."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the line at which the process was killed
            break
    kept = [entry for entry in entries if entry["step"] <= step]
    write_durably(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return kept


def describe(
    config: TrainConfig, preset: str, model: Transformer, device: torch.device, threads: int
) -> bytes:
    """Return what `config.json` holds: every setting, and what the run ran on."""
    record = {
        "preset": preset,
        "config": asdict(config) | {"model": asdict(model.config)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return (json.dumps(record, indent=2) + "\n").encode()


class Display:
    """The line that shows how far the run is; without a terminal, one every ten seconds."""

    def __init__(self, max_steps: int, step: int):
        self.max_steps, self.first, self.started, self.printed = max_steps, step, 0.0, 0.0
        self.bar = Progress(
            BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), TextColumn("left"), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("first step ...", total=max_steps, completed=step)

    def __enter__(self) -> Display:
        self.bar.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def show(self, entry: dict) -> None:
        """Show a step's entry of the log."""
        text = (
            f"loss {entry['loss']:.3f} nats/token  lr {entry['lr']:.2e}  "
            f"grad norm {entry['grad_norm']:.2f}  {entry['tokens_per_s']:,} tokens/s"
        )
        self.bar.update(self.task, completed=entry["step"], description=text)
        now = time.perf_counter()
        if "val_loss" in entry:
            text += (
                f"  validation {entry['val_loss']:.3f} nats/token, "
                f"{entry['val_bits_per_byte']:.3f} bits/byte"
            )
        elif console.is_terminal or now - self.printed < 10:
            return
        left = (
            (now - self.started) / (entry["step"] - self.first) * (self.max_steps - entry["step"])
        )
        console.print(f"step {entry['step']}/{self.max_steps}  {text}  {clock(left)} left")
        self.printed = now


def print_start(
    config: TrainConfig, preset: str, run: Path, model: Transformer, loader: TokenLoader,
    device: torch.device, dtype: torch.dtype, threads: int, step: int,
) -> None:  # fmt: skip
    """Say what is about to run, and where."""
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads"
    )
    batch = config.batch_size * model.config.max_seq_len
    epochs = config.max_steps * batch / loader.n_tokens
    console.print(
        f"Preset {preset}: {count(model)}, {model.config.n_layers} layers of width "
        f"{model.config.d_model}, on {where}, in {str(dtype)[6:]}\n"
        f"Data: {loader.n_tokens:,} tokens from {config.data or 'the Python standard library'}, "
        f"vocabulary {loader.vocab_size:,}\n"
        f"Steps: {config.max_steps:,} of {batch:,} tokens, {epochs:.2f} epochs"
        + (f", going on from step {step:,}" if step else "")
        + f"\nRun folder: {run}"
    )


def print_end(
    config: TrainConfig, run: Path, model: Transformer, tokenizer: Tokenizer, history: list[dict],
    device: torch.device, seconds: float,
) -> None:  # fmt: skip
    """Show a sample and the result."""
    if config.sample_tokens:
        generator = torch.Generator(device).manual_seed(config.seed)
        prompt = torch.tensor([tokenizer.encode(config.sample_prompt) or [tokenizer.eot]])
        tokens = model.generate(
            prompt.to(device), config.sample_tokens, temperature=0.8, top_p=0.95,
            generator=generator,
        )  # fmt: skip
        console.rule("sample")
        console.print(tokenizer.decode(tokens[0].tolist()), markup=False)
        console.rule()
    measured = [entry for entry in history if "val_loss" in entry]
    if measured:
        console.print(
            f"Validation: {measured[-1]['val_loss']:.4f} nats per token, "
            f"{measured[-1]['val_bits_per_byte']:.4f} bits per byte, after {clock(seconds)}"
        )
    console.print(
        f"Run folder: {run} (loss.png, log.jsonl, config.json, tokenizer.json, checkpoints)"
    )


def plot(history: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [entry["step"] for entry in history]
    losses = [entry["loss"] for entry in history]
    smooth = list(moving_average(losses))
    measured = [entry for entry in history if "val_loss" in entry]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    axes.plot(
        [entry["step"] for entry in measured], [entry["val_loss"] for entry in measured],
        "o-", color="tab:orange", markersize=4, label="validation",
    )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    to_bits = measured[-1]["val_bits_per_byte"] / measured[-1]["val_loss"]
    bits = axes.secondary_yaxis("right", functions=(lambda y: y * to_bits, lambda y: y / to_bits))
    bits.set_ylabel("loss (bits per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=130, format="png")
    plt.close(figure)
    draft.rename(path)


def moving_average(values: list[float]) -> Iterator[float]:
    """Smooth exponentially, over about a twentieth of the values, without a bias at the start."""
    decay = 1 - 1 / max(1, len(values) / 20)
    mean = weight = 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        yield mean / weight


def clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes} min {seconds:02} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02} min"
    )


def count(model: Transformer) -> str:
    """Say how many parameters a model has."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"


def parse(arguments: list[str]) -> tuple[TrainConfig, str]:
    """Return the configuration that a command line asks for, and its preset's name."""
    preset = "gpt2" if torch.cuda.is_available() else "small"
    if arguments and not arguments[0].startswith("-"):
        preset, *arguments = arguments
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    config = tyro.cli(
        TrainConfig, prog=f"train.py {preset}", args=arguments, default=PRESETS[preset],
        description=f"Presets: {', '.join(PRESETS)}. Shown are the settings of {preset}.",
    )  # fmt: skip
    return config, preset


def main() -> None:
    """Run the command line; a wrong input ends in one sentence and exit status 2."""
    try:
        train(*parse(sys.argv[1:]))
    except (ConfigError, DataError, checkpoint.CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
