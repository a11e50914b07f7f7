"""Train a transformer on text: python train.py [PRESET] [--flag value ...].

Without arguments it trains on the standard library of the running Python: on a CPU a small model,
in about three minutes on two cores; on a GPU one of GPT-2's size. Read it from `train` downward.

SIGTERM, SIGINT and SIGUSR1 finish the step and save; `main` lists the exit statuses.
"""

from __future__ import annotations

import errno
import gc
import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import tritium

tritium.require("train.py", "train", "tyro", "rich", "matplotlib", "datasets", "tokenizers")

gc.disable()  # imports leave little garbage; looking for it took 0.6 of the 2.1 s of --help

import torch

from tritium.data import LOADERS, DataError, Tokenizer, atomic, prepare
from tritium.data.verification import Verification
from tritium.model import ModelConfig, Transformer, lora
from tritium.training.command_line import parse, resume_command
from tritium.training.cuda_graph import training_step
from tritium.training.device import choose_device, describe, keep_freed_memory, set_threads
from tritium.training.evaluation import evaluate
from tritium.training.gc_pause import collected_on_request
from tritium.training.initial import copy_weights, shaped
from tritium.training.memory.plan import Planner
from tritium.training.memory.predict import Memory
from tritium.training.memory.retry import MemoryRetry
from tritium.training.monitor.display import Display, console, count, print_start, show_end
from tritium.training.monitor.observer import Observer
from tritium.training.monitor.plot import LossPicture
from tritium.training.monitor.prompts import beginnings
from tritium.training.monitor.terminal import tolerant_output
from tritium.training.monitor.throughput import Meter
from tritium.training.optim import set_rate
from tritium.training.recovery import Recovery, UnrecoverableError
from tritium.training.run.checkpoint import CheckpointError
from tritium.training.run.fingerprint import FingerprintError, code_version, require_same
from tritium.training.run.json_text import to_json
from tritium.training.run.random_state import seed
from tritium.training.run.run_folder import RunFolderError, RunLog, lock_folder
from tritium.training.run.run_state import RunState
from tritium.training.run.saver import SaveError, Saver
from tritium.training.self_check import check
from tritium.training.settings import TrainConfig, fit_to_data
from tritium.training.signals import StopRequest
from tritium.training.validation import ConfigError
from tritium.training.waiting import ThreadWaiting

gc.freeze()  # nor is what they made looked through later, or at the end
gc.enable()

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


def train(config: TrainConfig, preset: str, run: Path) -> bool:
    """Run a training from start, or from its last checkpoint, to its end.

    Args:
        config: the settings.
        preset: name of their preset, to be shown.
        run: the run folder, which nobody else uses.

    Returns:
        Whether it came to its end: False after a signal, which is saved and can be resumed.

    Raises:
        SaveError: the last step could not be saved.
        UnrecoverableError: training diverged and every recovery step was tried.
    """
    # Where it runs, and from which checkpoint.
    started = time.perf_counter()
    device = choose_device(config.device)
    saver = Saver(run / "checkpoints", config.saving, log=console.print)
    resume_from = saver.to_resume()
    if config.resume and resume_from is None:
        console.print(f"No checkpoint in {run} yet: starting from the beginning.")
    state = RunState(resume_from)
    threads = set_threads(config.threads or state.threads)
    if device.type == "cpu":
        keep_freed_memory()

    # Data, and the length that fits it.
    seed(config.seed)
    vocab_size = config.model.vocab_size
    folder = prepare(
        config.data, vocab_size=vocab_size, tokenizer=config.tokenizer, field=config.text_field
    )
    verification = Verification(folder)
    tokenizer = Tokenizer.load(folder)
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths)
    shape = config.model
    if config.init_from is None:  # else the model's vocabulary may be larger than the tokenizer's
        shape = replace(shape, vocab_size=tokenizer.vocab_size)
    config = replace(config, model=shape)
    memory_plan = MemoryRetry(make_planner(config, device), state.plan, console.print)
    loader, validation = (
        LOADERS[config.packing](
            folder, split, batch_size=size, length=shape.max_seq_len, seed=config.seed
        )
        for split, size in (
            ("train", config.batch_size),
            ("val", memory_plan.first.micro_batch_size),
        )
    )
    epoch = loader.n_windows / config.batch_size
    config = fit_to_data(config, preset, loader.n_tokens, epoch, console.print)
    tokens_per_step = config.batch_size * shape.max_seq_len
    budget = config.length.budget(tokens_per_step, epoch)

    # Model and optimizer.
    model = make_model(config, shape)
    if config.init_from is not None and resume_from is None:
        console.print(copy_weights(config.init_from, model))
    arithmetic = config.compute.apply(model, device)
    cast = arithmetic.cast
    optimizer = config.optimizer.make(
        model, learning_rate=config.schedule.learning_rate,
        record_norms=config.observing.records_norms,
    )  # fmt: skip
    if config.compute.self_check:
        check(
            model, optimizer, config.optimizer, batch=memory_plan.now.micro_batch_size,
            arithmetic=arithmetic, samples=config.observing.sample_tokens > 0,
            log=console.print,
        )  # fmt: skip
    recovery = Recovery(config.recovery, model, config.batch_size, console.print)

    # Resume: the same data, settings, code and machine, or a refusal.
    fingerprint = {
        "data": loader.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "config": config.decisive(),
        "machine": {"device": describe(device), "threads": threads}
        | config.compute.fingerprint(arithmetic),
        "code": code_version(),
    }
    step = 0
    if resume_from is not None:
        anyway = config.resume_anyway
        differences = require_same(state.fingerprint, fingerprint, resume_from, anyway=anyway)
        console.print(differences, end="")
        step = state.restore(
            loader, recovery, model, optimizer, device, anyway=anyway, same=not differences,
            log=console.print,
        )  # fmt: skip
        if state.budget not in (None, budget):
            console.print(f"The run lasts {budget} instead of {state.budget}.")

    # Files of the run, and its monitor.
    record = {
        "preset": preset, "vocab_size": vocab_size, "config": asdict(config),
        "fingerprint": fingerprint,
    }  # fmt: skip
    atomic.write(run / "config.json", f"{to_json(record, indent=2)}\n")
    tokenizer.save(run / "tokenizer.json")
    n_rollbacks = len(recovery.went_back)
    log = RunLog(run / "log.jsonl", step, console.print, n_rollbacks)
    prompts = config.observing.sample_prompt
    if config.observing.sample_tokens and not prompts:
        prompts = beginnings(validation.fixed_batches(config.eval_tokens), tokenizer)
    observer = Observer(
        run, config.observing, model, tokenizer, prompts, step, record, console.print, n_rollbacks
    )
    saver.on_failure = observer.save_failed
    print_start(config, preset, run, model, optimizer, loader, fingerprint["machine"], step, budget)
    meter = Meter(shape, tokens_per_step, device, arithmetic.dtype, lora.flops_added(model))
    console.print(meter)

    # One step.
    def gradients(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        def of_batch(micro_batch: int) -> torch.Tensor:
            return accumulate_gradients(model, batch, micro_batch, cast)

        return recovery.mark_spike(memory_plan.attempt(model, of_batch))

    redraws = config.dropout > 0 and config.memory.activation_checkpointing != "none"
    take_step = training_step(
        gradients, optimizer, graph=config.compute.cuda_graph and device.type == "cuda",
        redraws=redraws, log=console.print,
    )  # fmt: skip
    unread: list[dict] = []  # steps whose loss is still on the device
    used_before = state.seconds

    def seconds() -> float:
        return used_before + time.perf_counter() - started

    # The loop.
    picture = LossPicture(run / "loss.png", f"{run.name}: {count(model)}", console.print)
    display = Display(budget, step, seconds(), run.name, log.entries)
    with saver, observer, StopRequest() as stop, display, collected_on_request() as collect:
        meter.start()
        final, stopping = budget.spent(step, seconds()), False
        while not final and not stopping:
            lr = recovery.lr_factor * config.schedule.rate(step, budget, seconds())
            set_rate(optimizer, lr)
            observer.enable_norms(step + 1, optimizer)
            loss, grad_norm = take_step(loader.next_batch())
            step += 1
            observer.record_norms(step, optimizer)
            unread.append(
                {"step": step, "tokens": step * tokens_per_step, "epoch": round(loader.epoch, 4),
                 "loss": loss, "lr": lr, "grad_norm": grad_norm}
            )  # fmt: skip
            # Decided once: a signal that comes from here on stops after the next step.
            final, stopping = budget.spent(step, seconds()), stop.name is not None
            evaluates = final or step % config.eval_every == 0
            saves = final or stopping or step % config.saving.save_every == 0
            samples = observer.samples(step) and not final
            if not (evaluates or saves or samples or step % config.log_every == 0):
                continue

            # Where losses are read: the host waits for the device here alone.
            entries = read_losses(unread)
            recovery.detect_bad_steps(entries, loader.state()["windows"])
            meter.read(entries)
            if evaluates:
                batches = validation.fixed_batches(config.eval_tokens)
                entries[-1] |= evaluate(model, batches, byte_lengths, cast)
                val_loss = entries[-1]["val_loss"]
                best = state.best
                if math.isfinite(val_loss) and (best is None or val_loss < best["val_loss"]):
                    state.best = {"step": step, "val_loss": val_loss}
                    saves = saves or config.saving.keep_best
            log.append(entries)
            observer.log(entries)
            display.show(entries, seconds())
            if evaluates:
                picture.refresh(log.entries)
            if samples:
                observer.sample(step)
            if back := recovery.roll_back_if_due(saver, log, model, optimizer):
                (step, state.best), final, stopping = back, False, False
                observer.rewind(step, len(recovery.went_back))
            elif saves:
                log.sync()
                captured = state.capture(
                    loader, recovery, memory_plan, optimizer, device, seconds=seconds(),
                    budget=budget, fingerprint=fingerprint, threads=threads,
                )  # fmt: skip
                saver.save(
                    step, model, optimizer, captured, healthy=recovery.healthy(model, optimizer),
                    best_step=state.best["step"] if state.best else None,
                )  # fmt: skip
            verification.check()
            collect()
            unread = []
            meter.resume()
        if step:
            saver.finish(step)

    # The end.
    if not final:
        observer.stopped(step, stop.name or "")
        console.print(
            f"Stopped by {stop.name} after step {step:,}, which is saved in {run}. Resume it by\n"
            f"{resume_command(run)}"
        )
        return False
    picture.draw(log.entries)
    observer.draw(f"{run.name}: {count(model)}")
    show_end(run, log.entries, observer.sample(step), seconds())
    if state.best and state.best["step"] != step:
        console.print(
            f"Lowest validation loss: {state.best['val_loss']:.4f} nats per token, after step "
            f"{state.best['step']:,}"
        )
    return True


def make_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """Make the model of a shape, with the adapters that are trained, on the host."""
    model = Transformer(
        shape, dropout=config.dropout, label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        residual_dtype=torch.float32 if config.compute.residual == "float32" else None,
    )  # fmt: skip
    if config.lora_rank is not None:
        lora.adapt(model, config.lora_rank, config.lora_alpha, config.lora_layers)
    return model


def make_planner(config: TrainConfig, device: torch.device) -> Planner:
    """Make the planner of the memory of a step."""
    memory = Memory(
        lambda shape: config.compute.convert(make_model(config, shape)), config.model,
        config.optimizer, device, config.compute.product_dtype(device), config.batch_size,
    )  # fmt: skip
    return Planner(memory, config.memory)


def accumulate_gradients(
    model: Transformer, batch: tuple[torch.Tensor, ...], micro_batch: int,
    cast: AbstractContextManager,
) -> torch.Tensor:  # fmt: skip
    """Add the gradient of one batch; return its mean loss in nats per token, on the device.

    Each micro-batch is weighted by its share of the targets, so the result is the mean over the
    batch, however it is divided. Autocast converts each weight once, for all.
    """
    device = model.embedding.weight.device
    n_targets = (batch[1] >= 0).sum().clamp(min=1)  # on the host, except in a CUDA graph
    total = torch.zeros((), dtype=torch.float32, device=device)
    with cast:
        for inputs in zip(*(x.split(micro_batch) for x in batch), strict=True):
            share = (inputs[1] >= 0).sum() / n_targets
            loss = model(*(x.to(device, non_blocking=True) for x in inputs)) * share
            with torch.autocast(device.type, enabled=False):
                loss.backward()
            total += loss.detach()
    return total


def read_losses(unread: list[dict]) -> list[dict]:
    """Copy losses from the device to the host: the one place where the host waits for it."""
    return [
        {key: x.item() if isinstance(x, torch.Tensor) else x for key, x in entry.items()}
        for entry in unread
    ]


def show_plan(config: TrainConfig) -> None:
    """Print the memory plans that fit; data not prepared yet count by the vocabulary asked for."""
    given = config.tokenizer or config.data
    if given and (config.tokenizer or Path(given, "tokenizer.json").is_file()):
        vocab_size = Tokenizer.load(given).vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    make_planner(config, choose_device(config.device)).show(console.print)


@tolerant_output()
def main() -> None:
    """Run the command line.

    Exit status: 0 after the last step; 2 for a wrong input, with nothing changed; 70 if training
    diverged and every recovery step was tried; 74 if the run folder could not be written;
    75 after a signal, with the step saved, to be resumed; that of the signal if it killed the
    process, before the first step or as the second one.
    """
    run = Path()
    try:
        config, preset, run = parse(sys.argv[1:])
        config = shaped(config)
        if config.memory.plan:
            show_plan(config)
            return
        precision = config.compute.matmul_precision(choose_device(config.device))
        with lock_folder(run, resume=config.resume), ThreadWaiting(console.print), precision:
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
        print(f"train.py: {error}; make room, then: {resume_command(run)}", file=sys.stderr)
        sys.exit(74)
    except KeyboardInterrupt:
        print(f"\ntrain.py: stopped; to resume: {resume_command(run)}", file=sys.stderr)
        sys.exit(130)
    if not finished:
        sys.exit(75)


if __name__ == "__main__":
    main()
