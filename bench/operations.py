"""Operations to measure, each at shapes of real models; its benchmark is one entry here."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tritium.bench import implementations
from tritium.bench.implementations import EAGER, Loader, liger, norm, own, quack

Dims = dict[str, int]


@dataclass(frozen=True)
class Make:
    """Makes the inputs of an operation."""

    dtype: torch.dtype
    device: torch.device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the dtype measured, whose gradient is asked for."""
        x = torch.randn(*shape, device=self.device).mul_(scale)
        return x.to(self.dtype).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers from 0 to `high - 1`."""
        return torch.randint(high, shape, device=self.device)

    def angles(self, L: int, K: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions, `[L, K/2]`, float32."""
        rates_J = 10_000.0 ** (-torch.arange(0, K, 2, device=self.device) / K)
        angles_LJ = torch.arange(L, device=self.device)[:, None] * rates_J
        return angles_LJ.cos(), angles_LJ.sin()


@dataclass(frozen=True)
class Operation:
    """One operation's benchmark."""

    shapes: dict[str, Dims]
    """By the model that they are from, without `rows`."""
    axis: str
    """The dimension that `--sizes` sets, and the plot's."""
    smallest: Dims
    """The shape of `--quick`."""
    inputs: Callable[..., tuple[Tensor, ...]]
    """From a Make and the dimensions by name."""
    tritium: dict[str, Loader]
    eager: Callable
    peers: dict[str, Loader] = field(default_factory=dict)
    truth: Loader | None = None
    """The reference, where eager's random numbers are others than Tritium's."""
    shared: tuple[int, ...] = ()
    """Positions of the inputs that all rows share; others have their rows in dimension 0."""
    whole: bool = False
    """Whether a row's output depends on its position, or on other rows."""
    gradient_in_forward: tuple[str, ...] = ()
    """Implementations that have nothing left to measure in the backward pass alone."""
    rows: tuple[str, int, int] | None = None
    """The dimension that every shape shares, its size on a GPU and on a CPU."""
    cpu_shapes: int | None = None
    """Number of shapes measured on a CPU: the first ones."""

    def cases(self, device: torch.device, sizes: tuple[int, ...], quick: bool) -> dict[str, Dims]:
        """The shapes to measure, by name."""
        if quick:
            return {"smallest": self.smallest}
        cpu = device.type == "cpu"
        rows: Dims = {}
        if self.rows:
            name, on_gpu, on_cpu = self.rows
            rows = {name: on_cpu if cpu else on_gpu}
        if sizes:
            first = next(iter(self.shapes.values()))
            return {f"{self.axis} = {n}": rows | first | {self.axis: n} for n in sizes}
        named = list(self.shapes.items())[: self.cpu_shapes if cpu else None]
        return {name: rows | dims for name, dims in named}


WIDTHS = {
    "GPT-2 124M": {"D": 768}, "Llama-3.2 1B": {"D": 2048}, "Llama-3 8B": {"D": 4096},
    "Llama-3 70B": {"D": 8192},
}  # fmt: skip
FEATURES = {
    "Qwen2.5 0.5B": {"F": 4864}, "Llama-3.2 1B": {"F": 8192}, "Llama-3 8B": {"F": 14336},
    "Qwen2.5 7B": {"F": 18944},
}  # fmt: skip
VOCABULARIES = {
    "Llama-2": {"V": 32000}, "GPT-2": {"V": 50257}, "Llama-3": {"V": 128256},
    "Qwen2.5": {"V": 151936},
}  # fmt: skip
LAYERS = {
    "GPT-2 124M": {"D": 768, "V": 50304}, "Llama-3.2 1B": {"D": 2048, "V": 128256},
    "Qwen2.5 7B": {"D": 3584, "V": 152064}, "Llama-3 8B": {"D": 4096, "V": 128256},
}  # fmt: skip
ROWS = {
    "1K keys": {"N": 1024}, "4K keys": {"N": 4096}, "16K keys": {"N": 16384},
    "GPT-2 vocabulary": {"N": 50304}, "Llama-3 vocabulary": {"N": 128256},
}  # fmt: skip
HEADS = {
    "GPT-2 124M": {"H": 12, "K": 64}, "Qwen2.5 7B": {"H": 28, "K": 128},
    "Llama-3 8B": {"H": 32, "K": 128}, "Llama-3 70B": {"H": 64, "K": 128},
}  # fmt: skip
PAIRS = {"CLIP ViT-B/32": {"D": 512}, "CLIP ViT-L/14": {"D": 768}, "CLIP ViT-bigG": {"D": 1280}}

TOKENS = ("T", 32768, 128)
MIB = 1 << 20


def _softmax(name: str, peers: dict[str, Loader]) -> Operation:
    return Operation(
        ROWS, "N", {"M": 64, "N": 256}, lambda make, M, N: (make(M, N),),
        {"Tritium": own(name, "softmax")}, EAGER[name], peers, rows=("M", 8192, 64),
    )  # fmt: skip


def _norm(
    name: str, load: Loader, tokens: int, vectors: int, peers: dict[str, Loader]
) -> Operation:
    """`tokens` inputs `[T, D]`, then `vectors` inputs `[D]`."""
    return Operation(
        WIDTHS, "D", {"T": 64, "D": 256},
        lambda make, T, D: (*(make(T, D) for _ in range(tokens)),
                            *(make(D) for _ in range(vectors))),
        {"Tritium": load}, EAGER[name], peers, rows=TOKENS,
        shared=tuple(range(tokens, tokens + vectors)),
    )  # fmt: skip


def _activation(name: str, inputs: int, peers: dict[str, Loader], **options) -> Operation:
    return Operation(
        FEATURES, "F", {"T": 64, "F": 256},
        lambda make, T, F: tuple(make(T, F) for _ in range(inputs)),
        {"Tritium": own(name, **options)}, EAGER[name], peers, rows=TOKENS,
    )  # fmt: skip


def _layer(make: Make, T: int, D: int, V: int) -> tuple[Tensor, ...]:
    return make(T, D), make(V, D, scale=D**-0.5), make.integers(V, T)


def _likeliest(make: Make, T: int, D: int, V: int, K: int) -> tuple[Tensor, ...]:
    h_TD, w_VD, _ = _layer(make, T, D, V)
    teacher = (make(T, D) @ w_VD.detach().T).float().log_softmax(-1).topk(K)
    return h_TD, w_VD, teacher.indices, teacher.values.to(h_TD.dtype).detach()


def _rope_inputs(make: Make, T: int, H: int, K: int) -> tuple[Tensor, ...]:
    L = min(T, 4096)
    return make(T // L, L, H, K), *make.angles(L, K)


def _qk_norm_rope_inputs(make: Make, T: int, H: int, G: int, K: int) -> tuple[Tensor, ...]:
    L = min(T, 4096)
    return make(T // L, L, H + 2 * G, K), *make.angles(L, K), make(K), make(K)


OPERATIONS: dict[str, Operation] = {
    "softmax": _softmax("softmax", {"liger": liger("softmax"), "quack": quack("softmax")}),
    "log_softmax": _softmax("log_softmax", {}),
    "cross_entropy": Operation(
        VOCABULARIES, "V", {"T": 64, "V": 1000},
        lambda make, T, V: (make(T, V), make.integers(V, T)),
        {
            "Tritium": own("cross_entropy"),
            "Tritium, in place": implementations.cross_entropy_inplace,
        },
        EAGER["cross_entropy"],
        {"liger": liger("cross_entropy"), "quack": quack("cross_entropy")},
        gradient_in_forward=("Tritium, in place", "liger"),
        rows=("T", 8192, 64),
    ),
    "linear_cross_entropy": Operation(
        LAYERS, "D", {"T": 64, "D": 64, "V": 1000},
        _layer,
        {"Tritium": own("linear_cross_entropy")},
        EAGER["linear_cross_entropy"],
        {
            "liger": liger("fused_linear_cross_entropy"),
            "quack": quack("linear_cross_entropy", "chunked_linear_cross_entropy"),
            "cut-cross-entropy": implementations.cut_cross_entropy,
        },
        shared=(1,),
        gradient_in_forward=("Tritium", "liger", "quack"),
        rows=("T", 8192, 64),
        cpu_shapes=1,
    ),
    "linear_log_prob": Operation(
        LAYERS, "D", {"T": 64, "D": 64, "V": 1000}, _layer,
        {"Tritium": own("linear_log_prob")}, EAGER["linear_log_prob"],
        {"cut-cross-entropy": implementations.cut_cross_entropy_log_prob},
        shared=(1,), rows=("T", 8192, 64), cpu_shapes=1,
    ),
    "linear_kl_div": Operation(
        LAYERS, "D", {"T": 64, "D": 64, "V": 1000},
        lambda make, T, D, V: (*_layer(make, T, D, V)[:2],
                               *(x.detach() for x in _layer(make, T, D, V)[:2])),
        {"Tritium": own("linear_kl_div")}, EAGER["linear_kl_div"],
        {"liger": liger("fused_linear_jsd", jsd_beta=0.0), "fla": implementations.fla_kl_div},
        shared=(1, 3), gradient_in_forward=("Tritium", "liger", "fla"), rows=("T", 8192, 64),
        cpu_shapes=1,
    ),
    "linear_topk_kl_div": Operation(
        {name: dims | {"K": 64} for name, dims in LAYERS.items()}, "D",
        {"T": 64, "D": 64, "V": 1000, "K": 16}, _likeliest,
        {"Tritium": own("linear_topk_kl_div")}, EAGER["linear_topk_kl_div"], shared=(1,),
        gradient_in_forward=("Tritium",), rows=("T", 8192, 64), cpu_shapes=1,
    ),
    "rms_norm": _norm("rms_norm", norm("rms_norm", 1e-6), 1, 1, {
        "liger": liger("rms_norm", eps=1e-6, in_place=False), "quack": quack("rmsnorm"),
    }),
    "add_rms_norm": _norm("add_rms_norm", own("add_rms_norm", "rms_norm"), 2, 1, {
        "liger": liger("fused_add_rms_norm", eps=1e-6, in_place=False),
        "quack": implementations.quack_add_rms_norm,
    }),
    "layer_norm": _norm("layer_norm", norm("layer_norm", 1e-5), 1, 2, {
        "liger": liger("layer_norm", eps=1e-5),
    }),
    "add_layer_norm": _norm("add_layer_norm", own("add_layer_norm", "layer_norm"), 2, 2, {}),
    "rope": Operation(
        HEADS, "H", {"T": 64, "H": 4, "K": 64}, _rope_inputs,
        {"Tritium": own("rope")}, EAGER["rope"], rows=TOKENS, shared=(1, 2),
    ),
    "qk_norm_rope": Operation(
        {"GPT-2 124M": {"H": 12, "G": 12, "K": 64}}, "K", {"T": 64, "H": 4, "G": 4, "K": 64},
        _qk_norm_rope_inputs, {"Tritium": own("qk_norm_rope")}, EAGER["qk_norm_rope"], rows=TOKENS,
        shared=(1, 2, 3, 4),
    ),
    "swiglu": _activation("swiglu", 2, {"liger": liger("swiglu")}),
    "geglu": _activation("geglu", 2, {"liger": liger("geglu")}, approximate="tanh"),
    "relu_squared": _activation("relu_squared", 1, {"liger": liger("relu_squared")}),
    "dropout_add": Operation(
        WIDTHS, "D", {"T": 64, "D": 256}, lambda make, T, D: (make(T, D), make(T, D)),
        {"Tritium": own("dropout_add", seed=0)}, EAGER["dropout_add"],
        truth=own("dropout_add_reference", "dropout_add", seed=0), rows=TOKENS, whole=True,
    ),
    "embedding": Operation(
        LAYERS, "D", {"T": 64, "D": 64, "V": 100},
        lambda make, T, D, V: (make.integers(V, T), make(V, D)),
        {"Tritium": own("embedding")}, EAGER["embedding"], rows=TOKENS, shared=(1,),
    ),
    "mse_loss": Operation(
        {f"{n} Mi elements": {"N": n * MIB} for n in (1, 16, 256)}, "N", {"N": 16384},
        lambda make, N: (make(N), make(N).detach()),
        {"Tritium": own("mse_loss")}, EAGER["mse_loss"], cpu_shapes=2,
    ),
    "info_nce": Operation(
        PAIRS, "D", {"B": 64, "D": 64}, lambda make, B, D: (make(B, D), make(B, D)),
        {"Tritium": own("info_nce")}, EAGER["info_nce"], gradient_in_forward=("Tritium",),
        whole=True, rows=("B", 32768, 512),
    ),
}  # fmt: skip
