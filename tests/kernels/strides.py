"""Layouts in which a test hands over the same numbers."""

import torch

# The same values in other strides.
STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "padded": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
# A gradient may be expanded, too.
GRADIENTS = STRIDES | {
    "expanded along D": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along T": lambda dy: dy[..., :1, :].expand_as(dy),
}
