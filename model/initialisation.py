"""The first weights of a model, by the name that `ModelConfig.initialisation` gives.

    near_identity  matrices N(0, 1 / 4n), n their inputs; a block's last ones divided by 10 √(2 l)
    gpt2           N(0, 0.02²); a block's last ones divided by √(2 l), positions N(0, 0.01²)
    small          N(0, 2 / 5D); a block's last ones N(0, 4 / (l² D))
    zero           as near_identity, with zeros for a block's last ones

l layers of width D; a block's last matrices are those whose product it adds to the residual stream.
Embeddings are N(0, 0.02²), in small as its other matrices. Biases are 0, norms 1, except for those
of queries and keys, which are `ModelConfig.qk_gain`: with normalised queries and keys only these
weights make attention sharper than scores of √K allow, and small models are late to copy with blunt
heads (bench/LOG.md; Dehghani et al. normalise, Henry et al. begin with a gain that is learned).

near_identity lets each block start close to the identity. Zeros instead of the depth rule alone
gave 2.11 against 2.16 bits per byte in 45 s of training on two cores (4 layers, one seed); a tenth
was chosen to keep the rule, not compared alone.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (gpt2); the deviations
are those of its code.
Nguyen & Salazar, "Transformers without Tears", 2019. https://arxiv.org/abs/1910.05895 (small)
Black et al., "GPT-NeoX-20B", 2022. https://arxiv.org/abs/2204.06745 (small, and its last matrices)
Henry et al., "Query-Key Normalization for Transformers", 2020. https://arxiv.org/abs/2010.04245
Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023.
https://arxiv.org/abs/2302.05442
Zhang et al., "Fixup Initialization", 2019. https://arxiv.org/abs/1901.09321 (zero)
"""

from __future__ import annotations

import torch
from torch import nn

from tritium.model.block import Block
from tritium.model.config import ModelConfig
from tritium.model.modules import LayerNorm, RMSNorm
from tritium.model.token_shift import TokenShift


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Draw the weights of a model afresh, from PyTorch's global generator."""
    kind, D = config.initialisation, config.d_model
    for module in model.modules():
        if isinstance(module, nn.Linear):
            deviation = {"gpt2": 0.02, "small": (2 / (5 * D)) ** 0.5}
            nn.init.normal_(module.weight, std=deviation.get(kind, module.in_features**-0.5 * 0.5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (RMSNorm, LayerNorm, TokenShift)):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Block):
            for layer in (module.attention.output, module.feed_forward.down):
                _make_last(layer.weight, config)
            for norm in (module.attention.query_norm, module.attention.key_norm):
                if norm is not None:
                    nn.init.constant_(norm.weight, config.qk_gain)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            deviation = (2 / (5 * D)) ** 0.5 if kind == "small" else 0.02
            halved = kind == "gpt2" and name.endswith("position_embedding")
            nn.init.normal_(module.weight, std=0.01 if halved else deviation)


def _make_last(weight: torch.Tensor, config: ModelConfig) -> None:
    depth = config.n_layers
    if config.initialisation == "zero":
        nn.init.zeros_(weight)
    elif config.initialisation == "small":
        nn.init.normal_(weight, std=2 / (depth * config.d_model**0.5))
    else:
        weight.div_((10 if config.initialisation == "near_identity" else 1) * (2 * depth) ** 0.5)
