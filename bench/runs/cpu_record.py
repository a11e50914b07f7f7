"""A frozen protocol for training on a CPU: `python -m tritium.bench cpu_record`.

    python -m tritium.bench cpu_record --write                            the preset `small`
    python -m tritium.bench cpu_record --write -- --learning-rate 8e-3    flags of train.py

Three minutes of train.py on two cores, from three seeds or more, on a text that checksums name
(`cpu_text`), give one entry (`cpu_entries`); docs/cpu.md has the rules and the table.

The clock is train.py's own, --max-minutes, which its schedule follows: it runs while the model is
made, during the steps and the validations between them. Learning the tokenizer and preparing the
text come before it, the last validation and the measurement after it. A change that makes steps
faster counts as much as one that learns more from each. Losses are bits per byte, which tokenizers
have in common, of the held-out documents, each alone, read in windows of the model's context of
which the second half counts, with the last weights.

The process is tied to two cores. Whether it had them is read from the scheduler, which counts for
each thread how long it ran and how long it waited for a core (/proc/PID/task/TID/schedstat), less
what a hypervisor took (/proc/stat). Processor time by wall-clock time would not say it: a step's
serial parts leave the second core idle on a machine that is free too.
"""

import os
import platform
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import tyro

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, as_wrong_input, at_least
from tritium.bench.runs import cpu_entries, cpu_text
from tritium.bench.runs._trials import SCRIPT, Trial, TrialError, once, processor_seconds
from tritium.bench.runs._trials import train as train_by_script
from tritium.bench.runs.cpu_entries import CORES, LEAST_SEEDS, PROTOCOL, SECONDS, Entry, Run
from tritium.data import DataError, prepare
from tritium.data.json_text import to_json
from tritium.data.tokenizer import CHARACTERS
from tritium.training.command_line import parse
from tritium.training.device import usable_cores
from tritium.training.evaluate import Score, nats_of
from tritium.training.monitor.throughput import matrix_rate
from tritium.training.run.fingerprint import code_version, differences
from tritium.training.settings import TrainConfig
from tritium.training.trained import read
from tritium.training.validation import ConfigError

MINUTES = f"{SECONDS / 60:g}"
DOCS = SCRIPT.parent / "docs"
PAGE, ENTRIES = "cpu.md", "cpu"
CODE = "kernels", "model", "data", "training", "tritium", "bench/runs", "train.py"
# Set by the protocol, all else is what an entry may change.
FIXED = {
    "data", "text_field", "init_from", "out", "resume", "resume_anyway", "seed", "device",
    "threads", "parallel", "group_size", "length", "saving", "observing",
}  # fmt: skip
CLEARED = (  # beginnings of variables that change threads, libraries or the path of kernels
    "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "ATEN_", "LD_PRELOAD",
    "TRITON_INTERPRET", "TRITIUM_REFERENCE",
)  # fmt: skip
POLL = 0.5  # seconds between two looks at the threads
STEAL = 8  # field of a line of /proc/stat, in ticks


def main(
    flags: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    name: str | None = None,
    preset: str = "small",
    seeds: int = LEAST_SEEDS,
    text: Path | None = None,
    out: Path = Path("runs/cpu_record"),
    write: bool = False,
    table: bool = False,
) -> None:
    """Train for three minutes on two cores from several seeds, and write the entry.

    Args:
        flags: flags of train.py behind the preset, after two dashes: -- --learning-rate 8e-3.
        name: a few words for the table. None: the preset.
        preset: preset of train.py.
        seeds: runs, from seed 0; three or more.
        text: library of CPython 3.11.7. None: that of the Python that runs.
        out: folder of text and runs; those of the same code and flags are not run again.
        write: keep the entry in docs/cpu, and its line in docs/cpu.md.
        table: run nothing, and write docs/cpu.md anew from the entries.
    """
    with as_wrong_input(ConfigError, DataError, cpu_entries.EntryError):
        if table:
            _write_page()
            return
        at_least(LEAST_SEEDS, seeds=seeds)
        entry = _entry(flags, name, preset, seeds, text, out)
        older = cpu_entries.load_all(DOCS / ENTRIES)
        if write:
            print(f"Entry: {cpu_entries.save(entry, DOCS / ENTRIES)}")
            _write_page()
    for x in entry.runs:
        print(
            f"seed {x.seed}: {x.bits_per_byte:.4f} bits per byte, {x.steps:,} steps in "
            f"{x.seconds:.1f} s with {x.share:.0%} of its cores"
        )
    print("{:.4f} ± {:.4f} bits per byte; ".format(*entry.loss), end="")
    print(cpu_entries.verdict(entry, older))


def _write_page() -> None:
    file = DOCS / PAGE
    found = cpu_entries.page(file.read_text(), cpu_entries.load_all(DOCS / ENTRIES))
    tables.write(file, found.encode())
    print(f"Table: {file}")


def _entry(
    flags: Sequence[str], name: str | None, preset: str, seeds: int, text: Path | None, out: Path
) -> Entry:
    own = "--device", "cpu", "--threads", str(CORES), "--max-minutes", MINUTES
    config, settings = asked(preset, own, flags)
    commit, uncommitted = _commit()
    cores = two_cores(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(CORES)
    library = Path(sysconfig.get_path("stdlib")) if text is None else text
    known, held_out = cpu_text.write_text(library, out / f"text-{PROTOCOL}", cpu_text.read_sums())
    prepared = prepare(known, vocab_size=config.model.vocab_size, tokenizer=config.tokenizer)
    cpu_text.check_split(prepared.manifest)
    given = (preset, "--data", str(known), *own, *flags)
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    what = to_json([PROTOCOL, code_version(), given, cpu_name(), cores])
    digest = sha256(what.encode()).hexdigest()[:12]
    runs = tuple(
        once(out, f"{digest} {seed}",
             partial(train, Trial(preset, given, seed), out / f"{digest}-{seed}", held_out), Run)
        for seed in range(seeds)
    )  # fmt: skip
    words = ["--name", name] if name else []
    words += ["--preset", preset, "--seeds", str(seeds)]
    words += ["--", *flags] if flags else []
    return Entry(
        protocol=PROTOCOL, date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        name=name or preset, commit=commit, uncommitted=uncommitted, cpu=cpu_name(),
        products_per_s=rate,
        versions={x: code_version()[x] for x in ("python", "torch", "triton")},
        command=f"python -m tritium.bench cpu_record {shlex.join(words)}", preset=preset,
        settings=tuple(settings), runs=runs,
    )  # fmt: skip


def asked(preset: str, own: Sequence[str], flags: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Return the settings of a run, and in words those that differ from the preset's.

    Args:
        preset: of train.py.
        own: flags that the protocol gives.
        flags: flags behind them.

    Raises:
        WrongInputError: they change what the protocol sets.
        ConfigError: they ask for something that cannot be done.
    """
    if flags and not flags[0].startswith("-"):
        raise WrongInputError(
            "takes flags of train.py behind two dashes, as in -- --learning-rate 8e-3, got "
            + " ".join(flags)
        )
    usual, *_ = parse([preset, *own])
    config, *_ = parse([preset, *own, *flags])
    found = differences(asdict(usual), asdict(config))
    wrong = [x for x in found if x.split(":")[0].split(".")[0] in FIXED]
    if config.tokenizer not in (None, CHARACTERS):
        wrong.append(f"tokenizer: {config.tokenizer}, of another text")
    if wrong:
        raise WrongInputError(f"the protocol sets this, leave it out: {'; '.join(wrong)}")
    return config, found


def train(trial: Trial, run: Path, held_out: Iterable[str]) -> Run:
    """Train by train.py, and measure the last weights on held-out documents.

    Raises:
        TrialError: it diverged, or the system does not count how long threads waited.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(CLEARED)}
    waits, before = Waits(os.sched_getaffinity(0)), processor_seconds()
    lines = train_by_script(trial, run, environment, waits.watch)
    used = processor_seconds() - before
    if lines is None:
        raise TrialError(
            f"{trial.name}, seed {trial.seed}: diverged; see {run.with_suffix('.txt')}"
        )
    last = next(line for line in reversed(lines) if "val_loss" in line)
    return Run(
        seed=trial.seed, bits_per_byte=measured(run, held_out),
        bits_per_byte_to_choose_by=last["val_bits_per_byte"], steps=last["step"],
        tokens=last["tokens"], seconds=last["tokens"] / last["tokens_per_s_overall"],
        processor_seconds=used, share=waits.share(),
    )  # fmt: skip


def measured(run: Path, documents: Iterable[str]) -> float:
    """Return bits per byte of documents, each read alone, with the last weights of a run."""
    model, tokenizer = read(run, "cpu", checkpoint="newest")
    stride = max(1, model.config.max_seq_len // 2)
    nats = tokens = n_bytes = 0
    for text in documents:
        ids = tokenizer.encode(text)
        nats += nats_of(model, [tokenizer.eot, *ids], stride)
        tokens += len(ids)
        n_bytes += len(text.encode())
    return Score(nats, tokens, n_bytes).bits_per_byte


@dataclass
class Waits:
    """Time that the threads of a process ran, and waited for a core, by the scheduler's count."""

    cores: Iterable[int]
    """Those that the process may use."""
    proc: Path = Path("/proc")
    threads: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Nanoseconds run and waited, by thread."""
    stolen: float = 0.0
    """Seconds that a hypervisor gave to others, of all cores."""

    def watch(self, process: subprocess.Popen) -> None:
        """Look at a process until it ends."""
        before = self._stolen()
        while True:
            self.look(process.pid)
            try:
                process.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                continue
        self.stolen += self._stolen() - before

    def look(self, pid: int) -> None:
        """Read the counts of its threads; what a thread that ended had stays."""
        for file in self.proc.glob(f"{pid}/task/*/schedstat"):
            try:
                ran, waited, _ = map(int, file.read_text().split())
            except (OSError, ValueError):  # it has ended since
                continue
            self.threads[file.parent.name] = ran, waited

    def share(self) -> float:
        """Return the share of the time in which a thread wanted a core that one had it."""
        ran, waited = (sum(x[i] for x in self.threads.values()) / 1e9 for i in (0, 1))
        if not ran:
            raise TrialError(
                "this system does not count how long threads wait for a core "
                "(/proc/PID/task/TID/schedstat); take a Linux with CONFIG_SCHED_INFO"
            )
        return max(0.0, ran - self.stolen) / (ran + waited)

    def _stolen(self) -> float:
        lines = (line.split() for line in (self.proc / "stat").read_text().splitlines())
        fields = {line[0]: line for line in lines if line}
        ticks = sum(int(fields[f"cpu{x}"][STEAL]) for x in self.cores)
        return ticks / os.sysconf("SC_CLK_TCK")


def two_cores(allowed: Iterable[int], system: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Return one logical CPU each of two cores.

    Args:
        allowed: logical CPUs that this process may use.
        system: folder of their topology; without it each is taken to be a core.

    Raises:
        WrongInputError: they are of one core, or a container's quota is less than two.
    """
    found: dict[tuple[str, ...], int] = {}
    for cpu in sorted(allowed):
        folder = system / f"cpu{cpu}" / "topology"
        try:
            core = tuple((folder / x).read_text() for x in ("physical_package_id", "core_id"))
        except OSError:
            core = (str(cpu),)
        found.setdefault(core, cpu)
    have = min(len(found), usable_cores())
    if have < CORES:
        raise WrongInputError(f"needs {CORES} cores, and this process may use {have}")
    return [*found.values()][:CORES]


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor; family and model tell those apart that a hypervisor calls the same."""
    pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    said: dict[str, str] = {}
    for key, _, value in pairs:
        said.setdefault(key.strip(), value.strip())
    family = f" (family {said.get('cpu family')}, model {said.get('model')})"
    return said["model name"] + family if "model name" in said else platform.machine()


def _commit() -> tuple[str, bool]:
    """Return the commit, and whether code was changed since."""
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *CODE]):
        try:
            done = subprocess.run(
                ["git", *words], cwd=SCRIPT.parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise WrongInputError(
                f"an entry names its commit, and git does not say it in {SCRIPT.parent} ({error}); "
                "run it in a clone"
            ) from None
        said.append(done.stdout.strip())
    return said[0], bool(said[1])
