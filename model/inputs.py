"""Checks of what a model is given: ids of tokens, and their positions in their documents."""

from typing import Any

import torch
from torch import Tensor

from tritium.model.cpu_linear import sees_through

INTEGERS = (torch.int64, torch.int32)


def check_tokens(tokens: Any) -> None:
    """Raise a ValueError unless `tokens` are ids of such a shape, `[B, L]`, and dtype."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in INTEGERS:
        raise ValueError(
            f"tokens must be [B, L] ids in int64 or int32, got {_described(tokens)}; convert them"
        )


def check_positions(positions: Any, tokens: Tensor, limit: int | None = None) -> None:
    """Raise a ValueError unless `positions` are places of tokens in their documents.

    Their shape, dtype and device are always looked at; their values only on a CPU, which need not
    wait for them, and by numpy: 7 us for `[8, 64]`, where PyTorch's operators take 18 us.

    Args:
        positions: of `tokens`.
        tokens: `[B, L]`.
        limit: that they must be below, or None.
    """
    if (
        not isinstance(positions, Tensor)
        or positions.dtype not in INTEGERS
        or positions.shape != tokens.shape
        or positions.device != tokens.device
    ):
        raise ValueError(
            f"positions must be int64 or int32 in the tokens' shape {list(tokens.shape)} on "
            f"{tokens.device}, the place of each token in its document, got "
            f"{_described(positions)}; leave them out where each row is one document"
        )
    if not _at_hand(positions):
        return
    place_BL = positions.numpy()
    first_B1, before_BL, place_BL = place_BL[:, :1], place_BL[:, :-1], place_BL[:, 1:]
    wrong_BL = (place_BL - before_BL != 1) & (place_BL != 0)
    if wrong_BL.any() or (first_B1 < 0).any():
        raise ValueError(
            "positions must be 0 where a document begins and else one more than that before, got "
            f"{_first_wrong(positions.tolist())}; an attention mask is none"
        )
    if limit is not None and positions.numel() and (most := int(positions.max())) >= limit:
        raise ValueError(
            f"positions must be below max_seq_len, {limit}, got {most}; "
            "begin a document anew, or take a model with a longer context"
        )


def _at_hand(x: Tensor) -> bool:
    """Return whether the values of `x` can be read at once, and by nobody else's trace."""
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not sees_through()
    )


def _first_wrong(rows: list[list[int]]) -> str:
    for i, row in enumerate(rows):
        for j, place in enumerate(row):
            if place < 0 or (j and place not in (0, row[j - 1] + 1)):
                return f"{place} at [{i}, {j}]" + (f" after {row[j - 1]}" if j else "")
    raise AssertionError


def _described(x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{list(x.shape)} in {x.dtype} on {x.device}"
