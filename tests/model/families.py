"""Random configurations over all families, small enough to be compared number by number."""

import os
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from tritium.model import ModelConfig, RopeScaling

LENGTH = 12
few = settings(max_examples=int(os.environ.get("TRITIUM_EXAMPLES") or 40))
"""Fewer examples than usual, each of them a whole model."""


@st.composite
def scalings(draw, longest=LENGTH - 1):
    kind = draw(st.sampled_from(["none", "linear", "ntk", "llama3", "yarn"]))
    if kind == "none":
        return RopeScaling()
    factor = draw(st.sampled_from([1.0, 2.0, 8.0, 3.7]))
    if kind in ("linear", "ntk"):
        return RopeScaling(kind, factor)
    slow = draw(st.sampled_from([0.5, 1.0, 2.0]))
    given = draw(st.sampled_from([None, 0.8])) if kind == "yarn" else None
    length = draw(st.integers(5, longest))
    return RopeScaling(kind, factor, length, slow, slow * draw(st.sampled_from([2, 32])), given)


@st.composite
def gpt2s(draw):
    heads = draw(st.integers(1, 4))  # of width 4 in all: LayerNorm leaves little of fewer
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)), n_layers=draw(st.integers(1, 3)),
        d_model=heads * draw(st.integers(-(-4 // heads), 9)), n_heads=heads, max_seq_len=LENGTH,
        d_ff=draw(st.none() | st.integers(1, 20)), positions="learned", norm="layer",
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])), activation="gelu", bias=True, qk_norm=False,
        tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def llamas(draw, qwen=False):
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    kv_heads = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    d_head = draw(st.none() | st.sampled_from([2, 4, 10]))
    width = 2 * heads * draw(st.integers(1, 4))
    if qwen and d_head is not None:
        width += draw(st.integers(0, 3))
    bias = False if qwen else draw(st.booleans())
    window = None if bias else draw(st.sampled_from([None, 1, 3, 8]))
    every = draw(st.sampled_from([None, 1, 2, 3])) if qwen and window else None
    return ModelConfig(
        vocab_size=draw(st.integers(5, 40)), n_layers=draw(st.integers(1, 3)), d_model=width,
        n_heads=heads, n_kv_heads=draw(st.sampled_from([kv_heads, None])), d_head=d_head,
        d_ff=draw(st.integers(1, 20)), max_seq_len=LENGTH, qk_norm=qwen,
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 5e5])), rope_scaling=draw(scalings()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])), bias=bias, window=window, full_every=every,
        activation=draw(st.sampled_from(["swiglu", "geglu"])), tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


def qwens():
    return llamas(qwen=True)


@st.composite
def plain(draw):
    """Arcee's and Apertus' blocks: Llama's and Qwen3's without gate and windows."""
    base, activation = draw(llamas() | qwens()), draw(st.sampled_from(["gelu", "relu_squared"]))
    return replace(base, activation=activation, window=None, full_every=None)


@st.composite
def others(draw):
    """Combinations that no published family has."""
    base, window = draw(gpt2s() | llamas() | qwens()), draw(st.sampled_from([None, 1, 2, 3, 5, 20]))
    changes = dict(
        norm=draw(st.sampled_from(["rms", "layer"])), bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["swiglu", "geglu", "gelu", "relu_squared"])),
        qk_norm=draw(st.booleans()), token_shift=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0])),
        parallel_blocks=draw(st.booleans()), attention=draw(st.sampled_from(["sdpa", "softmax"])),
        attention_softcap=draw(st.sampled_from([None, 0.7])), window=window,
        full_every=None if window is None else draw(st.sampled_from([None, 1, 2, 3])),
    )  # fmt: skip
    return ModelConfig(**{**vars(base), **changes})


def configs():
    return gpt2s() | llamas() | qwens() | others()
