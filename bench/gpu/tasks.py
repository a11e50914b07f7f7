"""Measurements of a session, in order of importance."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest

import torch

from tritium.bench import harness
from tritium.bench.case import own_implementations
from tritium.bench.gpu.checks import CHECKS
from tritium.bench.gpu.steps import STEPS
from tritium.bench.operations import OPERATIONS, Dims
from tritium.bench.optimizer_shapes import MODELS, SMALLEST, Shapes
from tritium.bench.optimizer_tasks import TASKS

RATES, STEP, PROFILE, CHECK = "rates", "step", "profile", "check"
OPTIMIZER, OPERATION = "optimizer", "operation"
TURNS = 2  # of each measurement: peers take turns, so that a change of the clock meets all
LIMIT = 45.0  # seconds of a measurement with its compilation; a peer may take more, and has none
LONG_LIMIT = 150.0  # of a step, whose compilation is that of a model

ORDER = (
    "linear_cross_entropy", "cross_entropy", "rms_norm", "add_rms_norm", "softmax", "swiglu",
    "qk_norm_rope", "rope", "embedding", "linear_log_prob", "linear_kl_div", "linear_topk_kl_div",
    "layer_norm", "add_layer_norm", "geglu", "dropout_add", "relu_squared", "log_softmax",
    "info_nce", "mse_loss",
)  # fmt: skip
"""The operations, the most important first."""

FIRST = ("AdamW float32", "norm float32", "clip + AdamW float32", "AdamW bf16, float32 master")
"""Optimizer tasks measured before any operation; the others follow the first shapes."""

OPTIMIZER_MODELS: dict[str, dict[str, Shapes]] = {
    "cuda": {name: MODELS[name] for name in ("GPT-2 1.5B", "GPT-2 124M")},
    "cpu": {"smallest": SMALLEST},
}


@dataclass(frozen=True)
class Task:
    """One measurement, which is one row of the results."""

    kind: str
    name: str = ""
    """The operation, or the optimizer's task."""
    shape: str = ""
    """The operation's shape, or the optimizer's model."""
    implementation: str = ""
    part: str = ""
    """The pass."""
    turn: int = 1

    @property
    def key(self) -> str:
        """The name of the measurement, by which a second session knows it."""
        return " / ".join(filter(None, map(str, asdict(self).values())))

    @property
    def group(self) -> tuple[str, str, str]:
        """The operation and its shape: all implementations are measured together, in turns."""
        return self.kind, self.name, self.shape

    @property
    def each(self) -> str:
        """The name without the turn: turns are merged under it."""
        return replace(self, turn=0).key.removesuffix(" / 0")

    @property
    def limit(self) -> float:
        """Seconds that it may take."""
        return LONG_LIMIT if self.kind in (STEP, PROFILE, CHECK) else LIMIT


def tasks(device: torch.device, compiled: bool) -> Iterator[Task]:
    """Every measurement that this device is worth, in order.

    Args:
        device: a GPU; or a CPU, for which shapes are cut to size.
        compiled: whether torch.compile is measured too.
    """
    yield Task(RATES)
    steps = [x for x in STEPS if compiled or "torch.compile" not in x]
    if device.type == "cpu":
        steps = [x for x in steps if "CUDA graph" not in x]
    for turn in range(1, TURNS + 1):
        for name in in_turn(steps, turn):
            yield Task(STEP, "training step", implementation=name, part="step", turn=turn)
    if device.type == "cuda":
        yield Task(PROFILE)
        for name in CHECKS:
            yield Task(CHECK, name)
    yield from _optimizers(device, [name for name in TASKS if name in FIRST])
    firsts, others = _operations(device, compiled)
    yield from firsts
    yield from _optimizers(device, [name for name in TASKS if name not in FIRST])
    yield from others


def _optimizers(device: torch.device, tasks: list[str]) -> Iterator[Task]:
    for model in OPTIMIZER_MODELS[device.type]:
        for name in tasks:
            task = TASKS[name]
            names = [*task.implementations, *task.peers]
            for turn in range(1, TURNS + 1):
                for implementation in in_turn(names, turn):
                    yield Task(OPTIMIZER, name, model, implementation, "step", turn)


def _operations(device: torch.device, compiled: bool) -> tuple[list[Task], list[Task]]:
    """Every operation at its first shape; then each at its second, at its third, and so on."""
    found: list[list[Task]] = []
    for i, shapes in enumerate(zip_longest(*(cases(name, device) for name in ORDER))):
        found.append([])
        for name, shape in zip(ORDER, shapes, strict=True):
            if shape is not None:
                found[i] += _case(name, shape, compiled)
    return found[0], [task for tasks in found[1:] for task in tasks]


def cases(name: str, device: torch.device) -> dict[str, Dims]:
    """The shapes of an operation: on a CPU the smallest, which is there to try the session."""
    return OPERATIONS[name].cases(device, (), quick=device.type == "cpu")


def _case(name: str, shape: str, compiled: bool) -> Iterator[Task]:
    operation = OPERATIONS[name]
    names = [*own_implementations(operation, compiled), *operation.peers]
    for turn in range(1, TURNS + 1):
        for part in harness.PASSES:
            for who in in_turn(names, turn):
                if part != "backward" or who not in operation.gradient_in_forward:
                    yield Task(OPERATION, name, shape, who, part, turn)


def in_turn(names: list[str], turn: int) -> list[str]:
    """The implementations forwards, and backwards in each second turn."""
    return names[:: 1 if turn % 2 else -1]
