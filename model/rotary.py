"""Rotary positions: the tables of angles, and the published ways to stretch them.

    f_k = theta^(-2k/K)                  frequency of pair k, in radians per token
    cos, sin of position · f'_k          the tables

    none     f' = f
    linear   f' = f / factor
    ntk      f' = f of theta · factor^(K / (K - 2)): the slowest pair as in linear, the first as is
    llama3   f' = f · m + (f / factor) · (1 - m)
    yarn     as llama3, and cos and sin times `attention_factor`

m is 1 for fast pairs and 0 for slow ones, by the turns n_k = original_length · f_k / 2π that a pair
makes in the original context: in llama3 m grows linearly with n from `slow` to `fast`; in yarn
linearly with k between the pairs, rounded outward, that make `fast` and `slow` turns.

The form of ntk that is called dynamic raises `factor` as a sequence grows beyond its first context:
keys that are kept would have other angles than those of one pass, so there is none here.

Su et al., "RoFormer", 2021. https://arxiv.org/abs/2104.09864
Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023.
https://arxiv.org/abs/2306.15595
Peng et al., "YaRN", 2023. https://arxiv.org/abs/2309.00071; its section 3.1 has ntk, by bloc97
Grattafiori et al., "The Llama 3 Herd of Models", 2024; the rule is in the code of Llama 3.1.
https://arxiv.org/abs/2407.21783
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritium.model.config import RopeScaling


def rotary_tables(
    length: int,
    head_width: int,
    theta: float,
    device: torch.device | None = None,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, `[length, head_width / 2]` float32, of every position's angles."""
    # On the host for every device, which gives each the same bits; none of them may be of
    # inference mode, as autograd refuses to keep such tensors.
    with torch.inference_mode(False):
        exponent_K = torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width
        place_L = torch.arange(length, dtype=torch.float64, device="cpu")
        if scaling is not None:
            theta = ntk_theta(theta, head_width, scaling)
        frequency_K, scale = theta**-exponent_K, 1.0
        if scaling is not None and scaling.kind != "none":
            frequency_K, scale = _stretched(frequency_K, theta, scaling), attention_factor(scaling)
        angle_LK = torch.outer(place_L, frequency_K)
        cos_LK, sin_LK = (
            x.mul_(scale).float().to(device) for x in (angle_LK.cos(), angle_LK.sin())
        )
    for table in (cos_LK, sin_LK):
        # What torch._dynamo.mark_static does, without a second of importing it: else a compiler
        # takes a batch of K / 2 rows, or a full context, to be that size for ever.
        vars(table).update(_dynamo_static_indices={0, 1}, _has_dynamo_dim_marking=True)
    return cos_LK, sin_LK


def attention_factor(scaling: RopeScaling) -> float:
    """Return the factor of cosines and sines, 1 except in yarn."""
    if scaling.kind != "yarn":
        return 1.0
    given = scaling.attention_factor
    return 1 + 0.1 * math.log(scaling.factor) if given is None else given


def ntk_theta(theta: float, head_width: int, scaling: RopeScaling) -> float:
    """Return the base of the wavelengths, `theta` except in ntk; one pair alone has none."""
    if scaling.kind != "ntk" or head_width <= 2:
        return theta
    return theta * scaling.factor ** (head_width / (head_width - 2))


def _stretched(frequency_K: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "ntk":
        return frequency_K
    if scaling.kind == "linear":
        return frequency_K / scaling.factor
    assert scaling.original_length is not None
    if scaling.kind == "llama3":
        turns_K = scaling.original_length * frequency_K / (2 * math.pi)
        kept_K = ((turns_K - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    else:
        pairs = len(frequency_K)
        base = pairs / math.log(theta)  # the pair of n turns is base · ln(length / 2πn)
        first, last = (
            base * math.log(scaling.original_length / (2 * math.pi * turns))
            for turns in (scaling.fast, scaling.slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        last = last + 0.001 if first == last else last
        pair_K = torch.arange(pairs, dtype=torch.float64, device="cpu")
        kept_K = 1 - ((pair_K - first) / (last - first)).clamp(0, 1)
    return frequency_K * kept_K + frequency_K / scaling.factor * (1 - kept_K)
