"""Characters: the preset `characters` beside nanoGPT's CPU recipe.

    python -m tritium.bench characters

Both learn the same text, whose tokens are characters, on one thread each, one run after the other
for each seed. The recipe is that of nanoGPT's README for a CPU, as plain PyTorch: 4 layers of 4
heads, 128 wide, 64 characters of context, 2,000 steps of 12 sequences, no dropout; AdamW from 1e-3
to 1e-4 by a cosine behind 100 steps of warm-up, beta2 0.99, decay 0.1, gradients clipped to 1.
A tenth of the documents is held out. Losses are those of the half of it that nothing is chosen by,
in nats per character, each model with the context that it was trained with. The recipe's seconds
leave out start-up and validation, which those of the preset include.

Karpathy, nanoGPT, 2022. https://github.com/karpathy/nanoGPT
"""

import os
import resource
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi, sqrt
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table

from tritium.bench import tables
from tritium.bench.ends import as_wrong_input, at_least, split_flags, writable
from tritium.bench.harness import device_name
from tritium.bench.runs._trials import SCRIPT, UNSEEN, check_status, difference, once
from tritium.bench.runs.plain_gpt import PlainGPT
from tritium.data import DataError, Tokenizer, TokenLoader, prepare
from tritium.data.tokenizer import CHARACTERS
from tritium.training.run.run_folder import read_lines
from tritium.training.settings import PRESETS

PRESET = "characters"
RESULTS = f"{PRESET}.md"
WIDTH = 110
TEXT = 1_000_000  # characters of the text that is written
PIECE = 8_000  # characters of its documents, about
HELD_OUT = 0.1  # share of the documents, as nanoGPT's
LAYERS, HEADS, D_MODEL, LENGTH, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
WARM_UP, HIGH, LOW, BETAS, DECAY, CLIP = 100, 1e-3, 1e-4, (0.9, 0.99), 0.1, 1.0
WHOLE = 1 << 40  # tokens of a validation: all there are


@dataclass(frozen=True)
class Run:
    """One training of one of the two."""

    loss: float
    """Nats per character of the half of the validation documents to report by."""
    seconds: float
    """Wall-clock time."""
    processor: float
    """Processor time, which neighbours on the machine disturb less."""


def main(
    data: Path | None = None,
    seeds: int = 3,
    flags: str = "",
    out: Path = Path("runs/characters"),
    write: bool = False,
) -> None:
    """Train both on each seed, and show losses and times.

    Args:
        data: text file or folder. None: about 1 MB of Python's standard library, written to `out`.
        seeds: runs of each, from seed 0.
        flags: flags of train.py behind the preset.
        out: folder of the text and of the runs; those that ended there are not run again.
        write: keep the table as characters.md in the folder of results.
    """
    at_least(1, seeds=seeds)
    given = split_flags(flags)
    writable(out / RESULTS)
    torch.set_num_threads(1)
    text = write_text(out / "text") if data is None else data
    with as_wrong_input(DataError):
        folder = prepare(text, tokenizer=CHARACTERS, val_fraction=HELD_OUT)
    pairs = []
    for seed in range(seeds):
        key = f"{folder.manifest.key} {seed}"
        recipe = once(out, f"recipe {key}", partial(reference, folder, seed), Run)
        own = partial(preset, folder, seed, out, given)
        pairs.append((recipe, once(out, f"preset {key} {PRESETS[PRESET]} {flags}", own, Run)))
    asked = [f"--data {shlex.quote(str(data))}"] if data else []
    asked += [f"--seeds {seeds}"] + ([f"--flags {shlex.quote(flags)}"] if flags else [])
    sizes = {k: sum(x.tokens for x in v) for k, v in folder.manifest.splits.items()}
    lines = (
        f"`python -m tritium.bench characters {' '.join(asked)}`, torch {torch.__version__}, "
        f"{device_name(torch.device('cpu'))}",
        f"Nats per character of half of {sizes['val']:,} that neither has seen, after "
        f"training on {sizes['train']:,}; {folder.manifest.vocab_size} ids. The recipe is "
        "nanoGPT's.",
        _summary(pairs),
    )
    kept = tables.results() / RESULTS if write else None
    tables.present(lines, _table(pairs), width=WIDTH, write_to=kept)


def write_text(folder: Path) -> Path:
    """Write modules of the standard library, in the order of their names, and return the folder.

    They are cut after whole lines, so that there are enough documents to hold some back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    length = 0
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        pieces = [""]
        for line in module.read_text(encoding="utf-8", errors="replace").splitlines(True):
            if len(pieces[-1]) >= PIECE:
                pieces.append("")
            pieces[-1] += line
        for i, text in enumerate(pieces):
            file = folder / f"{module.stem}-{i}.txt"
            if not file.exists() or file.read_text(encoding="utf-8") != text:  # else: as it was
                file.write_text(text, encoding="utf-8")
        length += sum(map(len, pieces))
        if length >= TEXT:
            break
    return folder


def reference(folder: str | os.PathLike[str], seed: int, steps: int = STEPS) -> Run:
    """Train nanoGPT's recipe on the folder that `prepare` returned."""
    torch.manual_seed(seed)
    vocab_size = Tokenizer.load(folder).vocab_size
    loader = TokenLoader(folder, "train", batch_size=BATCH, length=LENGTH, seed=seed)
    model = PlainGPT(vocab_size, LENGTH, LAYERS, D_MODEL, HEADS)
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "feed_forward.3.weight")):
            torch.nn.init.normal_(p, std=0.02 / sqrt(2 * LAYERS))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
    )
    with _timed() as took:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps)
            model(*loader.next_batch()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    nats = n = 0
    with torch.no_grad():
        held_out = TokenLoader(folder, "val", batch_size=64, length=LENGTH, half="report")
        for tokens, targets in held_out.fixed_batches(WHOLE):
            nats += model(tokens, targets).item() * targets.numel()
            n += targets.numel()
    return Run(nats / n, *took)


def preset(folder: str | os.PathLike[str], seed: int, out: Path, flags: list[str]) -> Run:
    """Train the preset `characters` by train.py, in a process of its own."""
    run = out / f"preset-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [
        sys.executable, SCRIPT, PRESET, "--data", folder, "--seed", seed, "--out", run,
        "--threads", 1, "--device", "cpu", "--eval-tokens", WHOLE, *UNSEEN, *flags,
    ]  # fmt: skip
    log = run.with_suffix(".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said, _timed(resource.RUSAGE_CHILDREN) as took:
        status = subprocess.run([*map(str, command)], stdout=said, stderr=said).returncode
    check_status(status, log, f"seed {seed}")
    last = next(x for x in reversed(read_lines(run / "log.jsonl")) if "report_loss" in x)
    return Run(last["report_loss"], *took)


def _rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return HIGH * (step + 1) / (WARM_UP + 1)
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LOW + (HIGH - LOW) * (1 + cos(pi * progress)) / 2


@contextmanager
def _timed(who: int = resource.RUSAGE_SELF) -> Iterator[list[float]]:
    """Give a list that holds wall-clock and processor time in seconds once it is left."""

    def used() -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    took: list[float] = []
    begin, before = time.perf_counter(), used()
    yield took
    took += time.perf_counter() - begin, used() - before


def _table(pairs: list[tuple[Run, Run]]) -> Table:
    table = Table("seed", "recipe", "preset", "difference", "recipe s", "preset s",
                  "recipe CPU s", "preset CPU s")  # fmt: skip
    for seed, (theirs, own) in enumerate(pairs):
        table.add_row(
            str(seed), f"{theirs.loss:.4f}", f"{own.loss:.4f}", f"{own.loss - theirs.loss:+.4f}",
            f"{theirs.seconds:.1f}", f"{own.seconds:.1f}", f"{theirs.processor:.1f}",
            f"{own.processor:.1f}",
        )  # fmt: skip
    return table


def _summary(pairs: list[tuple[Run, Run]]) -> str:
    apart, half = difference([x.loss for _, x in pairs], [x.loss for x, _ in pairs])
    interval = "" if len(pairs) < 2 else f" ± {half:.4f} (95 % interval of the mean)"
    share = mean(x.processor for _, x in pairs) / mean(x.processor for x, _ in pairs)
    return f"Difference {apart:+.4f}{interval} nats, in {share:.2f} of the recipe's processor time."
