"""The attention weights of a model, for those who study them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritium.model.attention import attention_weights as weights_of
from tritium.model.block import Attention
from tritium.model.inputs import check_positions, check_tokens
from tritium.model.masks import dense_mask, document_numbers

if TYPE_CHECKING:
    from tritium.model.transformer import Transformer


def attention_weights(
    model: Transformer, tokens: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Return the weights with which each token attends to those before it, in every layer.

    They are made anew from the inputs of each layer, whichever way the model attends, and take
    n_layers · B · H · L² elements. They have gradients, where these are enabled.

    Args:
        model: not compiled.
        tokens: `[B, L]` ids.
        positions: as `Transformer.forward` takes them.

    Returns:
        `[n_layers, B, H, L, L]`: the last axis is what is attended to, and sums to 1.
    """
    check_tokens(tokens)
    if positions is not None:
        check_positions(positions, tokens)
    number_BL = None if positions is None else document_numbers(positions)
    L, found = tokens.shape[1], []

    def keep(attention, inputs):
        x_BLD, places, *_ = inputs
        q_BHLK, k_BGLK, _ = attention.heads(x_BLD, places)
        window = model.config.window_of(len(found))
        mask = dense_mask(L, L, tokens.device, number_BL, window)
        with torch.autocast(tokens.device.type, enabled=False):
            found.append(weights_of(q_BHLK, k_BGLK.to(q_BHLK.dtype), mask, attention.softcap))

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        # With a cache no block runs again in the backward pass, when these hooks are gone.
        model.hidden(tokens, model.new_cache(L), positions)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
