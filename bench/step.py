"""The training step, accounted for: `python -m tritium.bench step [--write]`.

On a GPU one step, captured in a CUDA graph, is profiled: for each kind its launches, milliseconds,
the least bytes and the least time by `tritium.kernels.roofline`, and what share of the measured
time that is. Without a GPU its launches are counted, by kind, block and micro-batch.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from rich.table import Table

import train
from tritium.bench import harness, tables
from tritium.bench import step_launches as count
from tritium.bench.ends import FailedError, WrongInputError, as_wrong_input, at_least
from tritium.kernels.roofline import Device, explain, find_device
from tritium.kernels.units import counted
from tritium.model import ModelConfig, Transformer
from tritium.training.cuda_graph import WARM_UP, training_step
from tritium.training.optim import OptimizerConfig
from tritium.training.precision import ComputeConfig

COUNTS, PROFILE = "step_launches.md", "step.md"  # in the folder of results
WIDTH = 110
PASSES = ("forward", "backward")
GAPS = "gaps"
RANGE = re.compile(r"(Optimizer|ProfilerStep|autograd::|## )")  # named, where no flag says so

# Kinds of a GPU's kernels, by their names; the first that fits counts.
KERNELS = {
    count.ATTENTION: r"fmha|flash|sdpa|attention|cudnn",  # and the passes around cuDNN's
    count.PRODUCTS: r"gemm|nvjet|cublas|splitk|xmma",
    count.CASTS: r"copy|memcpy|CatArray",
    count.FILLS: r"fill|memset",
    count.EMBEDDING: r"embedding|sort|indexSelect|index_kernel|gather|grad_weight|scatter|unique",
    count.ADDITIONS: r"_add|Add",
    count.OPTIMIZER: r"_(prepare|update)_kernel",  # named after their rules: adam, lion
}


def main(
    layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50304,
    length: int = 1024, batch: int = 64, micro_batches: int = 4, write: bool = False,
) -> None:  # fmt: skip
    """Print what a training step in bfloat16 consists of.

    Args:
        layers: blocks of the model.
        width: of the model.
        heads: of queries, and as many of keys and values.
        vocabulary: of the model.
        length: tokens of a sequence.
        batch: sequences of a step.
        micro_batches: parts of a step, each with a forward and a backward pass.
        write: keep the tables in the folder of results: step.md of a GPU, step_launches.md without.
    """
    at_least(1, micro_batches=micro_batches, batch=batch)
    if batch % micro_batches:
        raise WrongInputError(f"{micro_batches} micro-batches do not divide {batch}")
    with as_wrong_input(ValueError):
        config = ModelConfig(
            vocab_size=vocabulary, n_layers=layers, d_model=width, n_heads=heads, max_seq_len=length
        )
    shape = f"{counted(layers, 'layer')}, {width} wide, {counted(heads, 'head')}"
    shape += f", vocabulary {vocabulary:,}"
    parts = f"{batch} x {length} tokens in {counted(micro_batches, 'micro-batch')}"
    cuda = torch.cuda.is_available()
    name = harness.device_name(torch.device("cuda" if cuda else "cpu"))
    lines = [
        f"`python -m tritium.bench step --micro-batches {micro_batches} --write`, torch "
        f"{torch.__version__}, {name}: {shape}, {parts}, bfloat16, AdamW with clipping."
    ]
    if cuda:
        found = [profile_table(config, batch, micro_batches)]
    else:
        account = count.account()
        found = [block_table(account), total_table(account, layers, micro_batches)]
        lines += [
            "Launches counted without a GPU: none was run. First the launches of one block, in the "
            "first micro-batch of a step and in each further one; then those of a whole step.",
            *(f"Casts and copies, {phase}: {why}." for phase, why in count.REASONS.items()),
            "Optimizer: "
            + "; ".join(f"`{name}`: {what}" for name, what in count.OF_OPTIMIZER.items())
            + ".",
        ]
    path = tables.results() / (PROFILE if cuda else COUNTS) if write else None
    tables.present(lines, *found, width=WIDTH, write_to=path)


def block_table(account: count.Account) -> Table:
    """Tabulate the launches of a block, by kind."""
    parts = {"first": account.first_block, "further": account.block}
    table = Table("kind", *(f"{phase}, {part}" for phase in PASSES for part in parts))
    _add_rows(table, [_of(c, phase) for phase in PASSES for c in parts.values()])
    return table


def total_table(account: count.Account, layers: int, micro_batches: int) -> Table:
    """Tabulate the launches of a step, by kind."""
    total = account.total(layers, micro_batches)
    phases = (*PASSES, "optimizer")
    table = Table("kind", *phases, "step")
    columns = [_of(total, phase) for phase in phases]
    _add_rows(table, [*columns, sum(columns, Counter())])
    return table


def _of(counts: count.Counts, phase: str) -> Counter[str]:
    return Counter({kind: n for (of, kind), n in counts.items() if of == phase})


def _add_rows(table: Table, columns: list[Counter[str]]) -> None:
    for kind in count.KINDS:
        if any(column[kind] for column in columns):
            table.add_row(kind, *(f"{column[kind]:,}" for column in columns))
    table.add_row("all", *(f"{column.total():,}" for column in columns))


class Floor(NamedTuple):
    """The least bytes, and the least milliseconds, of one kind."""

    bytes: float
    milliseconds: float


def floors(config: ModelConfig, batch: int, device: Device) -> dict[str, Floor]:
    """Return the least that each kind of a step takes; kinds that need not be are left out.

    Products multiply by every weight of a matrix three times; attention takes two products forward
    and five backward, over the half of the positions that are not later. Weights are cast once.
    """
    T, D, V = batch * config.max_seq_len, config.d_model, config.vocab_size
    L, H, G, K = config.n_layers, config.n_heads, config.kv_heads, config.head_width
    F = config.feed_forward_width
    matrices = L * (D * (H + 2 * G) * K + H * K * D + 3 * D * F)
    parameters = matrices + V * D * (1 if config.tie_embeddings else 2) + (2 * L + 1) * D
    products = 6 * T * (matrices + V * D)
    attention = L * 7 * T * config.max_seq_len * H * K  # half of 2 · 7 products
    least = {
        count.PRODUCTS: Floor(0, 1e3 * products / device.matrix_16),
        count.ATTENTION: Floor(0, 1e3 * attention / device.matrix_16),
        count.CASTS: Floor(6 * matrices, 1e3 * 6 * matrices / device.copy),
    }
    operations = {
        count.NORMS: [("add_rms_norm", 2 * L, {"T": T, "D": D}), ("rms_norm", 1, {"T": T, "D": D})],
        count.POSITIONS: [("qk_norm_rope", L, {"T": T, "H": H, "G": G, "K": K})],
        count.ACTIVATION: [("swiglu", L, {"T": T, "F": F})],
        count.LOSS: [("cross_entropy", 1, {"T": T, "V": V})],
        count.EMBEDDING: [("embedding", 1, {"T": T, "D": D, "V": V})],
        count.OPTIMIZER: [("adamw_clipped", 1, {"N": parameters})],
    }
    for kind, calls in operations.items():
        bytes = milliseconds = 0.0
        for op, times, dims in calls:
            dtype = torch.float32 if kind == count.OPTIMIZER else torch.bfloat16
            sizes: dict[str, Any] = dims
            bound = explain(op, **sizes, dtype=dtype, device=device).both
            bytes += times * bound.bytes
            milliseconds += times * bound.microseconds / 1e3
        least[kind] = Floor(bytes, milliseconds)
    return least


def kind_of(kernel: str) -> str:
    """Return the kind of a GPU's kernel, by its name."""
    for start, kind in count.OWN.items():
        if kernel.startswith(start):
            return kind
    for kind, pattern in KERNELS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return count.OTHER


class Busy(NamedTuple):
    """Launches and milliseconds of one kind."""

    launches: int
    milliseconds: float


def by_kind(kernels: Iterable[tuple[str, float, float]]) -> dict[str, Busy]:
    """Sum up kernels (name, begin and end in microseconds), and the gaps between them."""
    found: dict[str, list[float]] = defaultdict(list)
    reached, idle = None, 0.0
    for name, begin, end in sorted(kernels, key=lambda x: x[1]):
        found[kind_of(name)].append((end - begin) / 1e3)
        if reached is not None and begin > reached:
            idle += (begin - reached) / 1e3
        reached = end if reached is None else max(reached, end)
    result = {kind: Busy(len(found[kind]), sum(found[kind])) for kind in count.KINDS if found[kind]}
    return result | {GAPS: Busy(0, idle)}


def profile_table(config: ModelConfig, batch: int, micro_batches: int) -> Table:
    """Profile a step on the GPU and tabulate it, with the floor of each kind beside it."""
    try:
        device = find_device(None)
    except ValueError:  # of no known datasheet
        device = harness.measured_device(torch.device("cuda"), 0.2)
    least = floors(config, batch, device)
    found = by_kind(profiled_step(config, batch, micro_batches))
    table = Table("kind", "launches", "ms", "least bytes, GB", "floor, ms", "of the floor, %")
    for kind in [kind for kind in (*count.KINDS, GAPS) if kind in found or kind in least]:
        busy, floor = found.get(kind, Busy(0, 0.0)), least.get(kind, Floor(0, 0.0))
        share = f"{100 * floor.milliseconds / busy.milliseconds:.0f}" if busy.milliseconds else ""
        table.add_row(
            kind, f"{busy.launches:,}", f"{busy.milliseconds:.2f}", f"{floor.bytes / 1e9:.2f}",
            f"{floor.milliseconds:.2f}", share,
        )  # fmt: skip
    spent = sum(busy.milliseconds for busy in found.values())
    floor = sum(x.milliseconds for x in least.values())
    table.add_row(
        "all", f"{sum(x.launches for x in found.values()):,}", f"{spent:.2f}",
        f"{sum(x.bytes for x in least.values()) / 1e9:.2f}", f"{floor:.2f}",
        f"{100 * floor / spent:.0f}",
    )  # fmt: skip
    return table


def profiled_step(
    config: ModelConfig, batch: int, micro_batches: int
) -> list[tuple[str, float, float]]:
    """Return the kernels of one step on the GPU: name, begin and end in microseconds."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Transformer(config)
    arithmetic = ComputeConfig(precision="bfloat16").apply(model, device)
    optimizer = OptimizerConfig().make(model)
    tokens = torch.randint(config.vocab_size, (2, batch, config.max_seq_len))

    def gradients(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return train.accumulate_gradients(model, parts, batch // micro_batches, arithmetic.cast)

    step = training_step(gradients, optimizer, graph=True, log=print)
    for _ in range(WARM_UP + 3):
        step(tuple(tokens))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(tuple(tokens))
        torch.cuda.synchronize()
    return device_events(profile.events() or ())


def device_events(events: Iterable[Any]) -> list[tuple[str, float, float]]:
    """Return the kernels, copies and fills among a profiler's events, and when they ran.

    A range that a program or PyTorch names, such as Optimizer.step, is an event of the device too,
    as long as all that runs inside it: counted, it would double the time of its kernels.
    """
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if str(event.device_type).endswith("CUDA")
        and not getattr(event, "is_user_annotation", False)
        and not RANGE.match(event.name)
    ]
    if not found:
        raise FailedError("the profiler saw no kernel; run no other one (nsys, ncu) beside it")
    return found
