"""Optimizer tasks: rules and precisions with their bounds and their implementations."""

from dataclasses import dataclass, field

import torch

from tritium.bench.implementations import Loader
from tritium.bench.optimizer_implementations import (
    MAX_NORM,
    apex_adamw,
    bitsandbytes,
    clipped,
    exact_lion,
    exact_norm,
    torch_norm,
    torch_optimizer,
    torch_with_masters,
    torchao,
    tritium_norm,
    tritium_optimizer,
)
from tritium.kernels.roofline import Bound, Device, explain

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Task:
    """One kind of step."""

    op: str
    """Operation of tritium.kernels.roofline; the three options below are its own too."""
    implementations: dict[str, Loader]
    """"Tritium" first."""
    truth: Loader
    """The same step of parameters in float64."""
    peers: dict[str, Loader] = field(default_factory=dict)
    """Libraries that may not be installed."""
    dtype: torch.dtype = F32
    """Dtype of weights and gradients."""
    master: str | None = None
    state_dtype: torch.dtype = F32
    extra: dict[str, int] = field(default_factory=dict)
    """Bytes per parameter that an implementation moves beyond the bound, by its design."""

    def bound(self, parameters: int, rates: Device) -> Bound:
        """The least that a step moves and takes."""
        return explain(
            self.op, N=parameters, dtype=self.dtype, master=self.master,
            state_dtype=self.state_dtype, device=rates,
        ).both  # fmt: skip


EXACT = torch_optimizer("AdamW")
FUSED, FOREACH = torch_optimizer("AdamW", fused=True), torch_optimizer("AdamW", foreach=True)
COPIES = 4 + 4 + 4  # bytes: gradients written and read in float32, masters read once more


def _bf16_adamw(
    implementations: dict[str, Loader],
    peers: dict[str, Loader],
    *,
    master: str | None = None,
    state_dtype: torch.dtype = F32,
    extra: dict[str, int] | None = None,
) -> Task:
    tritium = tritium_optimizer("AdamW", master=master, state_dtype=state_dtype)
    return Task(
        "adamw",
        {"Tritium": tritium} | implementations,
        EXACT,
        peers,
        BF16,
        master,
        state_dtype,
        extra or {},
    )


def _rule(name: str, op: str = "", fused: bool = True, **options) -> Task:
    """A rule that PyTorch has too, in float32."""
    ways = ("fused", "foreach") if fused else ("foreach",)
    torchs = {f"torch {way}": torch_optimizer(name, **{way: True}, **options) for way in ways}
    tritium = {"Tritium": tritium_optimizer(name, **options)}
    return Task(op or name.lower(), tritium | torchs, torch_optimizer(name, **options))


def _norm(dtype: torch.dtype) -> Task:
    implementations = {"Tritium": tritium_norm, "torch": torch_norm}
    return Task("grad_norm", implementations, exact_norm, dtype=dtype)


TASKS: dict[str, Task] = {
    "AdamW float32": Task(
        "adamw",
        {"Tritium": tritium_optimizer("AdamW"), "torch fused": FUSED, "torch foreach": FOREACH},
        EXACT, {"apex": apex_adamw()},
    ),
    "AdamW bf16, float32 master": _bf16_adamw(
        {"torch fused, copies": torch_with_masters},
        {"apex": apex_adamw(capturable=True, master_weights=True)},
        master="float32", extra={"torch fused, copies": COPIES},
    ),
    "AdamW bf16, split master": _bf16_adamw(
        {"torch fused, copies": torch_with_masters}, {}, master="split",
        extra={"torch fused, copies": COPIES + 2},
    ),
    "AdamW bf16, float32 moments": _bf16_adamw({}, {"apex": apex_adamw()}),
    "AdamW bf16, bf16 moments": _bf16_adamw(
        {"torch fused": FUSED, "torch foreach": FOREACH}, {"torchao": torchao("_AdamW")},
        state_dtype=BF16,
    ),
    "AdamW bf16, 8-bit moments": _bf16_adamw(
        {},
        {
            "torchao 8-bit": torchao("AdamW8bit"), "torchao fp8": torchao("AdamWFp8"),
            "bitsandbytes": bitsandbytes("AdamW8bit"),
        },
        state_dtype=torch.uint8,
    ),
    "Adam float32": _rule("Adam"),
    "SGD float32, momentum": _rule("SGD", "sgd_momentum", momentum=0.9),
    "RMSprop float32": _rule("RMSprop", fused=False),
    "Adagrad float32": _rule("Adagrad"),
    "Lion float32": Task(
        "lion", {"Tritium": tritium_optimizer("Lion")}, exact_lion,
        {"bitsandbytes": bitsandbytes("Lion32bit")},
    ),
    "norm float32": _norm(F32),
    "norm bf16": _norm(BF16),
    "clip + AdamW float32": Task(
        "adamw_clipped",
        {
            "Tritium": tritium_optimizer("AdamW", max_grad_norm=MAX_NORM),
            "torch clip, fused": clipped(FUSED), "torch clip, foreach": clipped(FOREACH),
        },
        clipped(EXACT), extra={"torch clip, fused": 2 * 4, "torch clip, foreach": 2 * 4},
    ),
    "clip + AdamW bf16, float32 master": Task(
        "adamw_clipped",
        {
            "Tritium": tritium_optimizer("AdamW", max_grad_norm=MAX_NORM, master="float32"),
            "torch clip, fused, copies": clipped(torch_with_masters),
        },
        clipped(EXACT), dtype=BF16, master="float32",
        extra={"torch clip, fused, copies": 2 * 2 + COPIES},
    ),
}  # fmt: skip
