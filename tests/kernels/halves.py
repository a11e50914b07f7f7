"""Memory layouts of the gate and the other half of a gated activation, and of their gradient."""

from collections.abc import Callable

from check import check
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = {
    "separate": lambda packed: [half.contiguous() for half in packed.chunk(2, -1)],
    "packed": lambda packed: packed.chunk(2, -1),
    "interleaved": lambda packed: (packed[..., ::2], packed[..., 1::2]),
    "transposed": lambda packed: [half.mT for half in packed.chunk(2, -1)],
    "mixed": lambda packed: (packed.chunk(2, -1)[0], packed.chunk(2, -1)[1].contiguous()),
}
GRADIENTS = {
    "contiguous": lambda dy: dy,
    "transposed": lambda dy: dy.mT.contiguous().mT,
    "expanded along F": lambda dy: dy[..., :1].expand_as(dy),
    "expanded along T": lambda dy: dy[..., :1, :].expand_as(dy),
}


def laid_out(y: Tensor, gradient: str) -> Tensor:
    """Return `y`; its gradient arrives in the strides of `gradient`."""
    if y.requires_grad:
        y.register_hook(GRADIENTS[gradient])
    return y


def check_halves(
    kernel: Callable, reference: Callable, packed: Tensor, layout: str, gradient: str
) -> None:
    """Compare kernel and reference on views of one leaf, so that no copy hides a stride."""

    def of(f):
        return lambda packed: laid_out(f(*LAYOUTS[layout](packed)), gradient)

    check(of(kernel), of(reference), packed)


SHAPES = {
    "batch": st.lists(st.integers(0, 3), max_size=2),
    "T": st.integers(0, 9),
    "F": st.integers(0, 300),
}
