"""Command line: `python -m tritium.bench VERB`, or `OP [OP ...]`; without either, the list."""

import sys
import textwrap
from collections.abc import Callable
from importlib import import_module

import tyro

from tritium.bench.ends import ended

VERBS = {
    "gpu": (
        "gpu.session",
        "a GPU for N minutes: tests, training step, optimizers, operations",
    ),
    "scale": ("scale.scale", "memory, communication and speed of training on many GPUs, predicted"),
    "static": (
        "compiled.static",
        "registers, spills and instructions of the kernels, without a GPU",
    ),
    "explain": ("explain", "least bytes, operations and time of an operation (its roofline)"),
    "host": ("host", "host time of the operations, beside PyTorch and Liger, without a GPU"),
    "step": ("step", "launches of a training step by kind, and on a GPU their milliseconds"),
    "optimizer": ("optimizer", "optimizers' steps on the parameters of real models"),
    "resume": ("runs.resume", "runs killed and resumed, compared byte for byte with unbroken ones"),
    "faults": ("runs.faults", "messages and end states of runs in which something goes wrong"),
    "parallel_faults": ("runs.parallel_faults", "runs on four ranks, of which one is killed"),
    "two_hosts": ("runs.two_hosts", "a run on two hosts, which are network namespaces, beside one"),
    "chunk_error": ("chunk_error", "accuracy of linear_cross_entropy by the number of chunks"),
    "low_precision": ("runs.low_precision", "loss of training runs with low-precision weights"),
    "residual": ("runs.residual", "loss of training runs with a residual stream in bfloat16"),
    "ablate": ("runs.ablate", "what each of a list of changes does to a run's loss, over seeds"),
    "scaling": ("runs.scaling", "a ladder of models, and the loss of the next size predicted"),
    "tokens_to_loss": ("runs.tokens_to_loss", "tokens that Muon needs to AdamW's loss, both swept"),
    "characters": ("runs.characters", "the preset characters beside nanoGPT's recipe for a CPU"),
    "cpu_record": (
        "runs.cpu_record",
        "three minutes of training on two cores, by a frozen protocol: docs/cpu.md",
    ),
    "find_lr": ("runs.find_lr", "loss while the learning rate grows: where training breaks"),
    "trainer": ("runs.trainer", "train.py on a GPU: CUDA graphs, speed, precisions"),
    "activations": (
        "runs.activations",
        "bytes that a step keeps for its backward pass, predicted and counted",
    ),
    "reversible": (
        "runs.reversible",
        "reversible models: rounding by depth, and loss of trained ones",
    ),
    "parallel": ("runs.parallel", "one training shared in every way: losses and weights agree"),
    "report": ("runs.report", "one HTML page that compares runs"),
    "pictures": ("runs.pictures", "pictures of a run, for the README"),
    "data": ("runs.data", "speed of preparing text and of loading batches"),
    "throughput": ("runs.throughput", "speed of the trainer, beside a plain PyTorch GPT"),
    "generation": (
        "runs.generation",
        "tokens/s of greedy generation on a CPU, beside transformers' generate",
    ),
    "contention": ("runs.contention", "cost of another busy process to a run on a CPU"),
}
"""Each verb's module, whose `main` is called, and what it measures or makes."""


def main() -> None:
    """Hand the command line to the verb that it begins with, or measure the operations named."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    verb = verb.replace("-", "_") if verb[0] != "-" else verb
    if verb in VERBS:
        made = _main_of(VERBS[verb][0])
        with ended(f"bench {verb}"):
            tyro.cli(made, args=arguments, prog=f"python -m tritium.bench {verb}")
        return
    from tritium.bench.operations import OPERATIONS

    if verb == "all" or verb in OPERATIONS:
        made = _main_of("compare")
        with ended("bench"):
            tyro.cli(made, args=[verb, *arguments], prog="python -m tritium.bench")
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
            "Exit status: 2 for wrong input; 1 if a run failed, or a result is not as it must be.",
        ]
    )


def _main_of(module: str) -> Callable:
    return import_module(f".{module}", __package__).main


if __name__ == "__main__":
    main()
