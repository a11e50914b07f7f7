"""Parameters over the ranks of a mesh, and the same gradients for them as for whole ones."""

from functools import cache

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor


@cache
def mesh_of(*shape):
    """The mesh of this shape: its last dimension is "inner", the one before it "outer"."""
    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def full(x):
    """The whole of a tensor, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread(ps, mesh, *placements):
    """Parameters, on each rank its shard; None leaves one as it is, on every rank the same."""
    placements = placements * len(ps) if len(placements) == 1 else placements
    copies = [p.detach().clone() for p in ps]
    return [
        nn.Parameter(x if how is None else distribute_tensor(x, mesh, how))
        for x, how in zip(copies, placements, strict=True)
    ]


def set_gradients(ps, qs, seed, scale=1.0):
    """Set the same gradients on complete parameters `ps` and on distributed `qs`."""
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(ps, qs, strict=True):
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p)
        g = p.grad.clone()
        q.grad = distribute_tensor(g, q.device_mesh, q.placements) if isinstance(q, DTensor) else g


def assert_close(xs, ys):
    """Assert that tensors, distributed or not, are equal up to rounding."""
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(full(x), full(y), rtol=1e-5, atol=1e-6)


def assert_equal(xs, ys):
    """Assert that tensors, distributed or not, are equal."""
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(full(x), full(y))
