"""The self-check at start: error and time of every kernel of a run, compared with its reference.

Each operation of the run (`self_check_cases`) runs forward and backward as its kernel, as its
reference, and as its reference in float64. For every output and gradient

    max |kernel - exact| <= 4 · max |reference - exact| + 4 · eps · max |exact|

with eps of its dtype. That is twice what the tests allow: a wrong kernel errs by far more, and a
false alarm would slow the run down.

The optimizer, which does not compute in float64, takes one step from one state by its kernel and by
its reference. Different rounding in float32 is allowed, 1e-5 of a number and 1e-6 of the largest;
of what is stored in fewer bits, and of Lion's signs of almost zero, one number in 500 may be off by
more, by 2 % of the largest or by two learning rates. Muon multiplies in bfloat16: of its matrices
each number may be off by a tenth of the largest change, of its rows' moments by a tenth of the
largest.

A kernel that errs more, or does not run, is sent to its reference for the rest of the process
(`kernels.fall_back`), and the reason is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from io import StringIO
from math import isnan, nan

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tritium.kernels import fall_back, runtime
from tritium.kernels.optimizers import join_reference
from tritium.kernels.runtime import references, uses_triton
from tritium.kernels.units import duration
from tritium.model.transformer import Transformer
from tritium.training.optim import Optimizer, OptimizerConfig
from tritium.training.precision import Arithmetic
from tritium.training.run import random_state
from tritium.training.self_check_cases import Case, Random, cases, sample_groups

SLACK = 4.0
OFF = 1 / 500  # share of the numbers that may be rounded to a neighbour
PRODUCTS = 0.1  # of the largest number, by which products in bfloat16 may change what Muon makes

Tensors = dict[str, Tensor]
Kept = dict[str, tuple[Tensor, bool]]


@dataclass(frozen=True)
class Finding:
    """Result of one comparison."""

    op: str
    shape: str
    """Shape of the first input; of an optimizer, the numbers of parameters and elements."""
    dtype: torch.dtype
    passes: str
    error: float = nan
    """Error of the output or gradient that comes closest to its limit, or exceeds it most."""
    allowed: float = nan
    seconds: float = nan
    """Time of the passes by the kernel."""
    reference_seconds: float = nan
    reason: str = ""
    """Reason why the reference runs; empty if the kernel does."""


def check(
    model: Transformer,
    optimizer: Optimizer,
    config: OptimizerConfig,
    *,
    batch: int,
    arithmetic: Arithmetic,
    samples: bool,
    log: Callable[[str], object],
) -> None:
    """Compare every kernel that a run will use with its reference; send those that fail there.

    If no kernel would run, it only says so.

    Args:
        model: the model to be trained, on its device; it is not changed.
        optimizer: its optimizer, which is not changed.
        config: settings of the optimizer.
        batch: sequences of a forward pass.
        arithmetic: arithmetic of the run.
        samples: whether text is sampled.
        log: called with the table, and with one line for each fallback.
    """
    device = model.embedding.weight.device
    if not uses_triton(model.embedding.weight):
        cause = "TRITIUM_REFERENCE=1" if runtime.REFERENCE else "no GPU"
        log(f"Kernels: none, every operation runs on its PyTorch reference ({cause})")
        return
    started = time.perf_counter()
    with random_state.preserved(device):
        calls = cases(model, batch, arithmetic, samples=samples)
        findings = [*map(compare, calls), compare_step(optimizer, config)]
    reasons = {finding.op: finding.reason for finding in findings if finding.reason}
    fall_back(*reasons)
    where = "Triton on cuda" if device.type == "cuda" else "Triton, interpreted"
    log(table(findings, where, time.perf_counter() - started))
    for op, reason in reasons.items():
        log(f"{op} falls back to its reference: {escape(reason)}")


def compare(case: Case) -> Finding:
    """Compare one operation with its reference and the exact result."""
    random = Random(case.inputs[0].device)
    dys: list[Tensor] = []

    def results(dtype: torch.dtype | None = None) -> Tensors:
        inputs = [x.to(dtype) if dtype and x.is_floating_point() else x for x in case.inputs]
        inputs = [x.detach().requires_grad_(i in case.gradients) for i, x in enumerate(inputs)]
        with torch.set_grad_enabled(bool(case.gradients)):
            ys = case.call(*inputs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        found = {f"output {i}": y.detach() for i, y in enumerate(ys)}
        if case.gradients:
            dys[:] = dys or [random(y.shape, y.dtype) if y.ndim else torch.ones_like(y) for y in ys]
            own = [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]
            dxs = torch.autograd.grad(ys, [inputs[i] for i in case.gradients], own)
            found |= {f"gradient {i}": dx for i, dx in zip(case.gradients, dxs, strict=True)}
        return found

    def error(actual: Tensors) -> tuple[float, float, str]:
        with references(case.op):
            return _worst(actual, results(), results(torch.float64))

    first = case.inputs[0]
    passes = "forward, backward" if case.gradients else "forward"
    finding = Finding(case.op, " × ".join(map(str, first.shape)), first.dtype, passes)
    return _timed(finding, results, error)


def compare_step(optimizer: Optimizer, config: OptimizerConfig) -> Finding:
    """Compare a step of an optimizer, its clipping included, with its reference."""
    op, both = type(optimizer).__name__, [config.make_of(sample_groups(optimizer)) for _ in "ab"]
    kernel, reference = both
    params = [[p for g in each.param_groups for p in g["params"]] for each in both]
    random = Random(params[0][0].device)

    def draw_gradients() -> None:
        for p, q in zip(*params, strict=True):
            p.grad = random(tuple(p.shape), p.dtype)
            q.grad = p.grad.clone()

    def results() -> Kept:
        kernel.step()
        return _kept(kernel)

    def error(actual: Kept) -> tuple[float, float, str]:
        with references(op):
            reference.step()
        signs = 2.1 * reference.param_groups[0]["lr"] if config.name == "lion" else 0.0
        expected = _kept(reference)
        return _worst_step(actual, expected, signs, _made_by_products(reference, before, expected))

    draw_gradients()
    with references(op):  # so that both begin from one state that is not zero
        reference.step()
    kernel.load_state_dict(deepcopy(reference.state_dict()))
    with torch.no_grad():
        for p, q in zip(*params, strict=True):
            p.copy_(q)
    before = _kept(reference)
    before = {name: (x.clone(), coarse) for name, (x, coarse) in before.items()}
    draw_gradients()
    shape = f"{len(params[0])} tensors, {sum(p.numel() for p in params[0]):,}"
    return _timed(Finding(op, shape, params[0][0].dtype, "step"), results, error, kernel.step)


def table(findings: list[Finding], where: str, seconds: float) -> str:
    """Format the findings as the text of a table."""
    title = f"Self-check: kernels against their references, {seconds:.1f} s"
    result = Table("operation", "passes", "shape", "dtype", box=None, title=title, title_style="",
                   title_justify="left")  # fmt: skip
    for column in ("error", "allowed", "kernel", "reference"):
        result.add_column(column, justify="right")
    result.add_column("runs on")
    fallen = {finding.op for finding in findings if finding.reason}
    for finding in findings:
        result.add_row(
            finding.op, finding.passes, finding.shape, str(finding.dtype).removeprefix("torch."),
            f"{finding.error:.1e}", f"{finding.allowed:.1e}", _duration(finding.seconds),
            _duration(finding.reference_seconds),
            "reference" if finding.op in fallen else where,
        )  # fmt: skip
    text = StringIO()
    Console(file=text, width=200).print(result)  # full width, on a small terminal too
    return "\n".join(map(str.rstrip, text.getvalue().splitlines()))


def time_of(call: Callable[[], object]) -> float:
    """Return the seconds of a call: the median over some hundredths of a second, after a first.

    Of kernels that are interpreted, whose speed says nothing, it is one call's.
    """
    if runtime.CPU_KERNELS:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    from torch.utils.benchmark import Timer

    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median


def _timed(
    finding: Finding, results: Callable, error: Callable, call: Callable[[], object] | None = None
) -> Finding:
    worst, seconds = nan, nan
    try:
        worst, allowed, reason = error(results())
        seconds = time_of(call or results)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        said = next(iter(str(problem).strip().splitlines()), "no message")
        allowed, reason = nan, f"it does not run ({type(problem).__name__}: {said})"
    with references(finding.op):
        reference_seconds = time_of(call or results)
    return replace(
        finding, error=worst, allowed=allowed, reason=reason, seconds=seconds,
        reference_seconds=reference_seconds,
    )  # fmt: skip


def _worst(actual: Tensors, rounded: Tensors, exact: Tensors) -> tuple[float, float, str]:
    """Return the largest error in units of its limit, the limit, and the problem, if any."""
    found = []
    for name, e in exact.items():
        o, r = actual[name], rounded[name]
        if (o.shape, o.dtype) != (r.shape, r.dtype):
            return (
                nan,
                nan,
                f"its {name} is {o.dtype} {list(o.shape)}, not {r.dtype} {list(r.shape)}",
            )
        floor = SLACK * torch.finfo(o.dtype).eps * e.abs().max().item()
        allowed = SLACK * (r - e).abs().max().item() + floor
        found.append(_judged(name, (o - e).abs().max().item(), allowed))
    return max(found, key=_excess)


def _worst_step(
    actual: Kept, expected: Kept, signs: float, allowances: dict[str, float]
) -> tuple[float, float, str]:
    found = []
    for name, (y, coarse) in expected.items():
        x, largest = actual[name][0], y.abs().max().item()
        distance = (x - y).abs()
        if name in allowances:
            allowed = max(allowances[name], 0.02 * largest if coarse else 0.0)
            found.append(_judged(name, distance.max().item(), allowed))
            continue
        off = (~(distance <= 1e-5 * y.abs() + 1e-6 * largest)).float().mean().item()
        if coarse or signs:
            allowed = max(0.02 * largest, signs)
            if off > OFF:
                return nan, nan, f"of its {name} {off:.1%} are off, allowed are {OFF:.1%}"
        else:
            allowed = 1.1e-5 * largest
        found.append(_judged(name, distance.max().item(), allowed))
    return max(found, key=_excess)


def _made_by_products(optimizer: Optimizer, before: Kept, after: Kept) -> dict[str, float]:
    """Return by how much the numbers may differ that Muon's products make, by name."""
    found, i = {}, 0
    for group in optimizer.param_groups:
        for _ in group["params"]:
            value, rows = f"value of parameter {i}", f"row_second_moment of parameter {i}"
            if group.get("use_muon"):
                change = after[value][0] - before[value][0]
                found[value] = PRODUCTS * change.abs().max().item()
                if rows in after:
                    found[rows] = PRODUCTS * after[rows][0].abs().max().item()
            i += 1
    return found


def _judged(name: str, error: float, allowed: float) -> tuple[float, float, str]:
    wrong = not error <= allowed  # also where it is NaN
    said = f"its {name} errs by {error:.1e}, allowed are {allowed:.1e}" if wrong else ""
    return error, allowed, said


def _excess(judged: tuple[float, float, str]) -> tuple[bool, float]:
    error, allowed, reason = judged
    return bool(reason), error / allowed if allowed else 0.0


def _kept(optimizer: Optimizer) -> Kept:
    """Return the results of a step by name, and whether each has fewer bits than float32."""
    found: Kept = {}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        state = optimizer.state[p]
        named = {"value": p.detach(), **state}
        if "remainder" in state:
            named["value"] = join_reference(p.detach(), named.pop("remainder"))
        for name, x in named.items():
            found[f"{name} of parameter {i}"] = x.float(), x.dtype != torch.float32
    if optimizer.grad_norm is not None:
        found["gradient norm"] = optimizer.grad_norm, False
    return found


def _duration(seconds: float) -> str:
    return "-" if isnan(seconds) else duration(seconds)
