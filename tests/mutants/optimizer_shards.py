"""Faults of what serves DTensors: counts, meshes, shards on their way, placements, state."""

from functools import partial

from tests.mutants import Mutant

_shards = partial(Mutant, file="kernels/optimizers/_dtensor.py")
_tensors = partial(Mutant, file="kernels/optimizers/_step_inputs.py")
_optimizer = partial(Mutant, file="kernels/optimizers/_base.py")
_norm = partial(Mutant, file="kernels/optimizers/grad_norm.py")
_clip = partial(Mutant, file="kernels/optimizers/clip_grad_norm.py")

MUTANTS = [
    _shards(
        what="no DTensor noticed",
        original='return any(hasattr(kind, "to_local") for kind in {*map(type, tensors)})',
        replacement='return all(hasattr(kind, "to_local") for kind in {*map(type, tensors)})',
    ),
    _shards(
        what="shards read before they arrive",
        original='return getattr(shard, "wait", lambda: shard)()',
        replacement="return shard",
    ),
    _shards(
        what="one of two meshes taken",
        original="if len(meshes) > 1:",
        replacement="if len(meshes) > 2:",
    ),
    _shards(
        what="plain tensors counted by every rank",
        original="        return mesh.size()\n",
        replacement="        return 1\n",
    ),
    _shards(
        what="sums that are not made taken for shards",
        original="if any(placement.is_partial() for placement in x.placements):",
        replacement="if False:",
    ),
    _shards(
        what="replicas counted by every rank",
        original="count *= mesh.size(dim) if placement.is_replicate() else 1",
        replacement="count *= 1",
    ),
    _shards(
        what="replicas along one dimension of the mesh only",
        original="count *= mesh.size(dim) if",
        replacement="count = mesh.size(dim) if",
    ),
    _shards(
        what="replicas of all ranks of the mesh",
        original="count *= mesh.size(dim) if",
        replacement="count *= mesh.size() if",
    ),
    _shards(
        what="replicas rounded apart",
        original="            if not placement.is_replicate():\n                index",
        replacement="            if True:\n                index",
    ),
    _shards(
        what="all shards rounded by the same bits",
        original="x.device_mesh.get_local_rank(dim)",
        replacement="0",
    ),
    _shards(
        what="gradients of other placements taken",
        original="if (wanted := _layout(p)) != (got := _layout(g)):",
        replacement="if bool(wanted := _layout(p)) != bool(got := _layout(g)):",
    ),
    _shards(
        what="plain gradients of distributed parameters taken",
        original="if (wanted := _layout(p)) != (got := _layout(g)):",
        replacement="if (wanted := _layout(p)) != (got := _layout(g) or wanted):",
    ),
    _shards(
        what="summed along one dimension of the mesh only",
        original="    for dim in range(mesh.ndim):\n        torch",
        replacement="    for dim in range(1):\n        torch",
    ),
    _shards(
        what="a sum for each dimension of a mesh of all ranks",
        original="if mesh.size() == torch.distributed.get_world_size():",
        replacement="if False:",
    ),
    _shards(
        what="the largest of all ranks of a mesh of them all",
        original="all_reduce(x)\n",
        replacement="all_reduce(x, torch.distributed.ReduceOp.MAX)\n",
    ),
    _shards(
        what="the largest of all ranks, not their sum",
        original="torch.distributed.all_reduce(x, group=",
        replacement="torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=",
    ),
    _tensors(
        what="placements of gradients not checked",
        original="            check_alike(self._op, ps, gs)\n",
        replacement="",
    ),
    _tensors(
        what="gradients not taken by their shards",
        original="gs, ps = list(map(local, gs)),",
        replacement="gs, ps = list(gs),",
    ),
    _tensors(
        what="every element counted on every rank",
        original="1 if self.mesh is None else replicas(self._op, p, self.mesh), shard_index(p),",
        replacement="1, shard_index(p),",
    ),
    _tensors(
        what="the shard left out of the seed",
        original="for part in (item.number, item.shard):",
        replacement="for part in (item.number,):",
    ),
    _tensors(
        what="strides of axes of one element compared",
        original="or not _are_alike([item.p], [x])):",
        replacement="or x.stride() != item.p.stride()):",
    ),
    _tensors(
        what="no mesh for the norm",
        original="self.mesh = mesh_of(self._op, ps) if are_distributed(ps) else None",
        replacement="self.mesh = None",
    ),
    _optimizer(
        what="norms of parameters of this rank's shards only",
        original="            sum_over_ranks(squares_N, found.mesh)\n",
        replacement="",
    ),
    _optimizer(
        what="norms of parameters count replicas",
        original="squares_N = squares_N / replicas_N[:, None].to(squares_N)",
        replacement="squares_N = squares_N / 1",
    ),
    _optimizer(
        what="8-bit state of DTensors taken",
        original='== torch.uint8 and hasattr(p, "to_local"):',
        replacement='== torch.uint8 and hasattr(p, "to_locals"):',
    ),
    _optimizer(
        what="kernels: each rank its own norm",
        original="partials_P = launch_partials(tables, sums, found.mesh)",
        replacement="partials_P = launch_partials(tables, sums)",
    ),
    _norm(
        what="reference: each rank its own norm",
        original="        sum_over_ranks(total_G, mesh)\n",
        replacement="        total_G = total_G * 1\n",
    ),
    _norm(
        what="reference: replicas counted by every rank",
        original="shares_N = squares_N / torch.tensor(replicas).to(squares_N)",
        replacement="shares_N = squares_N",
    ),
    _norm(
        what="kernels: replicas counted by every rank",
        original="partial += squares / tl.load(row_ptr + REPLICAS).to(tl.float32)",
        replacement="partial += squares",
    ),
    _norm(
        what="ranks of fewer chunks send fewer partials",
        original="programs = P if mesh is not None else min(P, n_chunks)",
        replacement="programs = min(P, n_chunks)",
    ),
    _clip(
        what="clips by the norm of one rank's shards",
        original="partials_P = launch_partials(tables, mesh=mesh)",
        replacement="partials_P = launch_partials(tables)",
    ),
    Mutant(
        what="the remainder lost when it is loaded",
        file="kernels/optimizers/_state.py",
        original=', "remainder": torch.int16}',
        replacement="}",
    ),
]
