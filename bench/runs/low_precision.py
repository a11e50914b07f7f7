"""Training runs with low-precision weights and moments: `python -m tritium.bench low_precision`.

A small language model learns the bytes of Python's standard library, again and again from the same
three seeds, and only what its optimizer keeps differs: the arithmetic of the model is float32, on
parameters converted from the dtype that they are kept in. The seed decides weights and batches.
"""

from collections.abc import Callable
from io import StringIO
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.func import functional_call

from tritium.bench import tables
from tritium.bench.ends import WrongInputError, at_least
from tritium.bench.harness import device_name
from tritium.data.corpus import Source, documents
from tritium.kernels import AdamW
from tritium.model import ModelConfig, Transformer
from tritium.training.schedule import Budget, Schedule

RESULTS = "low_precision.md"  # in the folder of results
WIDTH = 120
CONFIG = ModelConfig(vocab_size=256, n_layers=2, d_model=64, n_heads=2, max_seq_len=32)
BATCH = 8  # sequences
VALIDATION = 512  # sequences
TRAIN_BYTES = 2_000_000
BF16, U8 = torch.bfloat16, torch.uint8

Make = Callable[..., torch.optim.Optimizer]

IMPLEMENTATIONS: dict[str, tuple[torch.dtype, Make, dict]] = {
    "float32": (torch.float32, AdamW, {}),
    "bfloat16, float32 master": (BF16, AdamW, {"master": "float32"}),
    "bfloat16, split": (BF16, AdamW, {"master": "split"}),
    "bfloat16, stochastic": (BF16, AdamW, {"master": None}),
    "float32, bfloat16 moments": (torch.float32, AdamW, {"state_dtype": BF16}),
    "bfloat16, stochastic, bfloat16 moments": (BF16, AdamW, {"master": None, "state_dtype": BF16}),
    "float32, 8-bit moments": (torch.float32, AdamW, {"state_dtype": U8}),
    "bfloat16, stochastic, 8-bit moments": (BF16, AdamW, {"master": None, "state_dtype": U8}),
    "bfloat16, torch.optim.AdamW": (BF16, torch.optim.AdamW, {}),
}
"""Storage of the parameters, and the optimizer; the others are compared with the first."""


def sequences() -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and other sequences `[VALIDATION, L + 1]` to measure the loss on."""
    length, text = CONFIG.max_seq_len + 1, bytearray()
    wanted = TRAIN_BYTES + VALIDATION * length
    for document in documents():
        text += document.encode()
        if len(text) >= wanted:
            break
    tokens = torch.frombuffer(text[:wanted], dtype=torch.uint8).long()
    return tokens[:TRAIN_BYTES], tokens[TRAIN_BYTES:].view(VALIDATION, length)


def train(implementation: str, seed: int, steps: int, data: tuple[Tensor, Tensor]) -> float:
    """Train from `seed` and return the loss on the sequences kept aside, in nats per byte."""
    dtype, make, options = IMPLEMENTATIONS[implementation]
    tokens, validation = data
    torch.manual_seed(seed)
    model = Transformer(CONFIG).to(device=tokens.device, dtype=dtype)
    if make is AdamW:
        options = options | {"max_grad_norm": 1.0, "seed": seed}
    optimizer = make(model.parameters(), weight_decay=0.1, betas=(0.9, 0.99), **options)
    generator = torch.Generator().manual_seed(seed)
    offs_L = torch.arange(CONFIG.max_seq_len + 1)
    schedule = Schedule(learning_rate=3e-3, warmup_steps=steps // 20, final_lr=0.1)
    for step in range(steps):
        lr = schedule.rate(step, Budget(steps=steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        first_B = torch.randint(len(tokens) - len(offs_L), (BATCH, 1), generator=generator)
        loss_of(model, tokens[first_B + offs_L]).backward()
        if make is not AdamW:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss_of(model, validation).item()


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    """The loss of sequences `[B, L + 1]`, computed in float32 whatever the parameters are."""
    wide = {name: x.float() for name, x in (*model.named_parameters(), *model.named_buffers())}
    return functional_call(model, wide, (tokens[:, :-1], tokens[:, 1:]))


def verdict(losses: list[float], base: list[float]) -> str:
    """Distance of the mean from that of `base`, in standard errors of the difference."""
    error = ((stdev(losses) ** 2 + stdev(base) ** 2) / len(base)) ** 0.5
    distance = (mean(losses) - mean(base)) / error
    return f"{distance:+.1f}, {'within' if abs(distance) <= 2 else 'outside'}"


def main(steps: int = 1000, seeds: int = 3, write: bool = False) -> None:
    """Train a small language model with each way of keeping parameters and moments.

    Args:
        steps: of each run.
        seeds: runs of each.
        write: keep the table in low_precision.md, in the folder of results.
    """
    if seeds < 2:
        raise WrongInputError(f"--seeds must be at least 2 to have a spread, got {seeds}")
    at_least(1, steps=steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, validation = (x.to(device) for x in sequences())
    runs = [(name, seed) for name in IMPLEMENTATIONS for seed in range(seeds)]
    losses: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for name, seed in track(runs, "runs", transient=True):
        losses[name].append(train(name, seed, steps, (tokens, validation)))
    base = losses[next(iter(IMPLEMENTATIONS))]
    rows = [
        (name, f"{mean(own):.4f}", f"{stdev(own):.4f}", "" if own is base else verdict(own, base))
        for name, own in losses.items()
    ]

    def table(style: box.Box) -> Table:
        result = Table("kept", "loss, nats/byte", "spread", "off float32, SE", box=style)
        for row in rows:
            result.add_row(*row)
        return result

    count = sum(p.numel() for p in Transformer(CONFIG).parameters())
    lines = [
        f"Loss of {VALIDATION} held-out sequences after {steps} steps of {BATCH} sequences of "
        f"{CONFIG.max_seq_len} bytes; {Source()}; {count} parameters; {device_name(device)}.",
        f"Mean and standard deviation over {seeds} seeds. Last column: the distance from float32 "
        "in standard errors of the difference; within two of them, or outside.",
    ]
    Console(width=WIDTH).print(*lines, table(box.SIMPLE), sep="\n")
    if write:
        command = f"python -m tritium.bench low_precision --steps {steps} --seeds {seeds} --write"
        file = StringIO()
        print(f"`{command}`, torch {torch.__version__}", *lines, sep="\n\n", file=file)
        Console(file=file, width=WIDTH).print(table(box.MARKDOWN))
        tables.write(tables.results() / RESULTS, file.getvalue().encode())
