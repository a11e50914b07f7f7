"""Train a transformer on text: python train.py [PRESET] [--flag value ...].

Without arguments it trains on the standard library of the running Python: on a CPU a small model,
in about three minutes on two cores; on a GPU one of GPT-2's size. Read it from `train` downward.

SIGTERM, SIGINT and SIGUSR1 finish the step and save; `main` lists the exit statuses.
"""

from __future__ import annotations

import tritium  # before all else: Ctrl-C ends the imports without a traceback

tritium.require("train.py", "train", "tyro", "rich", "matplotlib", "datasets", "tokenizers")

import errno
import gc
import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

gc.disable()  # imports leave little garbage; looking for it took 0.6 of the 2.1 s of --help

import torch
import torch.nn.functional as F

from tritium.data import LOADERS, DataError, Tokenizer, atomic, prepare
from tritium.data.json_text import to_json
from tritium.data.shards import open_prepared
from tritium.data.tokenizer import CHARACTERS
from tritium.data.verification import Verification
from tritium.model import ModelConfig, Transformer, lora
from tritium.training.card import Card, fit_to_card
from tritium.training.command_line import next_command, parse, resume_command
from tritium.training.cuda_graph import training_step
from tritium.training.depth import described
from tritium.training.device import (
    choose_device,
    describe,
    free_memory,
    keep_freed_memory,
    set_threads,
)
from tritium.training.evaluation import evaluate, kept_model, stalled
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
from tritium.training.monitor.throughput import Meter, matrix_rate
from tritium.training.optim import set_rate
from tritium.training.parallel import ALONE, Parallel, arguments, opened
from tritium.training.recovery import Recovery, UnrecoverableError, check_end
from tritium.training.run.checkpoint import CheckpointError
from tritium.training.run.fingerprint import FingerprintError, code_version, require_same
from tritium.training.run.random_state import seed
from tritium.training.run.ranks import LostRankError, recorded, speaker
from tritium.training.run.run_folder import RunFolderError, RunLog
from tritium.training.run.run_state import RunState
from tritium.training.run.saver import SaveError, Saver
from tritium.training.self_check import check
from tritium.training.settings import PRESETS, TrainConfig, fit_to_data
from tritium.training.signals import StopRequest
from tritium.training.validation import ConfigError
from tritium.training.waiting import ThreadWaiting

gc.freeze()  # nor is what they made looked through later, or at the end
gc.enable()

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


def train(
    config: TrainConfig, preset: str, run: Path, files: Path, parallel: Parallel = ALONE
) -> bool:
    """Run a training from start, or from its last checkpoint, to its end.

    Args:
        config: the settings.
        preset: name of their preset, to be shown.
        run: the run folder, which nobody else uses.
        files: where this process writes: the run folder, or on other ranks than the first a
            temporary one.
        parallel: how the processes of the run share it.

    Returns:
        Whether it came to its end: False after a signal, which is saved and can be resumed.

    Raises:
        SaveError: the last step could not be saved.
        UnrecoverableError: training diverged, and nothing helped.
    """
    # Where it runs, and from which checkpoint.
    started = time.perf_counter()
    device, ranks = choose_device(config.device), parallel.ranks
    saver = Saver(run / "checkpoints", config.saving, log=console.print, ranks=ranks)
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
    with ranks.first_before_others():
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
    alone = device.type == "cuda" and ranks.size == 1
    if preset == "gpu" and alone and not config.resume and config.depth is None:
        text = open_prepared(folder).manifest.splits["train"]
        rate = matrix_rate(device, config.compute.product_dtype(device))
        card = Card(rate, memory=free_memory(device))
        tokens = sum(shard.tokens for shard in text)
        config, fitted = fit_to_card(config, PRESETS[preset], card, tokens)
        console.print(fitted)
        shape = config.model
    share = parallel.data  # of the ranks in each batch
    memory_plan = MemoryRetry(make_planner(config, device, share.size), state.plan, console.print)
    make_loader = partial(
        LOADERS[config.packing], length=shape.max_seq_len, seed=config.seed, **share.place
    )
    loader = make_loader(folder, "train", batch_size=config.batch_size // share.size)
    validation, reported = (
        make_loader(folder, "val", batch_size=memory_plan.first.micro_batch_size, half=half)
        for half in ("choose", "report")
    )
    epoch = loader.n_windows / config.batch_size
    config = fit_to_data(config, preset, loader.n_tokens, epoch, console.print)
    if config.depth is not None:
        console.print(described(config))
    tokens_per_step = config.batch_size * shape.max_seq_len
    budget = config.length.budget(tokens_per_step, epoch)

    # Model and optimizer.
    model = make_model(config, shape)
    if config.init_from is not None and resume_from is None:
        console.print(copy_weights(config.init_from, model))
    arithmetic = config.compute.apply(model, device, plain=not parallel.alone)
    cast = arithmetic.cast
    if config.compute.self_check:
        check(
            model, config.optimizer.make(model), config.optimizer,
            batch=memory_plan.now.micro_batch_size, arithmetic=arithmetic,
            samples=config.observing.sample_tokens > 0, log=console.print,
        )  # fmt: skip
    parallel.wrap(model, arithmetic)
    optimizer = config.optimizer.make(
        model, learning_rate=config.schedule.learning_rate,
        record_norms=config.observing.records_norms,
    )  # fmt: skip
    recovery = Recovery(config.recovery, model, config.batch_size, console.print)

    # Resume: the same data, settings, code and machine, or a refusal.
    fingerprint = {
        "data": loader.fingerprint,
        "validation": validation.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "config": config.decisive(),
        "machine": {"device": describe(device), "threads": threads}
        | config.compute.fingerprint(arithmetic),
        "code": code_version(),
    }
    step, forgotten = 0, ""
    if resume_from is not None:
        anyway = config.resume_anyway
        differences = require_same(state.fingerprint, fingerprint, resume_from, anyway=anyway)
        console.print(differences, end="")
        step = state.restore(
            loader, recovery, model, optimizer, device, anyway=anyway, same=not differences,
            log=console.print,
        )  # fmt: skip
        forgotten = state.forget_best(fingerprint)
        if state.budget not in (None, budget):
            console.print(f"The run lasts {budget} instead of {state.budget}.")

    # Files of the run, and its monitor.
    record = {
        "preset": preset, "vocab_size": vocab_size, "config": asdict(config),
        "fingerprint": fingerprint, "folder": str(Path.cwd()),
    }  # fmt: skip
    atomic.write(files / "config.json", f"{to_json(record, indent=2)}\n")
    tokenizer.save(files / "tokenizer.json")
    n_rollbacks = len(recovery.went_back)
    log = RunLog(files / "log.jsonl", step, console.print, n_rollbacks)
    prompts = config.observing.sample_prompt
    if config.observing.sample_tokens and not prompts:
        prompts = beginnings(validation.fixed_batches(config.eval_tokens), tokenizer)
    observer = Observer(
        files, parallel.observing(config), model, tokenizer, prompts, step, record, console.print,
        n_rollbacks,
    )  # fmt: skip
    if forgotten:
        observer.forgot_best(step, forgotten)
    saver.on_failure = observer.save_failed
    print_start(config, preset, run, model, optimizer, loader, fingerprint["machine"], step, budget)
    if not parallel.alone:
        console.print(parallel)
    meter = Meter(shape, tokens_per_step, device, arithmetic.dtype, ranks.size,
                  lora.flops_added(model))  # fmt: skip
    console.print(meter)

    # One step.
    def gradients(batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        def of_batch(micro_batch: int) -> torch.Tensor:
            return accumulate_gradients(model, batch, micro_batch, cast, parallel)

        share.seed_step(config.seed, step)
        return recovery.mark_spike(parallel.attempt(memory_plan, model, of_batch))

    redraws = config.dropout > 0 and config.memory.activation_checkpointing != "none"
    take_step = training_step(
        gradients, optimizer, graph=config.compute.cuda_graph and device.type == "cuda",
        redraws=redraws, shared=not parallel.alone, log=console.print,
    )  # fmt: skip
    unread: list[dict] = []  # steps whose loss is still on the device
    used_before = state.seconds

    def seconds() -> float:
        own = used_before + time.perf_counter() - started
        return own if budget.seconds is None else ranks.most(own)

    def report(step: int) -> dict[str, float]:
        best_step = state.best["step"] if state.best and parallel.alone else step
        kept, of_step = kept_model(model, run, step, best_step)
        batches = reported.fixed_batches(config.eval_tokens)
        found = evaluate(kept, batches, byte_lengths, cast, share.sum, "report")
        parallel.reshard(model)
        return found | {"report_step": of_step}

    def training_text(val_loss: float) -> dict[str, float]:
        batches = loader.fixed_batches(config.eval_tokens)
        rows = memory_plan.now.micro_batch_size
        parts = (part for x in batches for part in zip(*(y.split(rows) for y in x), strict=True))
        found = evaluate(model, parts, byte_lengths, cast, share.sum, "train")
        parallel.reshard(model)
        return found | {"gap": val_loss - found["train_loss"]}

    # The loop.
    picture = LossPicture(files / "loss.png", f"{run.name}: {count(model)}", console.print)
    display = Display(budget, step, seconds(), run.name, log.entries)
    with saver, observer, StopRequest(ranks) as stop, display, collected_on_request() as collect:
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
            final, stopping = budget.spent(step, seconds()), stop.requested()
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
                entries[-1] |= evaluate(model, batches, byte_lengths, cast, share.sum)
                parallel.reshard(model)
                val_loss = entries[-1]["val_loss"]
                if loader.epoch > 1:  # before, a step's own loss is of text that is new to it
                    entries[-1] |= training_text(val_loss)
                best = state.best
                if math.isfinite(val_loss) and (best is None or val_loss < best["val_loss"]):
                    state.best = {"step": step, "val_loss": val_loss}
                    saves = saves or config.saving.keep_best
                if config.stop_after and state.best:
                    since = stalled([*log.entries, *entries], state.best["step"])
                    final = final or since >= config.stop_after
                    saves = saves or final
                if final:
                    entries[-1] |= report(step)
            log.append(entries)
            observer.log(entries)
            display.show(entries, seconds())
            if evaluates:
                picture.refresh(log.entries)
            if samples:
                observer.sample(step)
            if back := recovery.roll_back_if_due(saver, log, model, optimizer, fingerprint):
                (step, state.best), final, stopping = back, False, False
                observer.rewind(step, len(recovery.went_back))
            elif saves:
                log.sync()
                captured = state.capture(
                    loader, recovery, memory_plan, optimizer, device, seconds=seconds(),
                    budget=budget, fingerprint=fingerprint, threads=threads,
                )  # fmt: skip
                healthy = parallel.healthy(recovery.healthy(model, optimizer))
                saver.save(
                    step, model, optimizer, captured, healthy=healthy,
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
    check_end(log.entries)
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


def make_planner(config: TrainConfig, device: torch.device, n_ranks: int = 1) -> Planner:
    """Make the planner of the memory of a step, on one of so many ranks."""
    memory = Memory(
        lambda shape: config.compute.convert(make_model(config, shape)), config.model,
        config.optimizer, device, config.compute.product_dtype(device),
        config.batch_size // n_ranks,
    )  # fmt: skip
    return Planner(memory, config.memory)


def accumulate_gradients(
    model: Transformer, batch: tuple[torch.Tensor, ...], micro_batch: int,
    cast: AbstractContextManager, parallel: Parallel = ALONE,
) -> torch.Tensor:  # fmt: skip
    """Add the gradient of one batch; return its mean loss in nats per token, on the device.

    Each micro-batch is weighted by its share of the targets, so the result is the mean over the
    batch, however it is divided, over ranks too. Autocast converts each weight once, for all.
    """
    device = model.embedding.weight.device
    # Counted for all micro-batches at once, on the host, except in a CUDA graph.
    counted = F.pad((batch[1] >= 0).sum(1), (0, -len(batch[1]) % micro_batch))
    counted = counted.view(-1, micro_batch).sum(1)
    shares = counted / parallel.data.sum(counted.sum()).clamp(min=1)
    total = torch.zeros((), dtype=torch.float32, device=device)
    micro_batches = [*zip(*(x.split(micro_batch) for x in batch), strict=True)]
    with cast:
        for i, (inputs, share) in enumerate(zip(micro_batches, shares, strict=True), 1):
            with parallel.micro_batch(model, last=i == len(micro_batches)) as forward:
                loss = forward(*(x.to(device, non_blocking=True) for x in inputs)) * share
                with torch.autocast(device.type, enabled=False):
                    parallel.backward(loss)
            total += loss.detach()
    return parallel.data.sum(total)


def read_losses(unread: list[dict]) -> list[dict]:
    """Copy losses from the device to the host: the one place where the host waits for it."""
    return [
        {key: x.item() if isinstance(x, torch.Tensor) else x for key, x in entry.items()}
        for entry in unread
    ]


def show_plan(config: TrainConfig) -> None:
    """Print the memory plans that fit; data not prepared yet count by the vocabulary asked for."""
    named = None if config.tokenizer == CHARACTERS else config.tokenizer
    given = named or config.data
    if given and (named or Path(given, "tokenizer.json").is_file()):
        vocab_size = Tokenizer.load(given).vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    make_planner(config, choose_device(config.device)).show(console.print)


@tolerant_output()
def main() -> None:
    """Run the command line.

    Exit status: 0 after the last step; 2 for a wrong input, with nothing changed; 69 if another
    rank is gone; 70 if training diverged and every recovery step was tried; 74 if the run folder
    could not be written; 75 after a signal, with the step saved, to be resumed; that of the signal
    if it killed the process, before the first step or as the second one.
    """
    run = None
    try:
        config, preset, run = parse(arguments(sys.argv[1:]))
        config = shaped(config)
        if config.memory.plan:
            show_plan(config)
            return
        precision = config.compute.matmul_precision(choose_device(config.device))
        exact = config.compute.determinism()
        with opened(config, run) as opening, ThreadWaiting(console.print), precision, exact:
            run, files, parallel = opening
            finished = train(config, preset, run, files, parallel)
    except (ConfigError, DataError, CheckpointError, FingerprintError, RunFolderError) as error:
        print(f"{speaker()}: {error}", file=sys.stderr)
        sys.exit(2)
    except UnrecoverableError as report:
        print(f"{speaker()}: {report}", file=sys.stderr)
        sys.exit(70)
    except (SaveError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        print(f"{speaker()}: {error}; make room, then: {next_command(run)}", file=sys.stderr)
        sys.exit(74)
    except LostRankError:
        sys.exit(69)
    except KeyboardInterrupt:
        print(f"\n{speaker()}: stopped; to resume: {next_command(run)}", file=sys.stderr)
        sys.exit(130)
    if not finished:
        sys.exit(75)


if __name__ == "__main__":
    with tritium.interruptible():
        recorded(main)()
