"""Optimizers over DTensors step on several ranks as they, and torch's, do on one.

Four processes on gloo take one check after another; each computes the unsharded step as well.
"""

import copy
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from paths import path
from ranks import Ranks
from shards import assert_close, assert_equal, full, mesh_of, set_gradients, spread
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tritium.kernels.optimizers import clip_grad_norm
from tritium.kernels.optimizers.adamw import AdamW

RANKS = 4
SHAPES = [(5,), (2, 3), (9, 4), (1, 7), (130, 3)]  # with 4 ranks: empty and uneven shards
KERNEL, REFERENCE = False, True


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(RANKS, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def alike_on_all_ranks(x):
    """Return whether all ranks have the same bits."""
    every = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(every, x)
    return all(torch.equal(x, y) for y in every)


def whole(shapes=SHAPES, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


# Fully sharded training, with gradients from backward.


def model(dtype=torch.float32):
    layers = [nn.Linear(6, 130), nn.Tanh(), nn.Linear(130, 5), nn.LayerNorm(5), nn.Linear(5, 1)]
    return nn.Sequential(*layers).to(dtype)


def shard(net, mesh):
    fully_shard(net[0], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def split_up(net, layout):
    """A model over ranks, and which of how many parts of a batch this rank takes."""
    inner = mesh_of(2, 2)["inner"]  # two ranks; the other two do the same once more
    if layout == "tensor":  # the last two layers stay plain
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(net, inner, plan), 0, 1
    mesh = {"four": mesh_of(4), "two": inner, "hybrid": mesh_of(2, 2)}[layout]
    return shard(net, mesh), dist.get_rank() % mesh.size(), mesh.size()


def backward(net, seed, rank=0, ranks=1):
    """Gradients on the part of a batch that belongs to one of the `ranks`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator).chunk(ranks)[rank].to(next(net.parameters()).dtype)
    net.zero_grad()
    (net(x).float() - x[:, :1]).square().mean().backward()


@pytest.mark.parametrize(
    ("layout", "reference"),
    [("four", KERNEL), *((layout, REFERENCE) for layout in ("four", "two", "hybrid", "tensor"))],
    ids=["four-kernel", "four", "two", "hybrid", "tensor"],
)
def test_trains_as_torch_does_on_one_rank(ranks, layout, reference):
    ranks(_trains_as_torch_does_on_one_rank, layout, reference)


def _trains_as_torch_does_on_one_rank(layout, reference):
    expected = model()
    net, rank, size = split_up(copy.deepcopy(expected), layout)
    clipped = AdamW(net.parameters(), lr=0.01, max_grad_norm=0.5)
    torchs = torch.optim.AdamW(expected.parameters(), lr=0.01)
    for seed in range(4):
        backward(net, seed, rank, size)
        backward(expected, seed)
        with path(reference):
            clipped.step()
        norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        assert norm > 0.5
        torchs.step()
        torch.testing.assert_close(clipped.grad_norm, norm, rtol=1e-5, atol=0)
        assert alike_on_all_ranks(clipped.grad_norm)
        assert_close(net.parameters(), expected.parameters())


# Any placement, with gradients at will.

PLACEMENTS = {
    "sharded": ((4,), [(Shard(0),)]),
    "hybrid": ((2, 2), [(Replicate(), Shard(0))]),
    "both": ((2, 2), [(Shard(0), Shard(0))]),
    "mixed": (
        (2, 2),
        [(Replicate(), Replicate()), (Shard(0), Shard(1)), (Replicate(), Shard(1)), None, None],
    ),
}
PLACED = pytest.mark.parametrize(
    ("placed", "reference"),
    [("mixed", KERNEL), *((placed, REFERENCE) for placed in PLACEMENTS)],
    ids=["mixed-kernel", *PLACEMENTS],
)


def tensors(placed):
    shape, placements = PLACEMENTS[placed]
    ps = whole()
    return ps, spread(ps, mesh_of(*shape), *placements)


@PLACED
def test_clips_as_torch_does(ranks, placed, reference):
    ranks(_clips_as_torch_does, placed, reference)


def _clips_as_torch_does(placed, reference):
    ps, qs = tensors(placed)
    for max_norm in (1.0, 1e6):
        set_gradients(ps, qs, seed=1)
        with path(reference):
            norm = clip_grad_norm.clip_grad_norm_(qs, max_norm)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(ps, max_norm))
        assert alike_on_all_ranks(norm)
        assert_close([q.grad for q in qs], [p.grad for p in ps])


@PLACED
def test_steps_as_one_rank_does(ranks, placed, reference):
    ranks(_steps_as_one_rank_does, placed, reference)


def _steps_as_one_rank_does(placed, reference):
    ps, qs = tensors(placed)
    options = dict(max_grad_norm=1.0, record_norms=True, ema_decay=0.9, zero_grads=True)
    one, many = AdamW(ps, **options), AdamW(qs, **options)
    for seed in range(3):
        set_gradients(ps, qs, seed, scale=1e30 if seed == 1 else 1.0)  # their squares are infinite
        with path(reference):
            one.step()
            many.step()
            norms, actual = one.norms(), many.norms()
        assert many.skipped.item() == (seed > 0)
        assert not any(full(q.grad).any() for q in qs)
        torch.testing.assert_close(many.grad_norm, one.grad_norm)
        assert_close(qs, ps)
        for name in ("grad", "update", "weight"):
            x, y = getattr(actual, name), getattr(norms, name)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
            assert alike_on_all_ranks(x)
    for p, q in zip(ps, qs, strict=True):
        assert many.state[q]["step"].item() == 2
        for name in ("exp_avg", "exp_avg_sq", "ema"):
            x = many.state[q][name]
            assert getattr(x, "placements", None) == getattr(q, "placements", None)
            assert_close([x], [one.state[p][name]])


def test_the_norm_takes_one_sum_of_all_ranks(ranks):
    ranks(_the_norm_takes_one_sum_of_all_ranks)


def _the_norm_takes_one_sum_of_all_ranks():
    part = DeviceMesh("cpu", torch.tensor([[0, 1]]))  # two of four ranks, on the last dimension
    for mesh, sums in ((mesh_of(2, 2), 1), (part, 2)):
        if dist.get_rank() not in mesh.mesh:
            continue
        ps = whole()
        qs = spread(ps, mesh, (Replicate(), Shard(0)))
        set_gradients(ps, qs, seed=1)
        with path(REFERENCE), patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            norm = clip_grad_norm.clip_grad_norm_(qs, 1.0)
        assert reduced.call_count == sums
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(ps, 1.0))


def test_ranks_may_have_few_and_different_chunks(ranks):
    ranks(_ranks_may_have_few_and_different_chunks)


def _ranks_may_have_few_and_different_chunks():
    ps = whole([(6, 4096)])  # on four ranks 2, 2, 2 chunks, and an empty one
    qs = spread(ps, mesh_of(4), (Shard(0),))
    set_gradients(ps, qs, seed=1)
    with path(KERNEL):
        norm = clip_grad_norm.clip_grad_norm_(qs, 1.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(ps, 1.0))
    assert_close([q.grad for q in qs], [p.grad for p in ps])


@pytest.mark.parametrize(
    ("bad", "reference"), [(float("inf"), KERNEL), (float("nan"), REFERENCE)], ids=["inf", "nan"]
)
def test_all_ranks_skip_where_one_is_not_finite(ranks, bad, reference):
    ranks(_all_ranks_skip_where_one_is_not_finite, bad, reference)


def _all_ranks_skip_where_one_is_not_finite(bad, reference):
    for placed in ("sharded", "hybrid"):
        ps, qs = tensors(placed)
        optimizer = AdamW(qs, max_grad_norm=1.0)
        set_gradients(ps, qs, seed=1)
        if dist.get_rank() == RANKS - 1:
            qs[4].grad.to_local().view(-1)[0] = bad
        with path(reference):
            optimizer.step()
        assert not optimizer.grad_norm.isfinite()
        assert optimizer.skipped.item() == 1
        assert_equal(qs, ps)
        assert not any(full(s["exp_avg"]).any() for s in optimizer.state.values())


def test_waits_for_pending_gradients(ranks):
    ranks(_waits_for_pending_gradients)


def _waits_for_pending_gradients():
    ps = whole()
    mesh = mesh_of(4)
    qs = spread(ps, mesh, (Replicate(),))
    set_gradients(ps, qs, seed=1)
    for q in qs:
        part = DTensor.from_local(q.grad.to_local() / RANKS, mesh, [Partial()])
        q.grad = part.redistribute(mesh, [Replicate()], async_op=True)
    with path(KERNEL):
        AdamW(qs).step()
        AdamW(ps).step()
    assert_close(qs, ps)


# What is refused.


def test_refuses_unsupported_placements(ranks):
    ranks(_refuses_unsupported_placements)


def _refuses_unsupported_placements():
    ps, qs = tensors("sharded")
    mesh = mesh_of(4)
    set_gradients(ps, qs, seed=1)
    qs[0].grad = DTensor.from_local(torch.ones(5), mesh, [Partial()])
    before = [full(q).clone() for q in qs]
    with pytest.raises(ValueError, match=r"as its parameter is, .* \(\(Partial\(sum\),\),"):
        AdamW(qs).step()
    with pytest.raises(ValueError, match=r"clip_grad_norm_: .* \(Partial\(sum\),\).*redistribute"):
        clip_grad_norm.clip_grad_norm_(qs, 1.0)
    qs[0].grad = ps[0].grad
    with pytest.raises(ValueError, match=r"must be sharded or replicated as its .* got None"):
        AdamW(qs).step()
    qs[0] = spread(ps[:1], mesh_of(2, 2), (Shard(0), Replicate()))[0]
    set_gradients(ps, qs, seed=1)
    with pytest.raises(ValueError, match=r"AdamW: .* must share one device mesh, got 2"):
        AdamW(qs).step()
    with pytest.raises(ValueError, match=r"clip_grad_norm_: .* must share one device mesh, got 2"):
        clip_grad_norm.clip_grad_norm_(qs, 1.0)
    with pytest.raises(TypeError, match=r"float32 or bfloat16 for distributed tensors"):
        AdamW(qs, state_dtype=torch.uint8)
    summed = nn.Parameter(DTensor.from_local(torch.ones(5), mesh, [Partial()]))
    summed.grad = torch.ones_like(summed)
    with pytest.raises(ValueError, match=r"must be sharded or replicated, got \(Partial\(sum\),\)"):
        AdamW([summed]).step()
    assert_equal(qs, before)


# State in every precision.

MASTERS = {"float32": "master", "split": "remainder", None: None}


@pytest.mark.parametrize(
    ("master", "reference"),
    [("float32", REFERENCE), ("split", KERNEL), (None, REFERENCE)],
    ids=["float32", "split-kernel", "stochastic"],
)
def test_resumes_bitwise(ranks, master, reference, tmp_path):
    ranks(_resumes_bitwise, master, reference, str(tmp_path))


def _resumes_bitwise(master, reference, folder):
    mesh = mesh_of(4)

    def make():
        net = shard(model(torch.bfloat16), mesh)
        dtype = torch.bfloat16 if master is None else torch.float32
        options = dict(master=master, state_dtype=dtype, max_grad_norm=1.0, ema_decay=0.9)
        return net, AdamW(net.parameters(), lr=0.01, **options)

    def train(net, optimizer, seeds):
        for seed in seeds:
            backward(net, seed, mesh.get_local_rank(), mesh.size())
            optimizer.step()

    def everything(net, optimizer):
        kept = get_optimizer_state_dict(net, optimizer)["state"]
        assert kept.keys() == dict(net.named_parameters()).keys()
        every = [*net.parameters(), *(x for own in kept.values() for x in own.values())]
        # Shard by shard: no backend gathers int16.
        return [x.to_local() if isinstance(x, DTensor) else x for x in every]

    with path(reference):
        net, optimizer = make()
        train(net, optimizer, range(2))
        for p in net.parameters():
            own = optimizer.state[p]
            extra = {MASTERS[master]} - {None}
            assert own.keys() == {"step", "exp_avg", "exp_avg_sq", "ema"} | extra
            for x in [x for name, x in own.items() if name != "step"]:
                assert x.placements == p.placements
                assert x.to_local().shape == p.to_local().shape
        weights = get_model_state_dict(net)
        saved = {"net": weights, "optim": get_optimizer_state_dict(net, optimizer)}
        dcp.save(saved, checkpoint_id=folder)
        train(net, optimizer, range(2, 4))

        other, resumed = make()
        saved = {
            "net": get_model_state_dict(other),
            "optim": get_optimizer_state_dict(other, resumed),
        }
        dcp.load(saved, checkpoint_id=folder)
        other.load_state_dict(saved["net"])
        set_optimizer_state_dict(other, resumed, saved["optim"])
        train(other, resumed, range(2, 4))
        assert_equal(everything(other, resumed), everything(net, optimizer))


def test_rounds_shards_independently_and_replicas_alike(ranks):
    ranks(_rounds_shards_independently_and_replicas_alike)


def _rounds_shards_independently_and_replicas_alike():
    p = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
    (q,) = spread([p], mesh_of(2, 2), (Replicate(), Shard(0)))
    set_gradients([p], [q], seed=1)
    q.grad.fill_(1)
    with path(KERNEL):
        AdamW([q], master=None, lr=1e-3).step()
    first, second = full(q).chunk(2)
    assert len(first.unique()) == len(second.unique()) == 2
    assert not torch.equal(first, second)
    assert alike_on_all_ranks(full(q).float())
