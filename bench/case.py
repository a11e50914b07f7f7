"""One operation at one shape: its implementations, measured pass by pass on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch import config as functorch

from tritium.bench import harness
from tritium.bench.errors import errors
from tritium.bench.implementations import Loader
from tritium.bench.operations import Dims, Make, Operation
from tritium.bench.tables import Row
from tritium.kernels.roofline import Bound, Device, explain

T = TypeVar("T")
CHUNK = {"cuda": 1 << 27, "cpu": 1 << 24}  # elements of a tensor in float64, for the error


@dataclass(frozen=True)
class Settings:
    """Settings of a run, the same for all its operations."""

    device: torch.device
    rates: Device
    """Measured in this process: the bounds are bounds at these."""
    cache: int
    """Bytes of the last-level cache."""
    dtype: torch.dtype = torch.bfloat16
    sizes: tuple[int, ...] = ()
    quick: bool = False
    compiled: bool = False
    seconds: float = 0.3
    """Limit of the timing of one pass."""


def installed(peers: dict[str, Loader]) -> tuple[dict[str, Loader], list[str]]:
    """The peers that can be imported, and the names of those that are not installed."""
    missing = []
    for name, load in peers.items():
        try:
            load()
        except ModuleNotFoundError:
            missing.append(name)
        except Exception:  # a broken peer becomes a row that says so
            continue
    return {name: load for name, load in peers.items() if name not in missing}, missing


def implementations_of(operation: Operation, compiled: bool) -> dict[str, Loader]:
    """The implementations to measure, Tritium's first."""
    return own_implementations(operation, compiled) | installed(operation.peers)[0]


def own_implementations(operation: Operation, compiled: bool) -> dict[str, Loader]:
    """Tritium's implementations and PyTorch's, which are always there."""
    implementations = operation.tritium | {"eager": lambda: operation.eager}
    if compiled:
        implementations["torch.compile"] = partial(_compile, operation.eager)
    return implementations


def _compile(function: Callable) -> Callable:
    torch.compiler.reset()  # of the shapes before this one
    functorch.donated_buffer = False  # the backward pass runs more than once on one graph
    return torch.compile(function, dynamic=False)


def attempt(make: Callable[[], T]) -> T | str:
    """Return what `make` returns, or why it does not; an exception would keep its tensors."""
    try:
        return make()
    except Exception as problem:  # of any kind: it concerns one implementation alone
        return harness.reason(problem)


def percent_of_bound(bound: Bound, milliseconds: float) -> float:
    """The bound in percent of the time taken: 100 is the limit."""
    return bound.microseconds / milliseconds / 10


class Case:
    """One operation at one shape: its inputs are made once, its functions loaded once.

    Args:
        name: of the operation.
        operation: its benchmark.
        shape: the name of the shape.
        dims: the shape.
        settings: of the run.
    """

    def __init__(
        self, name: str, operation: Operation, shape: str, dims: Dims, settings: Settings
    ) -> None:
        self.name, self.operation, self.shape, self.dims = name, operation, shape, dims
        self.settings = settings
        self.make = Make(settings.dtype, settings.device)
        self.loaders = own_implementations(operation, settings.compiled) | operation.peers
        self.functions: dict[str, Callable | str] = {}
        self.errors: dict[str, dict[str, float]] = {}

    @cached_property
    def copies(self) -> list[list[Tensor]] | str:
        """Inputs in turn, or why there are none."""

        def copies() -> list[list[Tensor]]:
            inputs = self.operation.inputs(self.make, **self.dims)
            return harness.rotated(inputs, self.settings.cache)

        return attempt(copies)

    def passes(self, implementation: str) -> list[str]:
        """The passes that an implementation has, which may make its gradient forward."""
        no_backward = implementation in self.operation.gradient_in_forward
        return [x for x in harness.PASSES if x != "backward" or not no_backward]

    def row(self, implementation: str, pass_name: str) -> Row:
        """Measure one pass: its numbers, or the reason why it has none."""
        row = Row(self.shape, self.dims, implementation, pass_name)
        if isinstance(self.copies, str):
            return replace(row, problem=self.copies)
        if implementation not in self.functions:
            self.functions[implementation] = attempt(self.loaders[implementation])
        function = self.functions[implementation]
        if isinstance(function, str):
            return replace(row, problem=function)
        if implementation not in self.errors:
            self.errors[implementation] = self._errors(implementation, function, self.copies[0])
        found = attempt(partial(self._timing_and_peak, function, self.copies, pass_name))
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        if isinstance(found, str):
            return replace(row, problem=found)
        timing, peak = found
        bound = self._bound(pass_name)
        return replace(
            row, milliseconds=timing.median, lower_quartile=timing.lower_quartile,
            upper_quartile=timing.upper_quartile, bytes=bound.bytes, flops=bound.flops,
            resource=bound.resource, percent_of_bound=percent_of_bound(bound, timing.median),
            peak_bytes=peak, error=self.errors[implementation].get(pass_name),
        )  # fmt: skip

    def _bound(self, pass_name: str) -> Bound:
        sizes = cast(dict[str, Any], self.dims)
        settings = self.settings
        bounds = explain(self.name, **sizes, dtype=settings.dtype, device=settings.rates)
        return getattr(bounds, pass_name)

    def _timing_and_peak(
        self, function: Callable, copies: list[list[Tensor]], pass_name: str
    ) -> tuple[harness.Timing, int | None]:
        calls = [harness.calls_of(function, inputs, pass_name) for inputs in copies]
        seconds = harness.time_calls(calls, self.settings.device, self.settings.seconds)
        return harness.summary(seconds), harness.peak_bytes(calls[0], self.settings.device)

    def _errors(
        self, implementation: str, function: Callable, inputs: list[Tensor]
    ) -> dict[str, float]:
        """Each pass's error at this shape; none where random numbers are not Tritium's."""
        operation = self.operation
        if operation.truth and implementation not in operation.tritium:
            return {}
        truth = operation.truth() if operation.truth else operation.eager
        rows = None if operation.whole else self._rows_of_a_chunk(inputs)
        found = attempt(partial(errors, function, truth, inputs, operation.shared, rows))
        return {} if isinstance(found, str) else found

    def _rows_of_a_chunk(self, inputs: list[Tensor]) -> int:
        own = [x for i, x in enumerate(inputs) if i not in self.operation.shared]
        widest = max(self.dims.get("V", 1), *(x.numel() // max(len(x), 1) for x in own))
        return max(CHUNK[self.settings.device.type] // widest, 1)
