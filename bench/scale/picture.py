"""The picture of `bench scale`: speed, utilisation and memory over the number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tritium.bench.tables import plt

COLOURS = {"ddp": "C0", "fsdp": "C1", "hsdp": "C2", "tp": "C3"}
MARKERS = {"ddp": "o", "fsdp": "s", "hsdp": "^", "tp": "D"}
GIB = 2**30


class Point(NamedTuple):
    """A mode on so many GPUs."""

    mode: str
    gpus: int
    speed: float
    """Tokens per second of the whole job."""
    utilisation: float
    """MFU, of 1."""
    memory: int
    """Bytes of a GPU."""


def draw(points: list[Point], most: float, title: str, path: Path) -> None:
    """Draw three panels with a line for each mode.

    Args:
        points: what is drawn.
        most: bytes of a GPU that a step may take.
        title: of the picture.
        path: the PNG.
    """
    figure, (speed, share, memory) = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    numbers = sorted({x.gpus for x in points})
    for mode in dict.fromkeys(x.mode for x in points):
        of_mode = [x for x in points if x.mode == mode]
        style = dict(color=COLOURS[mode], marker=MARKERS[mode], markersize=5, label=mode)
        gpus = [x.gpus for x in of_mode]
        speed.plot(gpus, [x.speed for x in of_mode], **style)
        share.plot(gpus, [100 * x.utilisation for x in of_mode], **style)
        memory.plot(gpus, [x.memory / GIB for x in of_mode], **style)
    memory.axhline(most / GIB, color="0.5", linestyle="--", linewidth=1)
    memory.annotate(
        "a step may take", (0.02, most / GIB), xycoords=("axes fraction", "data"), va="top",
        fontsize=8, color="0.4",
    )  # fmt: skip
    for axes in (speed, share, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [f"{x:,}" for x in numbers])
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    speed.set_ylabel("tokens per second, of all GPUs")
    share.set(ylabel="MFU (%)", ylim=(0, None))
    memory.set(ylabel="memory of a GPU, in the fastest plan (GiB)", ylim=(0, None))
    speed.legend()
    figure.suptitle(f"{title}: predicted, not measured", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
