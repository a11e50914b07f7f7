"""Orthogonalization of matrices by Newton-Schulz iteration, in plain PyTorch.

For a matrix U with R <= C (a taller one is transposed) and coefficients a, b, c of each step:

    X := U / max(|U|, eps)                      |U| the Frobenius norm
    A  = X · Xᵀ;  B = b · A + c · A · A;  X := a · X + B · X

A step maps every singular value x of X to a · x + b · x³ + c · x⁵ and keeps the singular vectors,
so that after some steps all singular values are near 1. Two choices of coefficients:

    quintic         one triple for all steps, of the steepest slope at 0; leaves singular values in
                    about [0.7, 1.2] (Jordan et al., "Muon: An optimizer for hidden layers in
                    neural networks", 2024. https://kellerjordan.github.io/posts/muon/)
    polar_express   a triple for every step: the odd polynomial that is nearest to 1, in the largest
                    error, on the interval that the steps before it leave of [0.001, 1], made safe
                    against rounding up to 1.01 (Amsel, Persson, Musco & Gower, "The Polar Express",
                    2025. https://arxiv.org/abs/2505.16932)
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]

QUINTIC: Triple = (3.4445, -4.7750, 2.0315)

_SAFETY = 1.01
_OPTIMAL: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
POLAR_EXPRESS: tuple[Triple, ...] = (
    tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _OPTIMAL[:-1])
    + _OPTIMAL[-1:]
)

NAMED = {"quintic": (QUINTIC,), "polar_express": POLAR_EXPRESS}


def triples(coefficients: str | Triple | Sequence[Triple], steps: int) -> tuple[Triple, ...]:
    """Return the coefficients of every step; the last of them serve all further steps.

    Raises:
        ValueError: there is no set of this name, or they are no triples of numbers.
    """
    if isinstance(coefficients, str):
        if coefficients not in NAMED:
            raise ValueError(
                f"Muon: ns_coefficients must be {' or '.join(map(repr, NAMED))}, one triple, or a "
                f"triple for every step, got {coefficients!r}"
            )
        found: Sequence[Triple] = NAMED[coefficients]
    else:
        try:
            one = not isinstance(coefficients[0], Sequence)
            rows: Iterable = [coefficients] if one else coefficients
            found = [(float(a), float(b), float(c)) for a, b, c in rows]
        except (TypeError, ValueError, IndexError):
            raise ValueError(
                "Muon: ns_coefficients must be a name, three numbers, or three for every step, got "
                f"{coefficients!r}"
            ) from None
    return tuple(found[min(i, len(found) - 1)] for i in range(steps))


def orthogonalize_reference(
    u_NRC: Tensor, coefficients: Sequence[Triple], eps: float, dtype: torch.dtype
) -> Tensor:
    """Orthogonalize N matrices of one shape.

    Args:
        u_NRC: `[N, R, C]`, of any floating dtype.
        coefficients: of each step.
        eps: least norm that a matrix is divided by.
        dtype: dtype of X, A and B between products.

    Returns:
        `[N, R, C]` in `dtype`.
    """
    if u_NRC.shape[1] > u_NRC.shape[2]:
        return orthogonalize_reference(u_NRC.mT, coefficients, eps, dtype).mT
    norm_N11 = torch.linalg.vector_norm(u_NRC, dim=(1, 2), keepdim=True)
    x_NRC = (u_NRC / norm_N11.clamp(min=eps)).to(dtype)
    for a, b, c in coefficients:
        a_NRR = x_NRC @ x_NRC.mT
        b_NRR = torch.baddbmm(a_NRR, a_NRR, a_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, b_NRR, x_NRC, beta=a)
    return x_NRC


def normalize_rows_reference(o_NRC: Tensor, v_NR1: Tensor, beta2: float) -> Tensor:
    """Divide rows by the root of their second moment `v`, which changes in place.

    The norm of every matrix stays as it was.
    """
    v_NR1.lerp_(o_NRC.square().mean(dim=2, keepdim=True), 1 - beta2)
    y_NRC = o_NRC * v_NR1.clamp(min=SMALLEST_SQUARE).rsqrt()
    norms = (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (o_NRC, y_NRC))
    before_N11, after_N11 = norms
    return y_NRC * (before_N11 / after_N11.clamp(min=SMALLEST_SQUARE))


SMALLEST_SQUARE = 1e-20
"""Second moments below it, of rows without a gradient, count as this."""
