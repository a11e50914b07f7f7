"""Faults of kernels/swiglu.py: derivative, masks, strides, rounding."""

from functools import partial

from . import Mutant

_mutant = partial(Mutant, file="kernels/swiglu.py")

MUTANTS = [
    _mutant(
        what="derivative of the sigmoid with the wrong sign",
        original="(1 + gate_TF * (1 - sigma_TF))",
        replacement="(1 + gate_TF * sigma_TF)",
    ),
    _mutant(
        what="gradient of up without the gate",
        original="dh_TF * gate_TF * sigma_TF",
        replacement="dh_TF * sigma_TF",
    ),
    _mutant(
        what="rows beyond the last",
        original="mask_TF = (offs_T < T) & (offs_F < F)\n    gate_TF",
        replacement="mask_TF = offs_F < F\n    gate_TF",
    ),
    _mutant(
        what="a tile too many",
        original="    # Neighbouring programs walk along F first.\n    n_F = tl.cdiv(F, BLOCK_F)",
        replacement="    n_F = F // BLOCK_F + 1",
    ),
    _mutant(
        what="the wrong stride for up",
        original="offs_T * stride_upT + offs_F, mask=mask_TF, other=0.0).to(ACC)\n    h_TF",
        replacement="offs_T * F + offs_F, mask=mask_TF, other=0.0).to(ACC)\n    h_TF",
    ),
    _mutant(
        what="silu rounded before the product",
        original="h_TF = gate_TF / (1 + tl.exp(-gate_TF)) *",
        replacement="h_TF = (gate_TF / (1 + tl.exp(-gate_TF))).to(up_ptr.dtype.element_ty) *",
    ),
    _mutant(
        what="strided rows read as contiguous",
        original="return unit_stride(x.reshape(T, F))",
        replacement="return x.reshape(T, F)",
    ),
]
