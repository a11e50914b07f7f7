"""Training of one model on several devices, by PyTorch's own engine: the model knows nothing of it.

    ddp     every rank has the whole model and a share of each batch; gradients are averaged
            (torch.nn.parallel.DistributedDataParallel)
    fsdp    every rank has a part of each weight, gradient and moment, and the whole of a block only
            while it computes it (torch.distributed.fsdp.fully_shard)
    hsdp    the same within groups of ranks, each of which has the whole model
    tp      the ranks of a group compute each product together (`tensor_parallel`); between groups
            as fsdp

A batch is the same sequence of windows whatever the number of ranks, and its loss is the mean over
all its targets. torch averages gradients over the ranks that share a batch, so each rank's loss, a
share of that mean, is multiplied by their number first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritium.kernels.units import counted, quantity
from tritium.model.shapes import num_parameters
from tritium.model.transformer import Transformer
from tritium.training import tensor_parallel
from tritium.training.device import choose_device, free_memory
from tritium.training.memory.plan import AUTO
from tritium.training.memory.retry import MemoryRetry
from tritium.training.monitor.observer import ObserveConfig
from tritium.training.precision import Arithmetic
from tritium.training.run.ranks import SINGLE, Ranks, joined, launched, restarted
from tritium.training.settings import TrainConfig
from tritium.training.validation import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

SHARDED = "fsdp", "hsdp", "tp"
"""Modes in which no rank has the whole model."""
MESHES = {"hsdp": ("replicate", "shard"), "tp": ("data", tensor_parallel.DIMENSION)}
"""Dimensions of the ranks: groups, and the ranks of a group."""
BYTES = 16  # of a parameter in float32, its gradient and the two moments of AdamW
COMMAND = "torchrun --standalone --nproc-per-node 2 train.py"


class Parallel:
    """The training of one model on all ranks; on one of them as if there were no others.

    Args:
        ranks: the ranks.
        mode: "ddp", "fsdp", "hsdp", "tp", or "none" of a single process.
        group_size: ranks of a group of "hsdp" or "tp".
        device: type of the device where the model is trained.
        reason: why "auto" has chosen the mode.
        batch: sequences of a batch, and of a micro-batch, 0 for all; to be described.

    Attributes:
        ranks: as given.
        mode: as given.
        data: the ranks, or one of each group of "tp", among which the sequences of a batch are
            shared. Only its `place`, `size`, `sum` and `seed_step` mean anything.
    """

    def __init__(
        self, ranks: Ranks, mode: str, *, group_size: int = 0, device: str = "cpu",
        reason: str = "", batch: tuple[int, int] = (0, 0),
    ):  # fmt: skip
        self.ranks, self.mode, self.data = ranks, mode, ranks
        self._group_size, self._reason, self._batch = group_size, reason, batch
        self._wrapped: DistributedDataParallel | None = None
        self._gathers = False  # whether blocks are gathered
        self._mesh: DeviceMesh | None = None
        if mode in MESHES:
            from torch.distributed.device_mesh import init_device_mesh

            n_groups = ranks.size // group_size
            shape = n_groups, group_size
            self._mesh = init_device_mesh(device, shape, mesh_dim_names=MESHES[mode])
            if mode == "tp":
                alike = [[*range(i, ranks.size, group_size)] for i in range(group_size)]
                own = cast("dist.ProcessGroup", dist.new_subgroups_by_enumeration(alike)[0])
                self.data = Ranks(ranks.rank // group_size, n_groups, own)

    def __str__(self) -> str:
        """Describe it in two lines."""
        groups = f", in groups of {self._group_size}" if self.mode in MESHES else ""
        unseen = "; no sample is drawn, of a model that no rank has" * (self.mode in SHARDED)
        sequences, micro_batch = self._batch
        ranks = counted(self.ranks.size, "rank")
        own, each = sequences // self.data.size, " group" if self.mode == "tp" else ""
        return (
            f"Parallel: {self.mode} on {ranks}{groups}{self._reason}{unseen}\n"
            f"Each{each} takes {own:,} of the {sequences:,} sequences of a batch, "
            f"{min(own, micro_batch or own):,} at a time; speed is that of all, memory of rank 0"
        )

    @property
    def alone(self) -> bool:
        """Whether nothing of a step is shared with other ranks."""
        return self.mode == "none"

    def wrap(self, model: Transformer, arithmetic: Arithmetic) -> None:
        """Take the model whose passes are to be run, on its device; all but ddp split it."""
        if self.mode == "ddp":
            self._wrapped = DistributedDataParallel(model)
            self._order_buckets(self._wrapped, model, arithmetic)
        mesh = self._mesh
        if mesh is not None and self.mode == "tp":
            tensor_parallel.split(model, mesh[tensor_parallel.DIMENSION])
            mesh = mesh["data"]
        self._gathers = self.mode in SHARDED and (self.mode != "tp" or self.data.size > 1)
        if self._gathers:
            shard(model, arithmetic.dtype, mesh)

    @staticmethod
    def _order_buckets(
        wrapped: DistributedDataParallel, model: Transformer, arithmetic: Arithmetic
    ) -> None:
        """Run a backward pass, by which DDP puts gradients into buckets anew, as it does once.

        A sum over ranks is rounded by the place in its bucket. So that a resumed run has the same
        bits, its first step must not be the one whose buckets are in another order.
        """
        tokens, training = torch.zeros(1, 2, dtype=torch.long, device=model.device), model.training
        with arithmetic.cast:
            loss = wrapped.eval()(tokens, tokens)
            with torch.autocast(model.device.type, enabled=False):
                (0 * loss).backward()
        wrapped.train(training)
        model.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the batch's loss."""
        (loss if self.data.size == 1 else loss * self.data.size).backward()

    @contextmanager
    def micro_batch(self, model: Transformer, *, last: bool) -> Iterator[Callable[..., Tensor]]:
        """Yield what computes a loss; only in the block of the last one gradients are reduced."""
        if self._gathers:
            cast("FSDPModule", model).set_requires_gradient_sync(last)
        if self._wrapped is None:
            yield model
            return
        with nullcontext() if last else self._wrapped.no_sync():
            yield self._wrapped

    def attempt(
        self, plan: MemoryRetry, model: Transformer, gradients: Callable[[int], Tensor]
    ) -> Tensor:
        """Compute gradients as `plan.attempt`; shared ones without another try.

        Raises:
            torch.OutOfMemoryError: "the memory of this rank ran out".
        """
        if self.alone:
            return plan.attempt(model, gradients)
        model.activation_checkpointing = plan.now.activation_checkpointing
        try:
            return gradients(plan.now.micro_batch_size)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the memory of this rank ran out with {plan.now} ({error}); resume with a smaller "
                "--micro-batch-size or more --activation-checkpointing"
            ) from error

    def reshard(self, model: Transformer) -> None:
        """Free what passes without a backward pass have gathered of a sharded model."""
        if self._gathers:
            cast("FSDPModule", model).reshard()

    def observing(self, config: TrainConfig) -> ObserveConfig:
        """Return the settings of this rank's monitor: ranks other than the first show nothing.

        A sharded model is not sampled from: no rank has it.
        """
        if self.ranks.first and self.mode not in SHARDED:
            return config.observing
        track = config.observing.track if self.ranks.first else ()
        return replace(config.observing, sample_tokens=0, track=track)

    def healthy(self, own: bool) -> bool:
        """Whether all ranks are healthy, where each knows of its own part."""
        return self.ranks.most(not own) == 0


def shard(model: Transformer, products: torch.dtype, mesh: DeviceMesh | None = None) -> None:
    """Shard a model's parameters over ranks, block by block, in place.

    Args:
        model: on the device where it is trained, the same on every rank.
        products: dtype of the matrix products, in which blocks are gathered; gradients are summed
            in float32.
        mesh: the ranks; of two dimensions, those of the first have the same parts. None: all.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh is None:
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    # What enters a block is cast by autocast where it is: the residual stream may be float32.
    policy = MixedPrecisionPolicy(
        param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A block returns views, of which torch warns because of operations in place; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=_columns_of_rows)


def _columns_of_rows(p: nn.Parameter) -> Shard | None:
    """Return how to shard a parameter: by columns where its rows are split already."""
    from torch.distributed.tensor import Shard

    placements = getattr(p, "placements", ())
    return Shard(1) if any(x.is_shard(0) for x in placements) else None


ALONE = Parallel(SINGLE, "none")
"""The training of a process without torchrun."""


@contextmanager
def opened(config: TrainConfig, run: Path) -> Iterator[tuple[Path, Path, Parallel]]:
    """Open a run on all of its processes.

    Args:
        config: the settings.
        run: its folder; that of the first rank counts.

    Returns:
        The run folder; the folder where this process writes, the run folder or, of ranks other than
        the first, a temporary one; the training that the processes share.

    Raises:
        ConfigError: they cannot share it.
        RunFolderError: the folder cannot be this run's.
        LostRankError: another rank is gone.
    """
    mode, device = mode_of(config), choose_device(config.device)
    with joined(device) as ranks:
        run, reason = ranks.from_first(run), ""
        if config.parallel == "auto" and mode == "ddp":
            mode, reason = auto_mode(config, ranks, device)
        # "auto" is for one process alone, which says nothing of shares.
        asked = config.memory.micro_batch_size
        micro_batch = 0 if asked is None or asked == AUTO else int(asked)
        parallel = Parallel(
            ranks, mode, group_size=group_size_of(config, ranks.size), device=device.type,
            reason=reason, batch=(config.batch_size, micro_batch),
        )  # fmt: skip
        with ranks.folder(run, resume=config.resume) as files:
            yield run, files, parallel


def auto_mode(config: TrainConfig, ranks: Ranks, device: torch.device) -> tuple[str, str]:
    """Return what auto chooses on several ranks, and why: ddp if it fits, else fsdp."""
    each = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    needed, free = BYTES * num_parameters(config.model), free_memory(device) // each
    said = f"{quantity(needed, 'B')} of float32 weights, gradients and two moments"
    if not ranks.most(2 * needed > free):
        return "ddp", f" (auto: {said} fit in half of the free memory)"
    if (why := _obstacle(config, "fsdp", ranks.size)) is not None:
        return "ddp", f" (auto: {said} exceed half of the free memory, but {why})"
    return "fsdp", f" (auto: {said} exceed half of the free memory)"


def arguments(given: list[str]) -> list[str]:
    """Return the arguments of train.py; a run that torchrun starts anew is resumed."""
    if restarted() and not any(x.partition("=")[0] == "--resume" for x in given):
        return [*given, "--resume"]
    return given


def group_size_of(config: TrainConfig, size: int) -> int:
    """Return the ranks of a group of hsdp or tp: those of a machine where none is given."""
    return config.group_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))


def mode_of(config: TrainConfig) -> str:
    """Return how a run is shared by its processes: "none", "ddp", "fsdp", "hsdp" or "tp".

    Raises:
        ConfigError: it cannot be; the message says why.
    """
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if config.parallel == "auto" and size == 1:
        return "none"
    mode = "ddp" if config.parallel == "auto" else config.parallel
    if not launched():
        raise ConfigError(
            f"--parallel {mode} needs torchrun: {COMMAND} ...; or, in one process, --parallel auto"
        )
    # A run that is resumed in another mode has it from its config.json.
    if config.group_size and mode not in MESHES and not config.resume:
        raise ConfigError(
            f"--group-size is of --parallel hsdp and tp, got {mode}; leave it out, or choose one"
        )
    sharing = size
    if mode in MESHES:
        _check_groups(config, mode, size)
        sharing = size // group_size_of(config, size) if mode == "tp" else size
    if config.batch_size % sharing:
        named = "processes" if sharing == size else "groups of processes"
        raise ConfigError(
            f"batch_size must be divisible by the {sharing} {named}, got {config.batch_size}; "
            "change --batch-size or torchrun's --nproc-per-node"
        )
    if AUTO in (config.memory.micro_batch_size, config.memory.activation_checkpointing):
        raise ConfigError(
            f"auto plans the memory of one process, not of --parallel {mode}; give "
            "--micro-batch-size and --activation-checkpointing themselves, as --plan shows them "
            f"for the share of one process, --batch-size {config.batch_size // sharing}"
        )
    if (why := _obstacle(config, mode, sharing)) is not None:
        raise ConfigError(why)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        _check_restarts(config)
    return mode


def _check_groups(config: TrainConfig, mode: str, size: int) -> None:
    own = group_size_of(config, size)
    if size % own:
        raise ConfigError(
            f"--group-size must divide the {size} processes, got {own}; change it, or torchrun's "
            "--nproc-per-node"
        )
    if own == 1:
        raise ConfigError(
            f"--parallel {mode} shares weights within a group of two processes or more, got 1; "
            "give a larger --group-size, or take --parallel ddp or fsdp"
        )
    if mode == "hsdp" and own == size:
        raise ConfigError(
            f"--parallel hsdp needs two groups or more, got one of {size} processes; give a "
            "smaller --group-size, or take --parallel fsdp"
        )
    if mode == "tp" and (why := tensor_parallel.obstacle(config.model, own)) is not None:
        raise ConfigError(f"with --parallel tp {why}; change it, or --group-size")


def _obstacle(config: TrainConfig, mode: str, sharing: int) -> str | None:
    """Return why a run cannot be shared in a mode, by so many that share its batches, or None."""
    if mode not in SHARDED:
        return None
    if config.optimizer.state_dtype == "uint8":
        return (
            f"state_dtype must be float32 or bfloat16 with --parallel {mode}, got uint8, whose "
            "scales could not be resharded; change --state-dtype"
        )
    if config.model.reversible:
        return (
            "a reversible model recomputes halves of blocks, which need their weights when "
            f"--parallel {mode} has none; take --activation-checkpointing full instead of "
            "--model.reversible, or --parallel ddp"
        )
    if mode == "tp" and config.lora_rank is not None:
        return "adapters (--lora-rank) are not split by --parallel tp; take --parallel ddp or fsdp"
    if mode == "tp" and config.model.d_model % sharing:
        return (
            f"d_model must be divisible by the {sharing} groups of --parallel tp, got "
            f"{config.model.d_model}; change --group-size"
        )
    return None


def _check_restarts(config: TrainConfig) -> None:
    if not config.out:
        raise ConfigError(
            "torchrun's --max-restarts resumes the run in a folder that it must know; add --out DIR"
        )
    # Each machine counts its own restarts, so the count does not tell old addresses from new ones.
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and shares_store:
        raise ConfigError(
            "torchrun's --max-restarts on several machines needs a new store for every start; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )
