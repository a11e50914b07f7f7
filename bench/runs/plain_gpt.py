"""A GPT as PyTorch's own modules give it: what the trainer's speed is compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainGPT(nn.Module):
    """Learned positions, LayerNorm, GELU, no biases, embedding and output layer in one.

    Args:
        vocab_size: V.
        length: L, tokens of a sequence at most.
        n_layers: blocks.
        d_model: D.
        n_heads: H.
    """

    def __init__(self, vocab_size: int, length: int, n_layers: int, d_model: int, n_heads: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(length, d_model)
        self.blocks = nn.Sequential(*(PlainBlock(d_model, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of `targets` `[B, L]` after `tokens` `[B, L]`, in nats."""
        place_L = torch.arange(tokens.shape[1], device=tokens.device)
        h_BLD = self.norm(self.blocks(self.tokens(tokens) + self.positions(place_L)))
        return F.cross_entropy(self.head(h_BLD).flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    """Causal self-attention and a feed-forward layer four times as wide as the stream."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(d_model, bias=False),
            nn.Linear(d_model, 4 * d_model, bias=False),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model, bias=False),
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return `x` with what the block adds."""
        packed = self.query_key_value(self.attention_norm(x_BLD))
        q, k, v = packed.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        y_BHLK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.output(y_BHLK.transpose(1, 2).flatten(2))
        return x_BLD + self.feed_forward(x_BLD)
