"""Muon over DTensors steps on several ranks as on one, and its state goes to other numbers of them.

Four processes on gloo take one check after another; each computes the unsharded step as well.
"""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
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
from torch.distributed.tensor import DTensor, Replicate, Shard

from tritium.kernels.optimizers._exchange import balanced
from tritium.kernels.optimizers.muon import Muon

KERNEL, REFERENCE = False, True
# With 4 ranks: uneven and empty shards; two matrices of one shape, two in a stack; AdamW's last.
SHAPES = [(9, 4), (9, 4), (1, 7), (24, 8), (6, 10), (5,), (13, 3)]
OTHERS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def whole():
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def muon(ps, **options):
    groups = [
        {"params": ps[:2], "beta2": 0.9},
        {"params": ps[2:3]},
        {"params": ps[3:4], "splits": (9, 15), "beta2": 0.5, "weight_decay": 0.0},
        {"params": ps[4:-OTHERS], "nesterov": False},
        {"params": ps[-OTHERS:], "use_muon": False, "lr": 0.01},
    ]
    return Muon(groups, lr=0.05, ns_coefficients="polar_express", **options)


ROWS, COLUMNS = Shard(0), Shard(1)
LAYOUTS = {
    "sharded": ((4,), [(ROWS,)], 1),
    "hybrid": ((2, 2), [(Replicate(), ROWS)], 1),
    "mixed": (
        (2, 2),
        [
            (COLUMNS, ROWS), (ROWS, COLUMNS), (ROWS, Replicate()), (ROWS, COLUMNS),
            (Replicate(), Replicate()), None, (Replicate(), ROWS),
        ],
        2,
    ),
}  # fmt: skip
"""Mesh, placements, and the number of different sets of ranks that share matrices."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_as_one_rank_does(ranks, layout):
    ranks(_steps_as_one_rank_does, layout)


def _steps_as_one_rank_does(layout):
    shape, placements, sets = LAYOUTS[layout]
    ps = whole()
    qs = spread(ps, mesh_of(*shape), *placements)
    options = dict(max_grad_norm=1.0, record_norms=True, ema_decay=0.9, zero_grads=True)
    follow((ps, muon(ps, **options)), (qs, muon(qs, **options)), REFERENCE, range(3), sets)


def test_kernels_step_as_one_rank_does(ranks):
    ranks(_kernels_step_as_one_rank_does)


def _kernels_step_as_one_rank_does():
    ps = [nn.Parameter(torch.randn(shape)) for shape in ((9, 4), (12, 8), (5,))]
    qs = spread(ps, mesh_of(4), (ROWS,))  # two of four ranks own nothing

    def make(ps):
        others = {"params": ps[2:], "use_muon": False}
        matrices = {"params": ps[:1]}, {"params": ps[1:2], "splits": (9, 3), "beta2": 0.9}
        options = dict(max_grad_norm=1.0, record_norms=True, zero_grads=True)
        return ps, Muon([*matrices, others], ns_steps=1, lr=0.05, **options)

    follow(make(ps), make(qs), KERNEL, range(2), 1)


def follow(whole, sharded, reference, seeds, sets):
    """Assert that steps of both are the same; `sets` of ranks share matrices."""
    (ps, one), (qs, many) = whole, sharded
    for seed in seeds:
        set_gradients(ps, qs, seed, scale=1e30 if seed == 1 else 1.0)  # their squares are infinite
        sends = patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single)
        with path(reference), sends as sent:
            one.step()
            many.step()
            norms, actual = one.norms(), many.norms()
        # The kernels do not wait to be told that a step is skipped.
        assert sent.call_count == (0 if seed == 1 and reference else 2 * sets)
        assert many.skipped.item() == (seed > 0)
        assert not any(full(q.grad).any() for q in qs)
        assert_close(qs, ps)
        for name in ("grad", "update", "weight"):
            x, y = getattr(actual, name), getattr(norms, name)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for p, q in zip(ps, qs, strict=True):
        assert one.state[p].keys() == many.state[q].keys()
        for name, x in many.state[q].items():
            if name not in ("step", "row_second_moment"):
                assert getattr(x, "placements", None) == getattr(q, "placements", None)
            assert_close([x], [one.state[p][name]])


def test_without_a_clip_all_bits_are_those_of_one_rank(ranks):
    ranks(_without_a_clip_all_bits_are_those_of_one_rank)


def _without_a_clip_all_bits_are_those_of_one_rank():
    ps = [nn.Parameter(torch.randn(9, 4) * 10.0**i) for i in range(3)]
    qs = spread(ps, mesh_of(4), (ROWS,))
    one, many = Muon(ps, beta2=0.9), Muon(qs, beta2=0.9)
    for seed in range(3):
        set_gradients(ps, qs, seed)
        with path(REFERENCE):
            one.step()
            many.step()
    assert_equal(qs, ps)


def test_stacks_that_are_split_rank_by_rank(ranks):
    ranks(_stacks_that_are_split_rank_by_rank)


def _stacks_that_are_split_rank_by_rank():
    splits, (p,) = (4, 8, 2), [nn.Parameter(torch.randn(14, 6))]
    first, second = zip(*(part.chunk(2) for part in torch.arange(14).split(splits)), strict=True)
    order = torch.cat([*first, *second])
    options = {"splits": splits, "beta2": 0.9}
    for placements in ((Replicate(), ROWS), (COLUMNS, ROWS)):
        ps = [nn.Parameter(p.detach().clone()), nn.Parameter(p.detach()[order])]
        (q,) = spread(ps[1:], mesh_of(2, 2), placements)
        one, many = Muon(ps[:1], **options), Muon([q], **options, splits_by_shard=True)
        for seed in range(2):
            set_gradients(ps[:1], ps[:1], seed)
            ps[1].grad = ps[0].grad[order]
            q.grad = spread([ps[1].grad], mesh_of(2, 2), placements)[0].detach()
            with path(REFERENCE):
                one.step()
                many.step()
        assert_close([q], [ps[0][order]])
        state, other = many.state[q], one.state[ps[0]]
        for name in ("momentum_buffer", "row_second_moment"):
            assert_close([state[name]], [other[name][order]])


def test_resumes_on_other_numbers_of_ranks(ranks, tmp_path):
    ranks(_resumes_on_other_numbers_of_ranks, str(tmp_path))


def _resumes_on_other_numbers_of_ranks(folder):
    def make(mesh):
        net = nn.Sequential(
            nn.Linear(6, 9, bias=False), nn.Linear(9, 5, bias=False), nn.Linear(5, 2)
        )
        if mesh is not None:
            fully_shard(net, mesh=mesh)
        ps = [*net.parameters()]
        matrices = {"params": ps[:2], "beta2": 0.9}
        return net, Muon([matrices, {"params": ps[2:], "use_muon": False}], lr=0.1)

    def train(net, optimizer, seeds):
        likes = [nn.Parameter(torch.empty(p.shape)) for p in net.parameters()]
        for seed in seeds:
            set_gradients(likes, [*net.parameters()], seed)
            optimizer.step()

    def saved(net, optimizer):
        return {"net": get_model_state_dict(net), "optim": get_optimizer_state_dict(net, optimizer)}

    with path(REFERENCE):
        net, optimizer = make(mesh_of(4))
        train(net, optimizer, range(2))
        first = next(net.parameters())
        for x in optimizer.state[first].values():
            assert isinstance(x, DTensor)
            assert len(x.to_local()) == len(first.to_local())
        dcp.save(saved(net, optimizer), checkpoint_id=folder)
        train(net, optimizer, range(2, 4))
        for mesh in (mesh_of(4), mesh_of(2, 2)["inner"], None):
            other, resumed = make(mesh)
            state = saved(other, resumed)
            dcp.load(state, checkpoint_id=folder)
            other.load_state_dict(state["net"])
            set_optimizer_state_dict(other, resumed, state["optim"])
            train(other, resumed, range(2, 4))
            assert_close(other.parameters(), net.parameters())


def test_a_whole_state_is_loaded_by_shards(ranks):
    ranks(_a_whole_state_is_loaded_by_shards)


def _a_whole_state_is_loaded_by_shards():
    ps = whole()[:1]
    qs = spread(ps, mesh_of(4), (ROWS,))
    one, many = Muon(ps, beta2=0.9), Muon(qs, beta2=0.9)
    set_gradients(ps, qs, 0)
    with path(REFERENCE):
        one.step()
    state = one.state_dict()
    state["state"][0]["momentum_buffer"] = spread(
        [one.state[ps[0]]["momentum_buffer"]], mesh_of(4), (ROWS,)
    )[0].detach()
    many.load_state_dict(state)
    assert_close(many.state[qs[0]].values(), one.state[ps[0]].values())
    assert many.state[qs[0]]["row_second_moment"].placements == (ROWS,)


@given(st.lists(st.integers(1, 1000), max_size=12), st.integers(1, 6))
def test_owners_are_about_as_busy_as_each_other(costs, size):
    owners = balanced(dict(enumerate(costs)), size)
    busy = [sum(c for i, c in enumerate(costs) if owners[i] == rank) for rank in range(size)]
    assert owners.keys() == {*range(len(costs))}
    assert sum(busy) == sum(costs)
    assert max(busy) - min(busy) <= max(costs, default=0)


def test_refuses_shards_that_it_cannot_put_together(ranks):
    ranks(_refuses_shards_that_it_cannot_put_together)


def _refuses_shards_that_it_cannot_put_together():
    ps = whole()[:1]
    with pytest.raises(ValueError, match=r"each along one dimension of the mesh, got \(Shard"):
        Muon(spread(ps, mesh_of(2, 2), (ROWS, ROWS)))
    part = DeviceMesh("cpu", torch.tensor([[0, 1]]))
    if dist.get_rank() in part.mesh:
        with pytest.raises(
            ValueError, match=r"dimensions \[0, 1\] .* must have all 4 ranks, got 2"
        ):
            Muon(spread(ps, part, (COLUMNS, ROWS)))
    with pytest.raises(ValueError, match=r"divisible by the 2 ranks .* got \(4, 5\)"):
        Muon(spread(ps, mesh_of(2, 2), (COLUMNS, ROWS)), splits=(4, 5), splits_by_shard=True)
