"""Bytes of a real step on ranks of gloo, counted: communicated by kind, and live at their peak."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, cast
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train import accumulate_gradients
from tritium.bench.ends import FailedError
from tritium.bench.scale.links import Collective, Group
from tritium.model import ModelConfig, Transformer
from tritium.training.optim import OptimizerConfig
from tritium.training.parallel import Parallel
from tritium.training.precision import Arithmetic
from tritium.training.run.ranks import Ranks
from tritium.training.run.sharded import local

KINDS = {"reduce_scatter": "reduce-scatter", "all_gather": "all-gather", "all_reduce": "all-reduce"}
STEPS = 3  # the last one is counted: the first makes states, the second DDP's own buckets


class Meter(TorchDispatchMode):
    """Count collectives, and the bytes of the tensors that live, while it is entered.

    FSDP frees a gathered tensor by resizing its storage, so sizes are read anew at each operator.

    Attributes:
        moved: bytes that this rank sends, by kind of collective, scalars left out.
        peak: the most bytes that have lived at a time, of tensors made since it was entered.
    """

    def __init__(self):
        super().__init__()
        self.moved: defaultdict[str, float] = defaultdict(float)
        self.peak = 0
        self._storages: dict[int, ref] = {}

    def clear(self) -> None:
        """Forget what was counted, not what lives."""
        self.moved.clear()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator, and note what it sends and makes."""
        outputs = self._run(func, args, kwargs or {})
        if "c10d" in func.namespace:
            self._note(func, args, outputs)
        for x in tree_leaves(outputs):
            if isinstance(x, Tensor):
                storage = local(x).untyped_storage()  # that of a DTensor itself is empty
                self._storages[storage._cdata] = ref(storage)
        self.peak = max(self.peak, self._live())
        return outputs

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; inside one of Tritium's, see what it calls."""
        if func.namespace != "tritium":
            return func(*args, **kwargs)
        with self:
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)

    def _live(self) -> int:
        alive = {k: x for k, ref in self._storages.items() if (x := ref()) is not None}
        self._storages = {k: self._storages[k] for k in alive}
        return sum(x.nbytes() for x in alive.values())

    def _note(self, func: Any, args: Any, outputs: Any) -> None:
        name = func.overloadpacket.__name__.strip("_").replace("allreduce", "all_reduce")
        name = name.replace("allgather", "all_gather")
        kind = next((kind for start, kind in KINDS.items() if start in name), None)
        tensors = [x for x in tree_leaves((args, outputs)) if isinstance(x, Tensor)]
        nbytes = max((x.nbytes for x in tensors), default=0)  # gathered, or not yet scattered
        if kind is not None and max((x.numel() for x in tensors), default=0) > 1:
            self.moved[kind] += Collective(kind, nbytes, Group(_size(args), 1)).moved


def _size(args: Any) -> int:
    """Return the number of ranks of an operator's process group."""
    for x in tree_leaves(args):
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
            return dist.ProcessGroup.unbox(x).size()
    names = [x for x in args if isinstance(x, str)]
    return cast(Any, dist.distributed_c10d)._resolve_process_group(names[-1]).size()


@dataclass(frozen=True)
class Counts:
    """One rank's step; bytes."""

    parameters: int
    gradients: int
    states: int
    peak: int
    """The most that lives at a time, those three included."""
    moved: dict[str, float] = field(default_factory=dict)


def count_step(
    config: ModelConfig, ranks: Ranks, mode: str, *, sequences: int, micro_batch: int,
    policy: str = "none", group_size: int = 0,
) -> Counts:  # fmt: skip
    """Train for three steps in float32 with AdamW on the ranks of the default group; count one.

    Args:
        config: the model.
        ranks: this rank.
        mode: of `--parallel`.
        sequences: of a step, on all ranks.
        micro_batch: sequences of a forward pass.
        policy: activation checkpointing.
        group_size: ranks of a group of hsdp or tp.
    """
    with Meter() as meter:
        model = Transformer(config, activation_checkpointing=policy)
        parallel = Parallel(ranks, mode, group_size=group_size)
        parallel.wrap(model, Arithmetic(torch.float32, nullcontext()))
        optimizer = OptimizerConfig().make(model, learning_rate=1e-3)
        own = sequences // parallel.data.size
        batch = tuple(torch.randint(config.vocab_size, (2, own, config.max_seq_len)))
        for _ in range(STEPS):
            meter.clear()
            accumulate_gradients(model, batch, micro_batch, nullcontext(), parallel)
            optimizer.step()
            gradients = _nbytes(p.grad for p in model.parameters())
            optimizer.zero_grad()
    states = [x for state in optimizer.state.values() for x in state.values()]
    return Counts(
        parameters=_nbytes(model.parameters()),
        gradients=gradients,
        states=_nbytes(x for x in states if isinstance(x, Tensor) and x.dim()),
        peak=meter.peak,
        moved=dict(meter.moved),
    )


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Return the bytes of this rank's storages, padding included."""
    storages = [local(x).untyped_storage() for x in tensors if x is not None]
    return sum({x._cdata: x.nbytes() for x in storages}.values())


def count_on_gloo(
    config: ModelConfig, mode: str, size: int, *, sequences: int, micro_batch: int,
    policy: str = "none", group_size: int = 0,
) -> Counts:  # fmt: skip
    """Count a step of rank 0, on that many processes of this machine.

    Args:
        config: the model.
        mode: of `--parallel`.
        size: number of ranks.
        sequences: of a step, on all ranks.
        micro_batch: sequences of a forward pass.
        policy: activation checkpointing.
        group_size: ranks of a group of hsdp or tp.

    Raises:
        RuntimeError: a rank failed.
    """
    context = get_context("fork")
    results = context.SimpleQueue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    task = dict(sequences=sequences, micro_batch=micro_batch, policy=policy, group_size=group_size)
    processes = [
        context.Process(target=_rank, args=(results, port, rank, size, config, mode, task))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise FailedError(f"scale: a rank of {mode} on {size} failed")
    return results.get()


def _rank(results, port: int, rank: int, size: int, config: ModelConfig, mode: str, task: dict):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    counts = count_step(config, Ranks(rank, size), mode, **task)
    if rank == 0:
        results.put(counts)
    dist.barrier()
    dist.destroy_process_group()
