"""Prove that wrong tokens and positions are refused in a sentence, and right ones never."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tritium.model import ModelConfig, Transformer

CONFIG = ModelConfig(vocab_size=31, n_layers=1, d_model=8, n_heads=2, max_seq_len=12)
B, L = 2, 8
TOKENS = torch.arange(B * L).view(B, L)
PLACES = torch.arange(L).expand(B, L)


def ways(model, tokens, positions):
    """Everything that takes positions."""
    return {
        "logits": lambda: model(tokens, None, positions),
        "loss": lambda: model(tokens, tokens, positions),
        "hidden": lambda: model.hidden(tokens, model.new_cache(), positions),
        "weights": lambda: model.attention_weights(tokens, positions),
    }


@pytest.mark.parametrize("way", ["logits", "loss", "hidden", "weights"])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (PLACES[0], "got [8] in torch.int64 on"),
        (PLACES[:, :5], "got [2, 5] in"),
        (PLACES[:1].expand(3, L), "got [3, 8] in"),
        (PLACES.tolist(), "got a list"),
        (torch.ones(B, L, dtype=torch.bool), "got [2, 8] in torch.bool"),
        (PLACES * 0.5, "got [2, 8] in torch.float32"),
        (PLACES * float("nan"), "got [2, 8] in torch.float32"),
        (PLACES.to("meta"), "on meta; leave them out"),
    ],
)
def test_positions_of_another_kind_are_refused_on_every_device(way, wrong, got, device):
    wrong = wrong.to(device) if isinstance(wrong, torch.Tensor) and not wrong.is_meta else wrong
    model, tokens = Transformer(CONFIG).to(device), TOKENS.to(device)
    expected = f"positions must be int64 or int32 in the tokens' shape [2, 8] on {tokens.device}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}.*{re.escape(got)}"):
        ways(model, tokens, wrong)[way]()


@example([0, 0], [i == L + 1 for i in range(B * L)], (1, 0), -1, torch.int64, "logits")
@given(
    firsts=st.lists(st.integers(0, 4), min_size=B, max_size=B),
    begins=st.lists(st.booleans(), min_size=B * L, max_size=B * L),
    at=st.none() | st.tuples(st.integers(0, B - 1), st.integers(0, L - 1)),
    other=st.integers(-2, 11),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    way=st.sampled_from(["logits", "hidden", "weights"]),
)
def test_positions_on_a_cpu_count_the_tokens_of_documents(firsts, begins, at, other, dtype, way):
    rows = [[0] * L for _ in range(B)]
    for i, row in enumerate(rows):
        for j in range(L):
            row[j] = firsts[i] if j == 0 else 0 if begins[i * L + j] else row[j - 1] + 1
    if at is not None:
        rows[at[0]][at[1]] = other
    counts = all(row[0] >= 0 and all(q in (0, p + 1) for p, q in pairwise(row)) for row in rows)
    model, positions = Transformer(CONFIG), torch.tensor(rows, dtype=dtype)
    if counts:
        ways(model, TOKENS, positions)[way]()
        return
    with pytest.raises(
        ValueError, match=r"^positions must be 0 where .* got (-?\d+) at \[\d, \d\]"
    ):
        ways(model, TOKENS, positions)[way]()


def test_learned_positions_beyond_the_context_are_refused():
    """The first of a row may be anything, as far as there are weights for it."""
    model = Transformer(replace(CONFIG, positions="learned"))
    model(TOKENS, None, PLACES + 4)
    with pytest.raises(ValueError, match="positions must be below max_seq_len, 12, got 12;"):
        model(TOKENS, None, PLACES + 5)


@pytest.mark.parametrize("wrong", [TOKENS.tolist(), TOKENS[0], TOKENS.float(), TOKENS.numpy()])
def test_tokens_of_another_kind_are_refused(wrong):
    for way in ways(Transformer(CONFIG), wrong, None).values():
        with pytest.raises(
            ValueError, match=r"^tokens must be \[B, L\] ids in int64 or int32, got"
        ):
            way()
