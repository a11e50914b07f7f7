"""Prove that losses whose classes are split over ranks equal those of one: loss, gradients, stats.

They are split over a process group, or a mesh of DTensors. Two processes on gloo, each of which
also computes the unsplit loss, through kernels and references.
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
    # Two ranks on one GPU crashed inside gloo.
    device = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"
    mp.spawn(_rank, (f"file://{tmp_path}/store", device), RANKS)


def _rank(rank, store, device):
    if device == "cpu":
        import os

        os.environ["TRITON_INTERPRET"] = "1"
        import strict_interpreter

        strict_interpreter.install()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    from tritium.kernels import runtime

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    for mesh in _meshes(device):
        _hold_dtensors(rank, device, mesh)
    _hold_refusals(device)
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


def _meshes(device):
    from torch.distributed.device_mesh import init_device_mesh

    return [
        init_device_mesh(device, shape, mesh_dim_names=("tokens", "classes"))
        for shape in ((1, RANKS), (RANKS, 1))
    ]


def _hold_dtensors(rank, device, mesh):
    """Rows of a weight on one dimension, columns on the other; tied to an embedding, too."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from tritium.kernels.linear_cross_entropy import linear_cross_entropy

    splits, rows = mesh["classes"].size() > 1, V + 1  # unlike many on two ranks
    torch.manual_seed(1)
    hidden = torch.randn(2 * T, D, dtype=torch.float64, device=device)
    weight = torch.randn(rows, D, dtype=torch.float64, device=device)
    bias = torch.randn(rows, dtype=torch.float64, device=device)
    target = torch.tensor([0, 3, rows // 2, rows // 2 + 1, rows - 1, 9] * 2, device=device)
    mine = slice(None) if splits else slice(rank * T, (rank + 1) * T)
    placements = [Shard(1), Shard(0)]
    for how, tied, options in product(
        ("group", "input", "neither"), (False, True), ({}, {"label_smoothing": 0.1, "softcap": 9.0})
    ):
        if how == "input" and not splits:
            continue  # whose ranks would have to have the same tokens
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        read = whole[0] + whole[1][target] if tied else whole[0]
        loss = linear_cross_entropy(read, whole[1], target, linear_bias=whole[2], **options)
        placed = [Replicate(), Shard(0)] if how == "input" else placements
        bias_placed = [Replicate(), Shard(0)]
        parts = [
            hidden[mine].clone().requires_grad_(),
            distribute_tensor(weight, mesh, placed).requires_grad_(),
            distribute_tensor(bias, mesh, bias_placed).requires_grad_(),
        ]
        x, g = parts[0], None
        if tied:
            table = parts[1].full_tensor(grad_placements=_returned(splits))
            if not splits:  # its gradient is averaged, as fully_shard does it
                table.register_hook(lambda g: g / RANKS)
            x = x + table[target[mine]]
        if how == "input":
            x = DTensor.from_local(x, mesh, [Replicate()] * 2)
        if how == "group":
            g = mesh.get_group("classes")
        options = dict(options, linear_bias=parts[2], group=g)
        own = linear_cross_entropy(x, parts[1], target[mine], **options)
        assert not hasattr(own, "to_local")
        total = own.detach().clone()
        if not splits:  # a mean of means
            dist.all_reduce(total)
            total /= RANKS
        torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=1e-12)
        loss.backward()
        own.backward()
        scale = 1 if splits else 1 / RANKS
        expected = whole[0].grad[mine]
        torch.testing.assert_close(parts[0].grad * scale, expected, rtol=1e-10, atol=1e-12)
        for part, x in zip(parts[1:], whole[1:], strict=True):
            assert part.grad.placements == part.placements
            torch.testing.assert_close(part.grad.full_tensor(), x.grad, rtol=1e-10, atol=1e-12)
    # Kept by every rank: no more than its own rows where classes are split.
    if splits:
        assert parts[1].to_local().shape == ((rows + 1) // 2 - rank, D)


def _returned(splits):
    """Gradients of a gathered table: the same on ranks that split classes, else to be averaged."""
    from torch.distributed.tensor import Partial, Replicate

    return [Replicate(), Replicate()] if splits else [Partial("sum"), Replicate()]


def _hold_refusals(device):
    """An error says what must hold, and how to get there."""
    import pytest
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from tritium.kernels.linear_cross_entropy import linear_cross_entropy

    mesh, other = _meshes(device)
    group = mesh.get_group("classes")
    hidden, target = torch.randn(T, D, device=device), torch.zeros(T, dtype=torch.long)

    def placed(x, *placements):
        return distribute_tensor(x, mesh, placements or [Replicate(), Shard(0)])

    weight, x = torch.randn(V, D, device=device), placed(hidden, Replicate(), Replicate())
    rows = placed(weight)
    columns = placed(weight, Replicate(), Shard(1))
    bias = torch.zeros(V, device=device)
    few = placed(weight[:1])
    cases = [
        ("every rank must have a class, got 1 classes over 2", hidden, few, {"group": group}),
        ("on the dimension of group, got S", hidden, columns, {"group": group}),
        ("group must be that of a dimension", hidden, rows, {"group": dist.new_group([0, 1])}),
        ("a DTensor as input must be replicated", placed(hidden), rows, {}),
        ("and a group beside it", x, rows, {"group": group}),
        ("must be Shard\\(0\\) on one dimension", x, columns, {}),
        ("linear_weight must be a DTensor", x, weight, {}),
        ("linear_bias must be a DTensor", hidden, rows, {"linear_bias": bias}),
        ("linear_weight_grad is for plain", hidden, rows, {"linear_weight_grad": weight}),
    ]
    moved = DTensor.from_local(hidden, other, [Replicate(), Replicate()])
    cases.append(("a DTensor as input must be replicated over", moved, rows, {}))
    classes = {"weight": placed(torch.ones(V, device=device))}
    cases.append(("weight must be a plain tensor", hidden, rows, classes))
    for words, h, w, options in cases:
        with pytest.raises(ValueError, match=f"^linear_cross_entropy: .*{words}"):
            linear_cross_entropy(h, w, target.to(device), **options)
    with pytest.raises(ValueError, match="target must be a plain tensor, got a DTensor"):
        linear_cross_entropy(hidden, rows, placed(target.to(device)))


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
