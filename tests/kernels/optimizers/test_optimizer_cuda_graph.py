"""A step captured in a CUDA graph does, bit for bit, what the step does at any learning rate."""

from collections.abc import Callable
from math import cos, inf

import pytest
import torch
from small_training import SMALL, assert_equal, bits, parameters

from tritium.kernels.optimizers.adamw import AdamW

REPLAYS = 100
SHAPES = [*SMALL, (0,), (33, 513)]
BF16 = torch.bfloat16
PRECISIONS = [
    (torch.float32, {}),
    (BF16, {"master": "float32"}),
    (BF16, {"master": "split"}),
    (BF16, {"master": None}),
    (BF16, {"master": None, "state_dtype": BF16}),
    (BF16, {"master": None, "state_dtype": torch.uint8}),
]


def learning_rate(step: int) -> float:
    """A schedule, exact in float32."""
    return torch.tensor(1e-3 * (1 + cos(step / 10))).item()


def make(dtype, lr, device, **options) -> tuple[AdamW, list[torch.Tensor]]:
    """An optimizer of two groups, the same each time, and its gradients."""
    torch.manual_seed(0)
    ps = parameters(SHAPES, device, dtype)
    for p in ps:
        p.grad = torch.zeros_like(p)
    groups = [{"params": ps[:2], "weight_decay": 0.0}, {"params": ps[2:]}]
    return AdamW(groups, lr=lr, weight_decay=0.1, **options), [p.grad for p in ps]


def fill(grads: list[torch.Tensor], step: int, infinite: bool) -> None:
    """Overwrite the gradients in place: a graph keeps their addresses."""
    generator = torch.Generator().manual_seed(step)
    for g in grads:
        g.copy_(torch.randn(g.shape, generator=generator) * 10.0 ** (step % 5 - 3))
    if infinite:
        grads[0][0] = inf


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A graph of `step`, which capturing does not take."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is captured on a GPU")
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize(("dtype", "options"), PRECISIONS, ids=str)
def test_replays_equal_steps(dtype, options, max_grad_norm, device):
    options = options | {"max_grad_norm": max_grad_norm}
    lr = torch.tensor(learning_rate(0), device=device)
    replayed, replayed_grads = make(dtype, lr, device, **options)
    stepped, stepped_grads = make(dtype, learning_rate(0), device, **options)
    start = bits(stepped)
    norms = []

    def take(step: int, replay: Callable[[], object]) -> None:
        lr.fill_(learning_rate(step))
        for group in stepped.param_groups:
            group["lr"] = learning_rate(step)
        for grads in (replayed_grads, stepped_grads):
            fill(grads, step, infinite=max_grad_norm is not None and step == REPLAYS // 2)
        replay()
        stepped.step()
        if max_grad_norm is not None:
            norms.append((replayed.grad_norm.clone(), stepped.grad_norm.clone()))

    for step in range(2):  # makes the state, uploads the tables and compiles
        take(step, replayed.step)
    replay = captured(replayed.step)
    for step in range(2, 2 + REPLAYS):
        take(step, replay)
    assert_equal(bits(replayed), bits(stepped))
    for replayed_norm, stepped_norm in norms:
        assert torch.equal(replayed_norm, stepped_norm)
    assert int(replayed.skipped) == int(stepped.skipped) == (max_grad_norm is not None)
    assert not any(torch.equal(p, q) for p, q in zip(bits(stepped), start, strict=False) if len(q))
