"""Targets of the optimizers, and their check against the rows of a measurement."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tritium.bench.tables import Row

TRITIUM, UNFOLDED = "Tritium", "torch clip, fused"


@dataclass(frozen=True)
class Target:
    """A figure of one task's rows on one model, by implementation, and its limit."""

    what: str
    model: str
    task: str
    limit: float
    figure: Callable[[dict[str, Row]], float | None]
    """None where it was not measured."""
    device: str = "GPU"
    """The device on which it is to be met: "GPU" or "CPU"."""
    at_most: bool = False

    def met(self, found: float) -> bool:
        """Whether `found` is on the right side of the limit."""
        return found <= self.limit if self.at_most else found >= self.limit


def _tritium(figure: str) -> Callable[[dict[str, Row]], float | None]:
    return lambda rows: getattr(rows[TRITIUM], figure) if TRITIUM in rows else None


def _speedup(rows: dict[str, Row]) -> float | None:
    times = [rows[name].milliseconds if name in rows else None for name in (UNFOLDED, TRITIUM)]
    return times[0] / times[1] if times[0] and times[1] else None


def _copy(task: str) -> Target:
    return Target("% of copy", "GPT-2 1.5B", task, 94, _tritium("percent_of_copy"))


def _host(task: str) -> Target:
    figure = _tritium("host_microseconds")
    return Target("us of the host", "GPT-2 124M", task, 150, figure, device="CPU", at_most=True)


ADAMW = (
    "AdamW float32", "AdamW bf16, float32 master", "AdamW bf16, split master",
    "AdamW bf16, float32 moments", "AdamW bf16, bf16 moments", "AdamW bf16, 8-bit moments",
)  # fmt: skip
CLIP = "clip + AdamW float32"
TARGETS = (
    *map(_copy, (*ADAMW, "norm float32", "norm bf16")),
    Target(f"times as fast as {UNFOLDED}", "GPT-2 1.5B", CLIP, 1.25, _speedup),
    Target("launches", "GPT-2 1.5B", CLIP, 3, _tritium("launches"), at_most=True),
    *map(_host, ("AdamW float32", CLIP)),
)


def verdicts(
    rows: Iterable[Row], measured_on: str, targets: Iterable[Target] = TARGETS
) -> Iterator[tuple[str, bool | None]]:
    """Each target of this device in words, and whether it is met; None where not measured."""
    rows = list(rows)
    for target in targets:
        if target.device != measured_on:
            continue
        case = (target.model, target.task)
        here = {row.implementation: row for row in rows if (row.shape, row.pass_name) == case}
        found = target.figure(here)
        sign = "at most" if target.at_most else "at least"
        wanted = f"{target.task}, {target.model}: {target.what} {sign} {target.limit:g}"
        if found is None:
            yield f"{wanted}: not measured", None
        else:
            yield f"{wanted}: {found:.4g}, {'met' if (met := target.met(found)) else 'MISSED'}", met
