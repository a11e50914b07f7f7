"""Prove that losses whose classes are split over ranks equal those of one: loss, gradients, stats.

Two processes on gloo, each of which also computes the unsplit loss, through kernels and references.
"""

import math
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
T, D, V = 6, 5, 70  # V: of all ranks
IGNORE = -100
OPTIONS = [
    {},
    dict(label_smoothing=0.1, z_loss=0.01, softcap=9.0, logit_scale=1.5),
    dict(reduction="none", label_smoothing=0.2, ignore_index=3),
    dict(reduction="sum", z_loss=0.1),
]


def test_ranks_agree_with_one_process(tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mp.spawn(_rank, (f"file://{tmp_path}/store", device), RANKS)


def _rank(rank, store, device):
    if device == "cpu":
        import os

        os.environ["TRITON_INTERPRET"] = "1"
        import strict_interpreter

        strict_interpreter.install()
    torch.set_num_threads(1)
    # gloo carries CUDA tensors too, and both ranks may share one GPU.
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    from tritium.kernels import runtime

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    for reference in (False, True):
        runtime.REFERENCE = reference
        for options, soft, weighted in product(OPTIONS, (False, True), (False, True)):
            _hold_together(rank, device, options, soft, weighted)
        _hold_masked_ranks(rank, device)
    dist.destroy_process_group()


def _hold_together(rank, device, options, soft, weighted):
    from tritium.kernels.cross_entropy import cross_entropy
    from tritium.kernels.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)  # the same tensors on every rank
    hidden, weight = torch.randn(T, D, device=device), torch.randn(V, D, device=device)
    bias = torch.randn(V, device=device)
    target = torch.tensor([0, 3, IGNORE, V // 2 - 1, V // 2, V - 1], device=device)
    if "ignore_index" in options:
        target[2] = 5
    if soft:  # none of which can be ignored
        target = torch.randn(T, V, device=device).softmax(1)
        options = {name: value for name, value in options.items() if name != "ignore_index"}
    class_weight = torch.rand(V, device=device) + 0.1 if weighted else None
    mine = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    shard = target[:, mine] if soft else target

    def compare(whole, part, leaves, parts):
        (loss, stats), (part_loss, part_stats) = whole, part
        for expected, actual in zip((loss, *stats), (part_loss, *part_stats), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        dloss = torch.rand_like(loss)
        for i, (dx, actual) in enumerate(
            zip(
                torch.autograd.grad(loss, leaves, dloss),
                torch.autograd.grad(part_loss, parts, dloss),
                strict=True,
            )
        ):
            dx = dx if actual.shape == dx.shape else dx[mine] if i else dx[:, mine]
            torch.testing.assert_close(actual, dx, rtol=1e-4, atol=1e-5)

    logits = (hidden @ weight.T).requires_grad_()
    part = logits.detach()[:, mine].clone().requires_grad_()
    options = dict(options, return_stats=True)
    group = dist.group.WORLD
    for inplace in (False, True):
        compare(
            cross_entropy(logits, target, weight=class_weight, **options),
            cross_entropy(
                part * 1, shard, weight=class_weight, group=group, inplace=inplace, **options
            ),
            [logits],
            [part],
        )
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    parts = [x.detach().clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
    options = dict(options, weight=class_weight, chunk_bytes=4 * V * 4)
    compare(
        linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], **options),
        linear_cross_entropy(*parts[:2], shard, linear_bias=parts[2], group=group, **options),
        leaves,
        parts,
    )


def _hold_masked_ranks(rank, device):
    """One rank's classes may all be masked; a target that no rank has is no number anywhere."""
    from tritium.kernels import runtime
    from tritium.kernels.cross_entropy import cross_entropy

    logits = torch.full((2, 4), 1.0 if rank else -math.inf, device=device)
    target = torch.tensor([5, 6], device=device)
    loss, stats = cross_entropy(logits, target, group=dist.group.WORLD, return_stats=True)
    torch.testing.assert_close(loss.item(), math.log(4))
    torch.testing.assert_close(stats.entropy.tolist(), [math.log(4)] * 2)
    assert stats.argmax.tolist() == [4, 4]
    if not runtime.REFERENCE:
        target[0] = 8
        loss = cross_entropy(logits, target, group=dist.group.WORLD, reduction="none")
        assert loss.isnan().tolist() == [True, False]
