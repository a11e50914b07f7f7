"""Shapes by name, and what each takes: python -m tritium.model.shapes [NAME ...].

    FLOPs per token = 6 · N + 12 · layers · heads · head width · L

N counts the weights that multiply a token: those of every linear layer, the output layer included,
tied to the embedding or not; looking an embedding up is no product, and norms are left out. 2 · N
for the forward pass, 4 · N for both gradients. The second term is attention's two products, each
over all L positions: that causal attention needs half of them, and a window fewer, is not deducted,
nor is what activation checkpointing recomputes added, as is the custom (PaLM, appendix B; nanoGPT),
so that figures can be compared.

All are published except for qwen3-tiny, -small and -98m: Qwen3's blocks in the sizes that the
presets of train.py have, the last of them GPT-2's layers, width, heads and context.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
Grattafiori et al., "The Llama 3 Herd of Models", 2024. https://arxiv.org/abs/2407.21783
Yang et al., "Qwen3 Technical Report", 2025. https://arxiv.org/abs/2505.09388
Ben Allal et al., "SmolLM", 2024. https://huggingface.co/blog/smollm
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from typing import Literal

import torch

import tritium
from tritium.model.config import ModelConfig, RopeScaling

_GPT2 = dict(
    vocab_size=50257, max_seq_len=1024, positions="learned", norm="layer", norm_eps=1e-5,
    activation="gelu", bias=True, qk_norm=False,
)  # fmt: skip
_LLAMA = dict(norm_eps=1e-5, qk_norm=False)
_LLAMA3 = _LLAMA | dict(vocab_size=128256, max_seq_len=131072, rope_theta=500000.0, n_kv_heads=8)


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, original_length=8192, slow=1.0, fast=4.0)


SHAPES: dict[str, dict] = {
    "gpt2": _GPT2 | dict(n_layers=12, d_model=768, n_heads=12),
    "gpt2-medium": _GPT2 | dict(n_layers=24, d_model=1024, n_heads=16),
    "gpt2-large": _GPT2 | dict(n_layers=36, d_model=1280, n_heads=20),
    "gpt2-xl": _GPT2 | dict(n_layers=48, d_model=1600, n_heads=25),
    "smollm-135m": _LLAMA
    | dict(
        vocab_size=49152, n_layers=30, d_model=576, n_heads=9, n_kv_heads=3, d_ff=1536,
        max_seq_len=2048,
    ),
    "llama-3.2-1b": _LLAMA3
    | dict(
        n_layers=16, d_model=2048, n_heads=32, d_ff=8192, rope_scaling=_llama3_scaling(32.0),
    ),
    "llama-3.1-8b": _LLAMA3
    | dict(
        n_layers=32, d_model=4096, n_heads=32, d_ff=14336, rope_scaling=_llama3_scaling(8.0),
        tie_embeddings=False,
    ),
    "qwen3-0.6b": dict(
        vocab_size=151936, n_layers=28, d_model=1024, n_heads=16, n_kv_heads=8, d_head=128,
        d_ff=3072, max_seq_len=40960, rope_theta=1e6,
    ),
    "qwen3-tiny": dict(
        vocab_size=512, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, max_seq_len=64,
    ),
    "qwen3-small": dict(vocab_size=4096, n_layers=3, d_model=96, n_heads=3, max_seq_len=256),
    "qwen3-98m": dict(vocab_size=16384, n_layers=12, d_model=768, n_heads=12, max_seq_len=1024),
}  # fmt: skip
"""Arguments of `ModelConfig` by name."""
ShapeName = Literal[
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "smollm-135m", "llama-3.2-1b", "llama-3.1-8b",
    "qwen3-0.6b", "qwen3-tiny", "qwen3-small", "qwen3-98m",
]  # fmt: skip
"""Their names, for those who offer a choice of them."""


def shape(name: str) -> dict:
    """Return the arguments of `ModelConfig` for a named shape.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SHAPES:
        near = get_close_matches(str(name), SHAPES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no shape {name!r}; {hint}there are {', '.join(SHAPES)}")
    return SHAPES[name]


def flops_per_token(config: ModelConfig, length: int | None = None) -> int:
    """Return the FLOPs of a training step per token, as the head of this module counts them.

    Args:
        config: the shape.
        length: L, tokens of a sequence; None for the whole context.
    """
    D, K, L = config.d_model, config.head_width, length or config.max_seq_len
    projections = D * K * (2 * config.n_heads + 2 * config.kv_heads)
    block = projections + (3 if config.gated else 2) * D * config.feed_forward_width
    attention = 12 * config.n_layers * config.n_heads * K * L
    return 6 * (config.n_layers * block + D * config.vocab_size) + attention


def cache_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Return the bytes of keys and values that generation keeps of each token."""
    return 2 * config.n_layers * config.kv_heads * config.head_width * itemsize


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights of a model of that shape, without making them."""
    from tritium.model.transformer import Transformer

    with torch.device("meta"):
        return Transformer(config).num_parameters()


def main(arguments: list[str]) -> None:
    """Print a line for each shape: its sizes, parameters, FLOPs and bytes."""
    parser = argparse.ArgumentParser(
        prog="python -m tritium.model.shapes", description=main.__doc__
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SHAPES))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence [1024]")
    given = parser.parse_args(arguments)
    try:
        configs = {name: ModelConfig.named(name) for name in given.names or SHAPES}
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{'shape':14}{'layers':>7}{'width':>7}{'heads':>7}{'kv':>4}{'context':>9}{'vocab':>9}"
        f"{'parameters':>15}{'GFLOP/token':>13}{'GB bf16':>9}{'GB AdamW':>10}{'cache/token':>13}"
    )
    for name, config in configs.items():
        count = num_parameters(config)
        print(
            f"{name:14}{config.n_layers:7}{config.d_model:7}{config.n_heads:7}{config.kv_heads:4}"
            f"{config.max_seq_len:9,}{config.vocab_size:9,}{count:15,}"
            f"{flops_per_token(config, given.length) / 1e9:13.3f}{2 * count / 1e9:9.2f}"
            f"{16 * count / 1e9:10.2f}{cache_bytes_per_token(config):11,} B"
        )
    print(
        f"\nGFLOP/token: of a training step, in sequences of {given.length:,} tokens. GB bf16: the "
        "weights in bfloat16.\nGB AdamW: float32 weights, gradients and both moments. cache/token: "
        "keys and values in bfloat16."
    )


if __name__ == "__main__":
    with tritium.interruptible():
        main(sys.argv[1:])
