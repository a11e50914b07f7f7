"""Faults of swiglu, and of what kernels/_activation.py does for every activation."""

from functools import partial

from tests.mutants import Mutant

_mutant = partial(Mutant, file="kernels/_activation.py")

MUTANTS = [
    _mutant(
        what="derivative of the sigmoid with the wrong sign",
        original='exp * sigma if ACTIVATION == "gelu_tanh" else 1 - sigma',
        replacement='exp * sigma if ACTIVATION == "gelu_tanh" else 1 + sigma',
    ),
    _mutant(
        what="gradient of up without the gate",
        original="dh_TF * value_TF, mask",
        replacement="dh_TF * slope_TF, mask",
    ),
    _mutant(
        what="gradient of the gate without up",
        original="        dx_TF *= tl.load(up_ptr",
        replacement="        dx_TF += 0 * tl.load(up_ptr",
    ),
    _mutant(
        what="rows beyond the last",
        original="return offs_T, offs_F, (offs_T < T) & (offs_F < F)",
        replacement="return offs_T, offs_F, (offs_T < T + 1) & (offs_F < F)",
    ),
    _mutant(
        what="a tile too many",
        original="    # Neighbouring programs are neighbours along F.\n"
        "    n_F = tl.cdiv(F, BLOCK_F)",
        replacement="    n_F = F // BLOCK_F + 1",
    ),
    _mutant(
        what="offsets in 32 bits",
        original="tile = tl.program_id(0).to(tl.int64)",
        replacement="tile = tl.program_id(0)",
    ),
    _mutant(
        what="the stride of the gate taken for that of up",
        original="h_TF *= tl.load(up_ptr + offs_T * stride_upT",
        replacement="h_TF *= tl.load(up_ptr + offs_T * stride_xT",
    ),
    _mutant(
        what="the gradient taken for contiguous",
        original="dh_ptr + offs_T * stride_dhT + offs_F",
        replacement="dh_ptr + offs_T * F + offs_F",
    ),
    _mutant(
        what="silu rounded before the product",
        original="    h_TF, _ = _value_and_slope(x_TF, ACTIVATION)\n",
        replacement="    h_TF, _ = _value_and_slope(x_TF, ACTIVATION)\n"
        "    h_TF = h_TF.to(h_ptr.dtype.element_ty).to(ACC)\n",
    ),
    _mutant(
        what="strided rows read as contiguous",
        original="return unit_stride(x.reshape(T, F))",
        replacement="return x.reshape(T, F)",
    ),
    _mutant(
        what="shapes that broadcast",
        original='for what in ("shape", "dtype", "device"):',
        replacement='for what in ("dtype", "device"):',
    ),
]
