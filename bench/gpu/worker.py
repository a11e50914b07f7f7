"""Process that measures: orders in lines of JSON on its input, answers on its output."""

import gc
import json
import os
import sys
from dataclasses import asdict, replace

import torch

import tritium
from tritium.bench import harness, optimizer
from tritium.bench import step as step_profile
from tritium.bench.case import Case, Settings, attempt
from tritium.bench.gpu import steps
from tritium.bench.gpu.checks import CHECKS
from tritium.bench.gpu.process import die_with_parent
from tritium.bench.gpu.tasks import (
    CHECK,
    OPERATION,
    OPTIMIZER,
    OPTIMIZER_MODELS,
    PROFILE,
    RATES,
    STEP,
    Task,
    cases,
)
from tritium.bench.operations import OPERATIONS
from tritium.bench.optimizer_shapes import SMALLEST
from tritium.bench.optimizer_tasks import TASKS
from tritium.bench.tables import Row, markdown
from tritium.data.json_text import to_json
from tritium.kernels.roofline import Device

NO_RATES = Device("not measured", "", 1.0, 1.0, 1.0, 1.0)


class Bench:
    """Measurements of one process, which keeps a case until the next one is asked for."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.case: Case | None = None

    def answer(self, order: dict) -> dict:
        """Carry out one order.

        Args:
            order: "task"; "seconds" of one timing; "rates" of the device, except for their own
                task; "compiled", whether torch.compile is an implementation; "warm": compile and
                run once, measure nothing.

        Returns:
            "row" with its numbers or its problem, "rates", or "text"; "leave": the process can no
            longer use the GPU.
        """
        task = Task(**order["task"])
        rates = order.get("rates")
        settings = Settings(
            self.device, Device(**rates) if rates else NO_RATES,
            0 if order.get("warm") else harness.cache_bytes(self.device),
            compiled=order["compiled"], seconds=order["seconds"],
        )  # fmt: skip
        if task.kind != OPERATION:
            self._release()
        if order.get("warm"):
            found = attempt(lambda: self._warm(task, settings))
            return {"problem": found} if isinstance(found, str) else {}
        if task.kind == RATES:
            found = attempt(lambda: harness.measured_device(self.device, settings.seconds))
            return {"problem": found} if isinstance(found, str) else {"rates": asdict(found)}
        if task.kind == PROFILE:
            found = attempt(lambda: _profile(settings))
            return {"text": found}
        if task.kind == CHECK:
            shape = steps.SHAPES[self.device.type]
            return {"text": attempt(lambda: CHECKS[task.name](shape, self.device))}
        row = attempt(lambda: self._row(task, settings))
        if isinstance(row, str):
            row = Row(task.shape, {}, task.implementation, task.part, problem=row)
        return {"row": asdict(row), "leave": row.problem is not None and not self._usable()}

    def _row(self, task: Task, settings: Settings) -> Row:
        if task.kind == STEP:
            return steps.row_of(task.implementation, self.device, settings.rates)
        if task.kind == OPTIMIZER:
            return self._optimizer_row(task, settings)
        return self._held(task, settings).row(task.implementation, task.part)

    def _optimizer_row(self, task: Task, settings: Settings) -> Row:
        kind, model = TASKS[task.name], task.shape
        load = (kind.implementations | kind.peers)[task.implementation]
        row = optimizer.row_of(
            model, OPTIMIZER_MODELS[self.device.type][model], task.name, kind,
            task.implementation, load, settings, host=self.device.type == "cuda" and task.turn == 1,
        )  # fmt: skip
        if row.problem is not None:
            return row
        return replace(row, error=optimizer.error_or_none(load, kind, self.device))

    def _held(self, task: Task, settings: Settings) -> Case:
        """The case of a task, with the inputs that it has already."""
        if self.case is None or (self.case.name, self.case.shape) != (task.name, task.shape):
            self._release()
            dims = cases(task.name, self.device)[task.shape]
            self.case = Case(task.name, OPERATIONS[task.name], task.shape, dims, settings)
        return self.case

    def _release(self) -> None:
        self.case = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _warm(self, task: Task, settings: Settings) -> None:
        """Compile what a task runs, by running it once on one copy of its inputs."""
        if task.kind == STEP:
            steps.STEPS[task.implementation](steps.SHAPES[self.device.type], self.device)()
        elif task.kind == OPTIMIZER:
            kind = TASKS[task.name]
            load = (kind.implementations | kind.peers)[task.implementation]
            load()(optimizer.parameters(SMALLEST, kind.dtype, self.device)).step()
        elif task.kind == OPERATION:
            case = self._held(task, settings)
            function = case.loaders[task.implementation]()
            if isinstance(case.copies, str):
                raise RuntimeError(case.copies)
            for part in ("forward", "both"):
                harness.calls_of(function, case.copies[0], part)()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _usable(self) -> bool:
        """Whether the GPU still answers this process: not after an illegal memory access."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True


def _profile(settings: Settings) -> str:
    """The training step by kind of kernel, in Markdown."""
    shape = steps.SHAPES[settings.device.type]
    return markdown(step_profile.profile_table(shape.config, shape.batch, 2))


def main() -> None:
    """Answer orders until the input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    bench = Bench()

    def send(answer: dict) -> None:
        print(to_json(answer), file=answers, flush=True)

    send({"ready": os.getpid()})
    for line in sys.stdin:
        answer = bench.answer(json.loads(line))
        send(answer)
        if answer.get("leave"):
            break
    sys.stdout.flush()
    os._exit(0)  # a library's threads, or a broken GPU, must not keep it


if __name__ == "__main__":
    with tritium.interruptible():
        main()
