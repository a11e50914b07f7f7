"""Entries of the protocol for CPUs: files of docs/cpu, their comparison, and the table of them.

An entry counts when its runs had their cores and kept to their time, of a tree without changes that
were not committed. It is compared with the best entry that counts and is older, of the same version
of the protocol on the same CPU: by the difference of the means of their seeds with its 95 %
interval (Welch's t). Below 0 altogether is "better", above "worse", else "not shown".

The best of many entries is the best in part by luck, so one that does the same is a little worse
than it more often than one time in two.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from statistics import mean

from tritium.bench import tables
from tritium.bench.runs._trials import interval, welch
from tritium.data.json_text import to_json

PROTOCOL = 1  # raise it when losses of older entries would no longer compare
SECONDS = 180.0
CORES = 2
LEAST_SEEDS = 3
LEAST_SHARE = 0.9  # of the time in which its threads wanted a core
MOST_OVER = 0.02  # of SECONDS
MARKER = "<!-- What follows is written by `python -m tritium.bench cpu_record --table`. -->\n"


class EntryError(ValueError):
    """A file of docs/cpu that is no entry."""


@dataclass(frozen=True)
class Run:
    """Training from one seed."""

    seed: int
    bits_per_byte: float
    """Loss of the held-out documents, with the last weights."""
    bits_per_byte_to_choose_by: float
    """The last validation of train.py, of other documents."""
    steps: int
    tokens: int
    seconds: float
    """Wall-clock time of the steps and the validations between them, without start-up."""
    processor_seconds: float
    """Processor time of the whole process."""
    share: float
    """Share of the time in which a thread of the process wanted a core that one had it."""


@dataclass(frozen=True)
class Entry:
    """One trial of the protocol."""

    protocol: int
    date: str
    """UTC, as 2026-01-31T12:00:00Z."""
    name: str
    commit: str
    uncommitted: bool
    """Whether the code had changes that were not committed."""
    cpu: str
    products_per_s: float
    """FLOP/s of a large float32 product on the two cores before the first run."""
    versions: dict[str, str]
    command: str
    preset: str
    settings: tuple[str, ...]
    """Settings that differ from the preset's."""
    runs: tuple[Run, ...]

    @property
    def losses(self) -> list[float]:
        """Bits per byte of each seed."""
        return [x.bits_per_byte for x in self.runs]

    @property
    def loss(self) -> tuple[float, float]:
        """Mean of the losses, and half of its 95 % interval."""
        return interval(self.losses)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of training, validations included."""
        return sum(x.tokens for x in self.runs) / sum(x.seconds for x in self.runs)

    @property
    def marks(self) -> list[str]:
        """Reasons for which it does not count."""
        share = min(x.share for x in self.runs)
        longest = max(x.seconds for x in self.runs)
        found = [f"busy: {share:.0%} of its cores"] if share < LEAST_SHARE else []
        if longest > SECONDS * (1 + MOST_OVER):
            found.append(f"took {longest:.0f} s")
        return found + (["changes not committed"] if self.uncommitted else [])

    @property
    def file(self) -> str:
        """Name of its file, by its date."""
        return f"{self.date.replace('-', '').replace(':', '')}-{self.commit[:7]}.json"


def save(entry: Entry, folder: Path) -> Path:
    """Write an entry, with its mean and interval for other readers, and return its file."""
    average, half = entry.loss
    content = asdict(entry) | {"mean": average, "half_of_95_percent_interval": half}
    file = folder / entry.file
    tables.write(file, (to_json(content, indent=1) + "\n").encode())
    return file


def load(file: Path) -> Entry:
    """Read an entry.

    Raises:
        EntryError: it is none, or its mean or interval are not those of its runs.
    """
    try:
        content = json.loads(file.read_text())
        said = content.pop("mean"), content.pop("half_of_95_percent_interval")
        runs = tuple(Run(**run) for run in content.pop("runs"))
        settings = tuple(content.pop("settings"))
        entry = Entry(**content, settings=settings, runs=runs)
        found = entry.loss
        same = all(isclose(a, b, rel_tol=1e-9) for a, b in zip(said, found, strict=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EntryError(f"{file} is no entry ({error}); restore or delete it") from error
    if not same:
        raise EntryError(
            f"{file}: mean and interval must be {found}, those of its runs, got {said}"
        )
    return entry


def load_all(folder: Path) -> list[Entry]:
    """Read the entries of a folder, the oldest first."""
    return sorted((load(file) for file in folder.glob("*.json")), key=lambda x: x.date)


def best_before(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """Return the entry that another is compared with, if there is one."""
    comparable = [
        x for x in entries
        if (x.protocol, x.cpu) == (entry.protocol, entry.cpu) and x.date < entry.date
        and not x.marks
    ]  # fmt: skip
    return min(comparable, key=lambda x: x.loss[0], default=None)


def verdict(entry: Entry, entries: Sequence[Entry]) -> str:
    """Say in a few words how an entry compares."""
    if entry.marks:
        return f"does not count: {', '.join(entry.marks)}"
    best = best_before(entry, entries)
    if best is None:
        return "first on this CPU"
    difference, half = welch(entry.losses, best.losses)
    word = "not shown" if abs(difference) <= half else "better" if difference < 0 else "worse"
    return f"{word}: {difference:+.4f} ± {half:.4f} beside that of {best.date[:10]}"


def page(text: str, entries: Sequence[Entry]) -> str:
    """Return the page docs/cpu.md with the table of entries behind its marker.

    Raises:
        EntryError: the page has no marker.
    """
    head, marker, _ = text.partition(MARKER)
    if not marker:
        raise EntryError(
            f"docs/cpu.md must have the line {MARKER.strip()!r}, which begins its table"
        )
    return f"{head}{marker}\n{_table(entries)}\n"


def _table(entries: Sequence[Entry]) -> str:
    if not entries:
        return "No entry yet."
    rows = [
        ("protocol", "bits per byte", "by seed", "compared", "what was run", "steps", "tokens/s",
         "CPU", "torch", "date, commit"),
        ("---",) * 10,
    ]  # fmt: skip
    for x in sorted(entries, key=lambda x: (-x.protocol, bool(x.marks), x.loss[0])):
        rows.append((
            str(x.protocol), "{:.4f} ± {:.4f}".format(*x.loss),
            " ".join(f"{y:.4f}" for y in x.losses),
            verdict(x, entries), f"{x.name}: {'; '.join(x.settings) or 'the preset as it is'}",
            f"{mean(y.steps for y in x.runs):,.0f}", f"{x.tokens_per_s:,.0f}", x.cpu,
            x.versions["torch"], f"[{x.date[:10]}](cpu/{x.file}), {x.commit[:7]}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(y.replace('|', '/') for y in row)} |" for row in rows)
