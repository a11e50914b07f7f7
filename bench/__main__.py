"""Command line: `python -m tritium.bench VERB`, or `OP [OP ...]`; without either, the list."""

import sys
import textwrap
from collections.abc import Callable
from importlib import import_module

import tyro

VERBS = {
    "static": ("compiled.static", "what the kernels compile to, without a GPU"),
    "explain": ("explain", "what no version of an operation can beat"),
    "host": ("host", "what each operation costs the host, beside PyTorch and Liger, without a GPU"),
    "step": ("step", "what a training step consists of: launches, and on a GPU milliseconds"),
    "optimizer": ("optimizer", "optimizers' steps on the parameters of real models"),
    "resume": ("runs.resume", "whether a killed run, resumed, ends in the same bytes"),
    "faults": ("runs.faults", "what a user sees when something goes wrong, and what is left"),
    "chunk_error": ("chunk_error", "what chunking costs linear_cross_entropy in accuracy"),
    "low_precision": ("runs.low_precision", "what keeping less than float32 costs a training run"),
    "residual": ("runs.residual", "what a residual stream in bfloat16 costs in loss"),
    "trainer": ("runs.trainer", "what train.py does on a GPU: graphs, speed, precisions"),
    "activations": (
        "runs.activations",
        "bytes a step keeps for its backward pass, predicted, counted",
    ),
    "report": ("runs.report", "one HTML page that compares runs"),
    "pictures": ("runs.pictures", "pictures of a run, for the README"),
    "data": ("runs.data", "how fast text becomes shards, and shards become batches"),
    "throughput": ("runs.throughput", "how fast the trainer trains, beside a plain PyTorch GPT"),
    "contention": ("runs.contention", "what another busy process costs a run on a CPU"),
}
"""The module of each, whose `main` it is, and what it measures or makes."""


def main() -> None:
    """Hand the command line to the verb that it begins with, or measure the operations named."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        tyro.cli(_main_of(VERBS[verb][0]), args=arguments, prog=f"python -m tritium.bench {verb}")
        return
    from tritium.bench.operations import OPERATIONS

    if verb == "all" or verb in OPERATIONS:
        tyro.cli(_main_of("compare"), args=[verb, *arguments], prog="python -m tritium.bench")
        return
    known = verb in ("--help", "-h", "help")
    said = _usage(list(OPERATIONS))
    if known:
        print(said)
    else:
        print(f"bench: no verb or operation {verb!r}", said, sep="\n\n", file=sys.stderr)
    raise SystemExit(0 if known else 2)


def _usage(operations: list[str]) -> str:
    width = max(map(len, VERBS))
    verbs = (f"  {name:{width}}  {what}" for name, (_, what) in VERBS.items())
    names = textwrap.fill(
        " ".join(["all", *operations]), 98, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join(
        [
            "usage: python -m tritium.bench VERB [--help]",
            *verbs,
            "or:    python -m tritium.bench OP [OP ...] [--help], beside PyTorch and peers, of",
            names,
            "What --write, --save and --plot keep goes to bench/results at the root of a checkout,",
            "elsewhere to ./bench-results.",
        ]
    )


def _main_of(module: str) -> Callable:
    return import_module(f".{module}", __package__).main


if __name__ == "__main__":
    main()
