"""`python -m bench VERB` or `python -m bench OP [OP ...]`; without either, list them."""

import sys
from collections.abc import Callable
from importlib import import_module

import tyro

VERBS = {
    "static": "static",  # what the kernels compile to, without a GPU
    "explain": "bounds",  # what no version of an operation can beat
    "optimizer": "optimizer",  # their steps on the parameters of real models
    "resume": "resume",  # whether a killed run, resumed, ends in the same bytes
    "faults": "faults",  # what a user sees when something goes wrong, and what is left
    "chunk_error": "chunk_error",  # what chunking costs linear_cross_entropy in accuracy
    "low_precision": "low_precision",  # what keeping less than float32 costs a training run
    "trainer": "trainer",  # what train.py does on a GPU: graphs, speed, precisions
    "activations": "activations",  # what a step keeps for its backward pass, predicted and counted
    "report": "runs_page",  # one HTML page that compares runs
    "pictures": "pictures",  # of a run, for the README
    "data": "data",  # how fast text becomes shards, and shards become batches
    "throughput": "throughput",  # how fast the trainer trains, beside a plain PyTorch GPT
}
"""The module of each, whose `main` it is."""


def main() -> None:
    """Hand the command line to the verb that it begins with, or measure the operations named."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb in VERBS:
        tyro.cli(_main_of(VERBS[verb]), args=arguments, prog=f"python -m bench {verb}")
        return
    from .operations import OPERATIONS

    if verb == "all" or verb in OPERATIONS:
        tyro.cli(_main_of("compare"), args=[verb, *arguments], prog="python -m bench")
    else:
        print("usage: python -m bench VERB [--help]", *(f"  {name}" for name in VERBS), sep="\n")
        print("or:    python -m bench OP [OP ...] [--help]", "  all", sep="\n")
        print(*(f"  {name}" for name in OPERATIONS), sep="\n")
        raise SystemExit(2 if verb else 0)


def _main_of(module: str) -> Callable:
    return import_module(f".{module}", __package__).main


if __name__ == "__main__":
    main()
