"""The optimizer's step on the parameters of real models: `python -m tritium.bench optimizer`.

Every task of `optimizer_tasks` is measured for every model: time, the bound's bytes and those of
the state per parameter, launches, host time, memory, and error. Percent of the bound is of the
least that any version moves; percent of copy is of what the implementation itself moves.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from tritium.bench import harness, host_cost
from tritium.bench.case import Settings, attempt, installed, percent_of_bound
from tritium.bench.compare import command_line, make_report, settings_here, show, watched
from tritium.bench.ends import WrongInputError
from tritium.bench.errors import relative_rms
from tritium.bench.implementations import Loader
from tritium.bench.optimizer_implementations import Parameters, Stepper
from tritium.bench.optimizer_shapes import CPU_MODELS, MODELS, SMALLEST, Shapes
from tritium.bench.optimizer_targets import verdicts
from tritium.bench.optimizer_tasks import TASKS, Task
from tritium.bench.tables import Row
from tritium.kernels.runtime import uses_triton

T = TypeVar("T")
WIDTH = 250  # of tables that do not go to a terminal
STEPS = 10  # that the error is of
Make = Callable[[Parameters], Stepper]


def implementations_of(task: Task) -> dict[str, Loader]:
    """The implementations of the step, Tritium's first."""
    return task.implementations | installed(task.peers)[0]


def measure(models: dict[str, Shapes], tasks: dict[str, Task], settings: Settings) -> Iterator[Row]:
    """Measure every implementation of every task on every model; a failure is a row."""
    errors: dict[tuple[str, str], float | None] = {}
    for model, shapes in models.items():
        for name, task in tasks.items():
            for implementation, load in implementations_of(task).items():
                case = name, implementation
                row = row_of(model, shapes, name, task, implementation, load, settings)
                if row.problem is None and case not in errors:
                    errors[case] = error_or_none(load, task, settings.device)
                yield replace(row, error=errors.get(case)) if row.problem is None else row


def row_of(
    model: str,
    shapes: Shapes,
    name: str,
    task: Task,
    implementation: str,
    load: Loader,
    settings: Settings,
    host: bool = True,
) -> Row:
    """Measure one implementation on one model: all except the error, or why there is nothing.

    Args:
        model: its name.
        shapes: its parameters'.
        name: of the task.
        task: the step.
        implementation: its name.
        load: the implementation.
        settings: of the run.
        host: count launches and time the host, which takes a second.
    """
    row = Row(
        model, {"N": sum(map(prod, shapes)), "tensors": len(shapes)}, implementation, name
    )  # fmt: skip
    found = attempt(partial(_measured, row, task, load, shapes, settings, host))
    if settings.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return replace(row, problem=found) if isinstance(found, str) else found


def error_or_none(load: Loader, task: Task, device: torch.device) -> float | None:
    """The error of a step, or nothing where it fails: then its row says why."""
    found = attempt(lambda: error_of(load(), task, device))
    return None if isinstance(found, str) else found


def _measured(
    row: Row, task: Task, load: Loader, shapes: Shapes, settings: Settings, host: bool
) -> Row:
    """`row` with its numbers, except the error."""
    make, device, N = load(), settings.device, row.dims["N"]
    bound = task.bound(N, settings.rates)
    copies = 2 * settings.cache // (2 * N * task.dtype.itemsize) + 1
    steppers = [make(parameters(shapes, task.dtype, device)) for _ in range(copies)]
    calls = [stepper.step for stepper in steppers]
    timing = harness.summary(harness.time_calls(calls, device, settings.seconds))
    own = bound.bytes + task.extra.get(row.implementation, 0) * N
    cost = _host_cost(row.implementation, task, make, calls[0], shapes, device) if host else None
    return replace(
        row, milliseconds=timing.median, lower_quartile=timing.lower_quartile,
        upper_quartile=timing.upper_quartile, bytes=bound.bytes, flops=bound.flops,
        resource=bound.resource, percent_of_bound=percent_of_bound(bound, timing.median),
        percent_of_copy=own / settings.rates.copy / timing.median * 1e5,
        peak_bytes=harness.peak_bytes(calls[0], device), state_bytes=steppers[0].state_bytes,
        launches=cost and cost.launches, host_microseconds=cost and cost.microseconds,
    )  # fmt: skip


def _host_cost(
    implementation: str,
    task: Task,
    make: Make,
    step: harness.Call,
    shapes: Shapes,
    device: torch.device,
) -> host_cost.HostCost | None:
    if device.type == "cuda":
        return host_cost.of_gpu_call(step)
    if implementation == "Tritium":
        return host_cost.of_unexecuted_call(step)
    single = parameters([(1,)] * len(shapes), task.dtype, device)
    return host_cost.of_cpu_call(make(single).step)


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Parameters with gradients, as large as those of a model at its start."""
    ps = [nn.Parameter(torch.randn(s, dtype=dtype, device=device).mul_(0.02)) for s in shapes]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


def error_of(make: Make, task: Task, device: torch.device) -> float:
    """The relative RMS error against float64 of a few steps with new gradients each.

    It is the error of the change of the weights, not of the weights, most of which are rounded
    alike; for a norm, the error of the norm.
    """
    torch.manual_seed(0)
    ps = parameters(SMALLEST, task.dtype, device)
    exact = [nn.Parameter(p.detach().double()) for p in ps]
    gradients = [[torch.randn_like(p) for p in ps] for _ in range(STEPS)]
    moved = _outcome(make, ps, gradients)
    return relative_rms(moved, _outcome(task.truth(), exact, gradients))


def _outcome(make: Make, ps: Parameters, gradients: list[list[Tensor]]) -> list[Tensor]:
    """The change of all weights in one tensor, or what the steps returned."""
    before = [p.detach().clone() for p in ps]
    for p, g in zip(ps, gradients[0], strict=True):
        p.grad = g.to(p)
    stepper = make(ps)
    returned = []
    for grads in gradients:
        for p, g in zip(ps, grads, strict=True):
            p.grad = g.to(p, copy=True)
        returned.append(stepper.step())
    if isinstance(returned[0], Tensor):
        return [torch.stack(returned)]
    pairs = zip(ps, before, strict=True)
    return [torch.cat([(p.detach().double() - b.double()).flatten() for p, b in pairs])]


def _notes(tasks: dict[str, Task], settings: Settings) -> Iterator[str]:
    yield (
        f"Rates: the bytes of the bound. Error: of the change of all weights in {STEPS} steps of a "
        f"model of {sum(map(prod, SMALLEST))} parameters, or of the norm, against float64."
    )
    if settings.device.type == "cuda":
        yield "Host: until the step returns, not its work; gradients stay where they are."
    else:
        yield (
            "Host: gradients stay where they are; Tritium's launches are compiled and not run, the "
            "others have parameters of one element each."
        )
        yield "Peak memory is not measured on a CPU."
        if not uses_triton(torch.empty(0)):
            yield "Tritium runs its PyTorch reference here; launches are those of the kernels."
    missing = {name for task in tasks.values() for name in installed(task.peers)[1]}
    if missing:
        yield f"Not installed: {', '.join(sorted(missing))}."


def named(table: dict[str, T], parts: tuple[str, ...], what: str) -> dict[str, T]:
    """The entries whose name contains one of `parts`; all without any."""
    if unknown := [part for part in parts if not any(part in name for name in table)]:
        raise WrongInputError(f"no {what} {unknown}; there are {'; '.join(table)}")
    return {name: x for name, x in table.items() if any(part in name for part in parts or ("",))}


def main(
    models: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    quick: bool = False,
    targets: bool = False,
    save: bool = False,
    plot: bool = False,
) -> None:
    """Measure optimizers' steps on the parameters of real models, beside PyTorch's and others'.

    Args:
        models: parts of models' names; without any, all on a GPU and the first on a CPU.
        tasks: parts of tasks' names, such as AdamW or norm; all without any.
        quick: a model of two small layers alone, in a moment: to see that it works.
        targets: say which targets are met; exit with 1 if one is missed or not measured.
        save: keep optimizer-DEVICE.json, in the folder of results.
        plot: draw optimizer-DEVICE.png, there: percent of the bound against parameters.
    """
    chosen, kinds = named(MODELS, models, "model"), named(TASKS, tasks, "task")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    settings = settings_here(console, quick)
    if quick:
        chosen = {"smallest": SMALLEST}
    elif settings.device.type == "cpu" and not models:
        chosen = dict(list(chosen.items())[:CPU_MODELS])
    total = len(chosen) * sum(len(implementations_of(task)) for task in kinds.values())
    rows = watched("optimizer", total, measure(chosen, kinds, settings))
    done = make_report(
        "optimizer", "N", "float32 and bfloat16", settings, command_line(),
        _notes(kinds, settings), rows,
    )  # fmt: skip
    show(done, console, save, plot)
    if targets:
        found = list(verdicts(rows, done.measured_on))
        console.print(*(words for words, _ in found), sep="\n")
        if not all(met for _, met in found):
            raise SystemExit(1)
