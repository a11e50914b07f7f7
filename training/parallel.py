"""Training of one model on several devices, by PyTorch's own engine: the model knows nothing of it.

    ddp     every rank has the whole model and a share of each batch; gradients are averaged
            (torch.nn.parallel.DistributedDataParallel)
    fsdp    every rank has a part of each weight, gradient and moment, and the whole of a block only
            while it computes it (torch.distributed.fsdp.fully_shard)

A batch is the same sequence of windows whatever the number of ranks, and its loss is the mean over
all its targets. torch averages gradients over ranks, so each rank's loss, a share of that mean, is
multiplied by their number first.
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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tritium.model.transformer import Transformer
from tritium.training.device import choose_device
from tritium.training.memory.plan import AUTO
from tritium.training.memory.retry import MemoryRetry
from tritium.training.monitor.observer import ObserveConfig
from tritium.training.precision import Arithmetic
from tritium.training.run.ranks import SINGLE, Ranks, joined, launched, restarted
from tritium.training.settings import TrainConfig
from tritium.training.validation import ConfigError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

COMMAND = "torchrun --standalone --nproc-per-node 2 train.py"


class Parallel:
    """The training of one model on all ranks; on one of them as if there were no others.

    Args:
        ranks: the ranks.
        mode: "ddp", "fsdp", or "none" of a single process.

    Attributes:
        ranks: as given.
        mode: as given.
    """

    def __init__(self, ranks: Ranks, mode: str):
        self.ranks, self.mode = ranks, mode
        self._wrapped: DistributedDataParallel | None = None

    def __str__(self) -> str:
        """Describe it in a line."""
        unseen = "; no sample is drawn, of a model that no rank has" * (self.mode == "fsdp")
        return f"Parallel: {self.mode} on {self.ranks.size} ranks{unseen}"

    @property
    def alone(self) -> bool:
        """Whether nothing of a step is shared with other ranks."""
        return self.mode == "none"

    def wrap(self, model: Transformer, arithmetic: Arithmetic) -> None:
        """Take the model whose passes are to be run, on its device; fsdp shards its parameters."""
        if self.mode == "ddp":
            self._wrapped = DistributedDataParallel(model)
            self._order_buckets(self._wrapped, model, arithmetic)
        elif self.mode == "fsdp":
            shard(model, arithmetic.dtype)

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
        (loss if self.ranks.size == 1 else loss * self.ranks.size).backward()

    @contextmanager
    def micro_batch(self, model: Transformer, *, last: bool) -> Iterator[Callable[..., Tensor]]:
        """Yield what computes a loss; only in the block of the last one gradients are reduced."""
        if self.mode == "fsdp":
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
        if self.mode == "fsdp":
            cast("FSDPModule", model).reshard()

    def observing(self, config: TrainConfig) -> ObserveConfig:
        """Return the settings of this rank's monitor: ranks other than the first show nothing.

        A sharded model is not sampled from: no rank has it.
        """
        if self.ranks.first and self.mode != "fsdp":
            return config.observing
        track = config.observing.track if self.ranks.first else ()
        return replace(config.observing, sample_tokens=0, track=track)

    def healthy(self, own: bool) -> bool:
        """Whether all ranks are healthy, where each knows of its own part."""
        return self.ranks.most(not own) == 0


def shard(model: Transformer, products: torch.dtype) -> None:
    """Shard a model's parameters over all ranks, block by block, in place.

    Args:
        model: on the device where it is trained, the same on every rank.
        products: dtype of the matrix products, in which blocks are gathered; gradients are summed
            in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = model.device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    # What enters a block is cast by autocast where it is: the residual stream may be float32.
    policy = MixedPrecisionPolicy(
        param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A block returns views, of which torch warns because of operations in place; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


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
    mode = mode_of(config)
    with joined(choose_device(config.device)) as ranks:
        run = ranks.from_first(run)
        with ranks.folder(run, resume=config.resume) as files:
            yield run, files, Parallel(ranks, mode)


def arguments(given: list[str]) -> list[str]:
    """Return the arguments of train.py; a run that torchrun starts anew is resumed."""
    if restarted() and not any(x.partition("=")[0] == "--resume" for x in given):
        return [*given, "--resume"]
    return given


def mode_of(config: TrainConfig) -> str:
    """Return how a run is shared by its processes: "none", "ddp" or "fsdp".

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
    if config.batch_size % size:
        raise ConfigError(
            f"batch_size must be divisible by the {size} processes, got {config.batch_size}; "
            "change --batch-size or torchrun's --nproc-per-node"
        )
    if AUTO in (config.memory.micro_batch_size, config.memory.activation_checkpointing):
        raise ConfigError(
            f"auto plans the memory of one process, not of --parallel {mode}; give "
            "--micro-batch-size and --activation-checkpointing themselves, as --plan shows them "
            f"for the share of one process, --batch-size {config.batch_size // size}"
        )
    if mode == "fsdp" and config.optimizer.name == "muon":
        raise ConfigError(
            "muon needs whole matrices, of which --parallel fsdp leaves each process a part; take "
            "--optimizer adamw, or --parallel ddp"
        )
    if mode == "fsdp" and config.optimizer.state_dtype == "uint8":
        raise ConfigError(
            "state_dtype must be float32 or bfloat16 with --parallel fsdp, got uint8, whose scales "
            "could not be resharded; change --state-dtype"
        )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        _check_restarts(config)
    return mode


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
