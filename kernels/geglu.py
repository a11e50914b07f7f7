"""GeGLU: the gated activation of a feed-forward block, with GELU as the gate.

    h = gelu(gate) · up,  gelu(a) = a · Φ(a),  Φ(a) = (1 + erf(a / √2)) / 2

or, by the tanh approximation of Φ (Gemma, GPT-2),

    Φ(a) ≈ (1 + tanh(√(2/π) · (a + 0.044715 · a³))) / 2

Backward saves only gate and up:

    dgate = dh · up · (Φ(gate) + gate · Φ'(gate))
    dup   = dh · gate · Φ(gate)

The kernels are those of `_activation`, for every activation.

Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016. https://arxiv.org/abs/1606.08415
Shazeer, "GLU Variants Improve Transformer", 2020. https://arxiv.org/abs/2002.05202
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu

from tritium.kernels._activation import (
    activate,
    activate_packed,
    validate_packed,
    validate_pair,
)
from tritium.kernels.runtime import uses_triton

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}  # by the names of torch.nn.functional.gelu


def geglu_reference(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Compute `geglu` in plain PyTorch, in float32 (float64 for float64 `gate`)."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (gelu(gate.to(wide), approximate=approximate) * up.to(wide)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """Multiply `up` by the GELU of `gate`, element by element.

    Args:
        gate: `[..., F]`; float32, float16, bfloat16 or float64. The two halves of a packed
            projection are read where they are; a tensor is copied only if its last axis is not
            contiguous or the others do not flatten into one.
        up: the shape, dtype and device of `gate`. None: `gate` is a packed projection `[..., 2F]`,
            the gate first; its gradient comes in one tensor.
        approximate: "none" for the error function, "tanh" for its approximation, as in
            `torch.nn.functional.gelu`.

    Returns:
        `[..., F]`, contiguous, in the dtype of `gate`, also under autocast. Computed in float32
        (float64 for float64) and rounded once.

    Raises:
        ValueError: `gate` and `up` differ in shape, dtype or device, or are not floating point;
            `approximate` is neither "none" nor "tanh"; without `up` the last axis is odd.
    """
    if up is None:
        validate_packed("geglu", gate)
    else:
        validate_pair("geglu", gate, up)
    if approximate not in ACTIVATIONS:
        raise ValueError(f'geglu: approximate must be "none" or "tanh", got {approximate!r}')
    if not uses_triton(gate, "geglu"):
        return geglu_reference(gate, up, approximate=approximate)
    if up is None:
        return activate_packed(ACTIVATIONS[approximate], gate)
    return activate(ACTIVATIONS[approximate], gate, up)
