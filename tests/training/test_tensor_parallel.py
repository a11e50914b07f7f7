"""Prove that every mode trains as one process does, and that each reads what another has saved.

Four processes on gloo take one check after another; each computes the steps of one process, too.
"""

import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks as Pool
from torch.utils._python_dispatch import TorchDispatchMode

import train
from tritium.kernels import runtime
from tritium.kernels._cross_entropy_ranks import local_layer
from tritium.model import ModelConfig, Transformer
from tritium.model.saved import FILES, SHARDS, read_model, read_record, read_tensors
from tritium.training.consolidate import consolidate
from tritium.training.optim import OptimizerConfig
from tritium.training.parallel import ALONE, Parallel
from tritium.training.precision import Arithmetic
from tritium.training.run import checkpoint, sharded
from tritium.training.run.ranks import Ranks
from tritium.training.tensor_parallel import obstacle

pytestmark = pytest.mark.slow

HEAD = "tritium.kernels.linear_cross_entropy"  # the module, of which kernels names the function
RANKS = 4
STEPS = 3
V, L, B = 42, 8, 4  # tokens that four ranks do not divide, sequences, a batch
BASE = dict(vocab_size=V, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, max_seq_len=L)
GPT2 = BASE | dict(
    n_kv_heads=4, positions="learned", norm="layer", activation="gelu", bias=True, qk_norm=False,
    tie_embeddings=False,
)  # fmt: skip
CASES = {  # mode, ranks of a group, shape, what is recomputed, dropout
    "hsdp": ("hsdp", 2, BASE, "every-2", 0.0),
    "tp": ("tp", 4, BASE | {"n_kv_heads": 4, "bias": True}, "selective", 0.2),
    "tp and fsdp": ("tp", 2, BASE | {"token_shift": True}, "full", 0.0),
    "tp and fsdp, biases": ("tp", 2, GPT2, "none", 0.0),
    "tp and fsdp, parallel blocks": (
        "tp", 2, BASE | dict(parallel_blocks=True, activation="relu_squared"), "none", 0.0,
    ),
}  # fmt: skip
MODES = {"fsdp": 0, "hsdp": 2, "tp": 2}  # and the ranks of a group
# The gradient of a key's bias is 0 except for rounding, which a small eps would make a step of.
OPTIMIZER = OptimizerConfig("muon", max_grad_norm=0.3, eps=1e-3, row_beta2=0.9)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Pool(RANKS, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def build(shape, *, policy="none", dropout=0.0, parallel=ALONE):
    """Make a model whose weights are all drawn, and its optimizer."""
    runtime.CPU_KERNELS = False  # this process is none of pytest's
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape), activation_checkpointing=policy, dropout=dropout)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    parallel.wrap(model, Arithmetic(torch.float32, nullcontext()))
    return model, OPTIMIZER.make(model, learning_rate=0.01)


def shared(mode, group):
    return Parallel(Ranks(dist.get_rank(), dist.get_world_size()), mode, group_size=group)


def advance(model, optimizer, seed, parallel=ALONE):
    """Take a step on this rank's share of a batch; return loss and gradient norm of all of it."""
    draw = torch.Generator().manual_seed(seed)
    batch = torch.randint(V, (2, B, L), generator=draw)
    batch[1, 0, :3] = -100
    own = batch.chunk(parallel.data.size, 1)[parallel.data.rank]
    torch.manual_seed(seed)
    loss = train.accumulate_gradients(model, tuple(own), 1, nullcontext(), parallel)
    optimizer.step()
    optimizer.zero_grad()
    return loss, optimizer.grad_norm


def content(model, optimizer):
    """Weights and states by file and name, whole and in the order of one process."""
    taken = checkpoint.snapshot(7, model, optimizer, {}, copy=False).tensors
    return {
        f"{file} {name}": x.full_tensor() if sharded.is_distributed(x) else x.clone()
        for file, named in taken.items()
        for name, x in named.items()
    }


def assert_near(got, wanted):
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (got[name] - x).norm() <= 2e-5 * x.norm() + 1e-7, name


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_process(case, ranks):
    ranks(_trains_as_one_process, case)


def _trains_as_one_process(case):
    mode, group, shape, policy, dropout = CASES[case]
    parallel = shared(mode, group)
    several = build(shape, policy=policy, dropout=dropout, parallel=parallel)
    one = build(shape, policy=policy, dropout=dropout)
    names = [name for name, _ in one[0].named_parameters()]
    for seed in range(STEPS):
        found = advance(*several, seed, parallel)
        torch.testing.assert_close(found, advance(*one, seed), rtol=2e-6, atol=1e-6)
        own = torch.stack(found)
        dist.broadcast(first := own.clone(), 0)
        assert torch.equal(own, first)
    assert [name for name, _ in several[0].named_parameters()] == names
    assert_near(content(*several), content(*one))
    assert sum(sharded.local(p).numel() for p in several[0].parameters()) < 0.75 * sum(
        p.numel() for p in one[0].parameters()
    )
    rows = []  # of the head, by which a rank multiplies

    def recorded(*arguments):
        layer = local_layer(*arguments)
        rows.append(len(layer.weight))
        return layer

    tokens = torch.arange(L)[None] + 3
    with torch.no_grad(), patch.object(sys.modules[HEAD], "local_layer", recorded):
        loss = [model.eval()(tokens, tokens) for model in (several[0], one[0])]
    torch.testing.assert_close(*loss, rtol=1e-5, atol=1e-6)
    assert all(n <= -(-V // group) for n in rows)
    assert len(rows) == (mode == "tp")


class Sums(TorchDispatchMode):
    """Count the sums over ranks that torch's DTensors make."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops._c10d_functional.all_reduce.default
        return func(*args, **kwargs or {})


def test_selective_recomputes_no_sum_over_ranks(ranks):
    ranks(_selective_recomputes_no_sum_over_ranks)


def _selective_recomputes_no_sum_over_ranks():
    parallel, counts, losses = shared("tp", 2), {}, []
    for policy in ("none", "selective", "full"):
        model, optimizer = build(BASE, policy=policy, parallel=parallel)
        with Sums() as sums:
            losses.append(advance(model, optimizer, 0, parallel))
        counts[policy] = sums.count
    assert counts["selective"] == counts["none"]
    assert counts["full"] == counts["none"] + 2 * BASE["n_layers"]
    assert losses[0] == losses[1] == losses[2]


def test_every_mode_reads_what_another_has_saved(ranks, tmp_path):
    ranks(_every_mode_reads_what_another_has_saved, str(tmp_path))


def _every_mode_reads_what_another_has_saved(folder):
    group = Ranks(dist.get_rank(), dist.get_world_size())
    makers = {mode: partial(shared, mode, size) for mode, size in MODES.items()}
    saved, parallels = {}, {mode: make() for mode, make in makers.items()}
    parallels["none"] = ALONE
    for mode, parallel in parallels.items():
        model, optimizer = build(BASE, parallel=parallel)
        advance(model, optimizer, 0, parallel)
        taken = checkpoint.snapshot(7, model, optimizer, {}, copy=True)  # as an asynchronous save
        expected = content(model, optimizer)
        advance(model, optimizer, 1, parallel)  # which the copy does not follow
        path = Path(folder, mode, "checkpoints")
        if taken.sharded or group.first:
            checkpoint.write(path, taken, group if taken.sharded else Ranks())
        group.wait()
        saved[mode] = path / "step-00000007", expected, content(model, optimizer)
    for before, after in product(saved, parallels):
        path, expected, next_step = saved[before]
        model, optimizer = build(BASE, parallel=parallels[after])
        assert checkpoint.load(path, model, optimizer) == (7, {})
        found = content(model, optimizer)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(found[name], x), (before, after, name)
        if before != after:
            advance(model, optimizer, 1, parallels[after])
            assert_near(content(model, optimizer), next_step)
    if group.first:
        path, expected, _ = saved["tp"]
        assert (path / SHARDS).is_dir()
        assert consolidate(path.parents[1]) == path
        record = read_record(path)
        for file in FILES:
            for name, x in read_tensors(path, file, record).items():
                assert torch.equal(x, expected[f"{file} {name}"])
        weight = read_model(path, Transformer).blocks[0].attention.query_key_value.weight
        name = f"{FILES[0]} blocks.0.attention.query_key_value.weight"
        assert torch.equal(weight, expected[name])
    group.wait()


def test_a_shape_that_ranks_cannot_share_is_said():
    cases = [
        ({"n_heads": 6, "n_kv_heads": 3, "d_head": 8}, 4, "n_heads must be divisible by the 4"),
        ({}, 4, "n_kv_heads must be divisible by the 4 processes of a group, got 2"),
        ({"d_ff": 33}, 2, "d_ff must be divisible"),
        ({"vocab_size": 5, "n_kv_heads": 4}, 4, "vocab_size must give each of 4"),
        ({}, 2, None),
    ]
    for changes, size, words in cases:
        said = obstacle(ModelConfig(**(BASE | changes)), size)
        assert said is None if words is None else words in said
