"""One page that compares runs of train.py: `python -m tritium.bench report RUN [RUN ...]`.

The page is a single file that needs no network: curves, differences of the settings, samples,
pictures of the layers, and what happened. Its form is in runs_page.html.
"""

import base64
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from tritium.bench.ends import WrongInputError, as_wrong_input, writable
from tritium.data import atomic
from tritium.data.json_text import to_json
from tritium.training.monitor.display import clock
from tritium.training.monitor.observer import OTHER_TEXT
from tritium.training.monitor.plot import moving_average, plot_layers
from tritium.training.run import checkpoint
from tritium.training.run.checkpoint import CheckpointError
from tritium.training.run.run_folder import read_lines

TEMPLATE = Path(__file__).with_suffix(".html")
SLOT = "/*DATA*/"
POINTS = 500  # of a curve
SAMPLES = 6  # of a run
UNTOLD = {"out", "resume", "resume_anyway"}  # which differ without making a difference
KEYS = ("loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_s")
FURTHER = ("mfu", "mfu_measured", "memory_gib")  # shown if any run has logged them


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path = Path("report.html")
) -> None:
    """Compare runs of train.py on one HTML page.

    Args:
        runs: their folders.
        out: the page.
    """
    if not runs:
        raise WrongInputError("name the folder of a run of train.py, or several")
    with as_wrong_input(RunError):
        page = render(runs)
    writable(out)
    atomic.write(out, page.encode())
    Console(soft_wrap=True).print(f"{out}: {len(page) / 1e3:.0f} KB, opens in any browser")


class RunError(ValueError):
    """A folder holds no run that could be shown."""


def render(runs: tuple[Path, ...]) -> str:
    """Return the page.

    Raises:
        RunError: a folder "holds no run", or one whose log is empty or newest checkpoint damaged.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    described = [describe(run, name) for run, name in zip(runs, names, strict=True)]
    for key in FURTHER:
        if not any(run["curves"][key] for run in described):
            for run in described:
                del run["curves"][key]
    data = {"runs": described, "differences": differences([x["settings"] for x in described])}
    # In a script element only "<" could end what is data.
    content = to_json(data).replace("<", "\\u003c")
    return TEMPLATE.read_text().replace(SLOT, content)


def describe(run: Path, name: str) -> dict[str, Any]:
    """Return what the page shows of one run."""
    try:
        record = json.loads((run / "config.json").read_text())
        settings = flatten(record["config"]) | flatten(record["fingerprint"]["machine"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{run} holds no run of train.py (config.json cannot be read)") from None
    log = read_lines(run / "log.jsonl")
    if not log:
        raise RunError(f"{run} has no step in its log.jsonl yet; wait for the first one")
    return {
        "name": name,
        "facts": facts(run, record, log),
        "curves": {key: curve(log, key) for key in (*KEYS, *FURTHER)},
        "settings": settings,
        "samples": spread(latest(read_lines(run / "samples.jsonl")), SAMPLES),
        "events": events_of(run, log),
        "layers": _layers(run, name),
    }


def _layers(run: Path, name: str) -> str | None:
    """Draw layers.png, which a run leaves only at its end."""
    entries = read_lines(run / "layers.jsonl")
    if not entries:
        return None
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "layers.png"
        plot_layers(entries, picture, name)
        return base64.b64encode(picture.read_bytes()).decode()


def facts(run: Path, record: dict, log: list[dict]) -> dict[str, str]:
    """Return the figures of a run that say most, with their units."""
    losses = [x["loss"] for x in log if math.isfinite(x["loss"])]
    events = read_lines(run / "events.jsonl")
    since = max((x["step"] for x in events if x["kind"] == OTHER_TEXT), default=0)
    measured = [x for x in log if math.isfinite(x.get("val_loss", math.nan)) and x["step"] > since]
    best = min(measured, key=lambda x: x["val_loss"], default=None)
    machine, saved = record["fingerprint"]["machine"], checkpoint.checkpoints(run / "checkpoints")
    try:
        seconds = checkpoint.read_record(saved[-1])["state"]["seconds"] if saved else None
    except CheckpointError as error:
        raise RunError(str(error)) from None
    return {
        "preset": record["preset"],
        "steps": f"{log[-1]['step']:,}",
        "tokens": f"{log[-1]['tokens']:,}",
        "loss, smoothed": f"{list(moving_average(losses))[-1]:.4f} nats/token" if losses else "–",
        "best validation": (
            f"{best['val_loss']:.4f} nats/token, {best['val_bits_per_byte']:.4f} bits/byte"
            if best
            else "–"
        ),
        "at step": f"{best['step']:,}" if best else "–",
        "speed, median": f"{statistics.median(x['tokens_per_s'] for x in log):,.0f} tokens/s",
        "time until saved": "–" if seconds is None else clock(seconds),
        "machine": f"{machine['device']}, threads: {machine['threads']}, {machine['dtype'][6:]}",
    }


def curve(log: list[dict], key: str) -> list[list[float]]:
    """Return at most POINTS of [step, tokens, mean, lowest, highest] of what the log has of `key`.

    Entries without a finite value are left out.
    """
    entries = [x for x in log if math.isfinite(x.get(key, math.nan))]
    each = max(1, math.ceil(len(entries) / POINTS))
    points = []
    for first in range(0, len(entries), each):
        part = entries[first : first + each]
        values = [x[key] for x in part]
        summary = (statistics.fmean(values), min(values), max(values))
        points.append([part[-1]["step"], part[-1]["tokens"], *(float(f"{x:.6g}") for x in summary)])
    return points


def events_of(run: Path, log: list[dict]) -> list[dict]:
    """Return what happened, in the order of steps, a stretch of steps skipped alike as one event.

    Steps that the optimizer alone left out, without recovery, are taken from the log.
    """
    noted = read_lines(run / "events.jsonl")
    for entry in log:
        if "skipped" not in entry and not math.isfinite(entry["loss"] + entry["grad_norm"]):
            text = "Loss or gradient not finite."
            noted.append({"step": entry["step"], "kind": "skipped", "time": "", "text": text})
    noted.sort(key=lambda event: event["step"])
    events: list[dict] = []
    for event in noted:
        last: dict = events[-1] if events else {"kind": ""}
        alike = event["kind"] == last["kind"] == "skipped" and event["text"] == last["text"]
        if alike and event["step"] == last.get("until", last["step"]) + 1:
            last["until"] = event["step"]
        else:
            events.append(event)
    return events


def differences(settings: list[dict[str, str]]) -> list[list[str]]:
    """Return the settings that are not the same in all runs: name, then the value in each."""
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [[name, *(each.get(name, "–") for each in settings)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in UNTOLD]


def flatten(tree: dict, prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested settings by their dotted names."""
    leaves: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = str(value)
    return leaves


def latest(entries: list[dict]) -> list[dict]:
    """Return the last entry of each step, in the order of steps."""
    by_step = {entry["step"]: entry for entry in entries}
    return [by_step[step] for step in sorted(by_step)]


def spread(entries: list[dict], count: int) -> list[dict]:
    """Return at most `count` entries, evenly, the last one among them."""
    if len(entries) <= count:
        return entries
    return [entries[round(i * (len(entries) - 1) / (count - 1))] for i in range(count)]
