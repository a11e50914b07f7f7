"""Faults of tensor parallelism and hybrid sharding: sums over ranks, rows of each rank, groups."""

from functools import partial

from tests.mutants import Mutant

_tensor = partial(Mutant, file="training/tensor_parallel.py")
_parallel = partial(Mutant, file="training/parallel.py")
_sharded = partial(Mutant, file="training/run/sharded.py")
_optimizers = partial(Mutant, file="kernels/optimizers/_dtensor.py")

MUTANTS = [
    _tensor(
        what="the gradient of a product's input not summed",
        original="return (x.to_local(grad_placements=[Partial()]),)",
        replacement="return (x.to_local(),)",
    ),
    _tensor(
        what="what leaves a block not summed",
        original="    y = _sum(mesh, y)\n",
        replacement="",
    ),
    _tensor(
        what="the bias of an output added by every rank",
        original="            if place in self._behind:",
        replacement="            if False:",
    ),
    _tensor(
        what="the bias of an output forgotten",
        original="return y + biases[module] if module in biases else y",
        replacement="return y",
    ),
    _tensor(
        what="packed projections cut as one",
        original="parts = torch.arange(sum(splits)).split([*splits])",
        replacement="parts = [torch.arange(sum(splits))]",
    ),
    _tensor(
        what="as many key heads as all ranks have",
        original="        attention.kv_heads //= size\n",
        replacement="",
    ),
    _tensor(
        what="gradients of the norms of heads not summed",
        original='summed=[(norm, "weight") for norm in norms if norm is not None],',
        replacement="summed=[],",
    ),
    _tensor(
        what="gradients of packed biases not summed",
        original="        if place not in self._summed:\n            return p.to_local()\n",
        replacement="        if place not in self._summed or place in self._rows:\n"
        "            part = p.to_local()\n"
        "            return part[self._rows[place]] if place in self._rows else part\n",
    ),
    _tensor(
        what="embedding and head no longer tied",
        original="    if tied:\n        head.weight = embedding.weight\n    else:",
        replacement="    if True:",
    ),
    _tensor(
        what="tokens of another rank looked up as the first of this one",
        original="x_BLD.masked_fill(elsewhere.unsqueeze(-1), 0)",
        replacement="x_BLD",
    ),
    _tensor(
        what="rows of the embedding counted as if ranks had equally many",
        original="-(-embedding.num_embeddings // mesh.size())",
        replacement="(embedding.num_embeddings // mesh.size())",
    ),
    _tensor(
        what="hidden states in a plain tensor",
        original="return _replicated(mesh, None, (h_BLD,))[0]",
        replacement="return h_BLD",
    ),
    _tensor(
        what="local parameters left in a block whose recomputation ends early",
        original=", always_call=True)",
        replacement=")",
    ),
    _tensor(
        what="rows saved in the order of the ranks",
        original="return _reordered(x, rank_order(linear, size).argsort())",
        replacement="return x",
    ),
    _tensor(
        what="rows loaded in the order of a whole model",
        original="return _reordered(x, rank_order(linear, size))",
        replacement="return x",
    ),
    _tensor(
        what="norms and biases plain, on no mesh",
        original="        if p is not None and not _dimensions(p):",
        replacement="        if False:",
    ),
    _tensor(
        what="key heads that ranks do not divide",
        original='("n_kv_heads", config.kv_heads),',
        replacement="",
    ),
    _tensor(
        what="a rank without tokens",
        original="if rows * (size - 1) >= config.vocab_size:",
        replacement="if False:",
    ),
    _parallel(
        what="fsdp shards the rows that are split already",
        original="return Shard(1) if any(x.is_shard(0) for x in placements) else None",
        replacement="return None",
    ),
    _parallel(
        what="tp: a share of the batch for every rank of a group",
        original="self.data = Ranks(ranks.rank // group_size, n_groups, own)",
        replacement="pass",
    ),
    _parallel(
        what="tp: ranks of a group share a batch",
        original="[[*range(i, ranks.size, group_size)] for i in range(group_size)]",
        replacement="[[*range(i * n_groups, (i + 1) * n_groups)] for i in range(group_size)]",
    ),
    _parallel(
        what="hsdp without its groups",
        original="shard(model, arithmetic.dtype, mesh)",
        replacement="shard(model, arithmetic.dtype, mesh and mesh[MESHES[self.mode][1]])",
    ),
    _parallel(
        what="tp: no sharding between groups",
        original='self.mode in SHARDED and (self.mode != "tp" or self.data.size > 1)',
        replacement='self.mode in SHARDED and self.mode != "tp"',
    ),
    _sharded(
        what="states not reordered with their weight",
        original='own = name if name in parameters else name.rpartition(".")[0]',
        replacement="own = name",
    ),
    _optimizers(
        what="the norm counts replicated gradients once per rank",
        original="count *= mesh.size(dim) if placement.is_replicate() else 1",
        replacement="count *= 1",
    ),
    Mutant(
        what="every rank shifts by all columns of tokens",
        file="training/tensor_parallel.py",
        original='packed=[*((linear, "bias") for linear in into), *shifts],',
        replacement='packed=[(linear, "bias") for linear in into],',
    ),
    Mutant(
        what="selective recomputes sums over ranks",
        file="model/activation_checkpointing.py",
        original="    KEPT.add(torch.ops._c10d_functional.all_reduce.default)\n",
        replacement="    pass\n",
    ),
]
