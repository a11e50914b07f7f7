"""Faults of Muon over DTensors: who owns what, what is sent where, rows, state."""

from functools import partial

from tests.mutants import Mutant

_exchange = partial(Mutant, file="kernels/optimizers/_exchange.py")
_shards = partial(Mutant, file="kernels/optimizers/_dtensor.py")
_launch = partial(Mutant, file="kernels/optimizers/_muon_launch.py")
_matrices = partial(Mutant, file="kernels/optimizers/_matrices.py")
_muon = partial(Mutant, file="kernels/optimizers/muon.py")
_state = partial(Mutant, file="kernels/optimizers/_state.py")

MUTANTS = [
    _exchange(
        what="one rank owns everything",
        original="        busy[owners[i]] += costs[i]\n",
        replacement="",
    ),
    _exchange(
        what="owners in the order of the parameters",
        original="sorted(costs, key=lambda i: -costs[i])",
        replacement="sorted(costs, key=lambda i: costs[i])",
    ),
    _exchange(
        what="shards of equal length, the last one too",
        original="min((index + 1) * length, n))",
        replacement="(index + 1) * length)",
    ),
    _exchange(
        what="a chunk too short where ranks do not divide the rows",
        original="    length = -(-n // count)\n",
        replacement="    length = n // count\n",
    ),
    _exchange(
        what="columns cut as rows are",
        original="_chunk(0, n_columns, *columns)",
        replacement="_chunk(0, n_columns, row, among_rows)",
    ),
    _exchange(
        what="matrices stacked in a shard taken for one",
        original="zip(starts, stacked, strict=False)]",
        replacement="[(0, n_rows)]]",
    ),
    _exchange(
        what="every piece of a shard from its beginning",
        original="                first += len(rows)\n",
        replacement="",
    ),
    _exchange(
        what="moments of rows not sent",
        original="        self._leaving_rows()\n",
        replacement="",
    ),
    _exchange(
        what="moments of rows do not return",
        original="        self._returned_rows()\n",
        replacement="",
    ),
    _exchange(
        what="results from where the matrices arrived",
        original="self._pairs(whole if made is None else made)",
        replacement="self._pairs(whole)",
    ),
    _exchange(
        what="shards return as they came",
        original="        self._departures()\n",
        replacement="",
    ),
    _exchange(
        what="sizes of what is sent taken for those that arrive",
        original="for e in (y_ends, ends)]",
        replacement="for e in (ends, y_ends)]",
    ),
    _shards(
        what="ranks of a group along the other dimension",
        original="group = mesh.get_group(dims[0]) if",
        replacement="group = mesh.get_group(-1) if",
    ),
    _shards(
        what="two chunks of rows taken for one",
        original=" or len(dims) > len({*dims}):",
        replacement=":",
    ),
    _shards(
        what="a mesh of some ranks taken for all",
        original="    if len(dims) > 1 and mesh.size() != every:",
        replacement="    if False:",
    ),
    _shards(
        what="moments of rows sharded as columns are",
        original="how = [placement if placement.is_shard(0) else Replicate() for",
        replacement="how = [placement for",
    ),
    _shards(
        what="moments of rows kept whole",
        original="how = [placement if placement.is_shard(0) else Replicate() for",
        replacement="how = [Replicate() for",
    ),
    _state(
        what="moments of rows loaded whole",
        original="state[name] = distributed_rows(p, saved[name].to(p.device, torch.float32))",
        replacement="state[name] = saved[name].to(p.device, torch.float32)",
    ),
    _matrices(
        what="the whole stack sharded where its matrices are",
        original="self.splits if self.splits_by_shard else None",
        replacement="None",
    ),
    _matrices(
        what="the matrices sharded where the whole stack is",
        original="self.splits if self.splits_by_shard else None",
        replacement="self.splits",
    ),
    _matrices(
        what="splits that ranks do not divide",
        original="and any(x % among for x in splits)",
        replacement="and False",
    ),
    _launch(
        what="kernels: shards clipped twice",
        original="    coefs.select(1, 0).index_fill_(0, plan.matrices, 1.0)\n",
        replacement="",
    ),
    _launch(
        what="kernels: the whole matrix' offset for the shard's",
        original="momentum, results, starts = exchange.sent, exchange.sent, exchange.starts",
        replacement="momentum, results = exchange.sent, exchange.sent",
    ),
    _launch(
        what="kernels: matrices arrive where the last step leaves them",
        original="        exchange.connect(*both)\n",
        replacement="        exchange.connect(both[1], both[1])\n",
    ),
    _muon(
        what="each rank orthogonalizes its shards",
        original="        if found.mesh is None:\n",
        replacement="        if True:\n",
    ),
]
