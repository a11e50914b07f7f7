"""A training step, launched kernel by kernel, or as one CUDA graph in a single launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tritium.kernels import runtime
from tritium.kernels.runtime import fallen_back
from tritium.model.replay import WARM_UP, Replay
from tritium.training.optim import Optimizer

Batch = tuple[Tensor, ...]
Step = Callable[[Batch], tuple[Tensor, Tensor]]


def training_step(
    accumulate: Callable[[Batch], Tensor],
    optimizer: Optimizer,
    *,
    graph: bool,
    redraws: bool = False,
    shared: bool = False,
    log: Callable[[str], object],
) -> Step:
    """Make the step of a run: from a batch to its loss and gradient norm, on the device.

    Args:
        accumulate: adds a batch's gradients to the parameters' and returns its loss. In a graph it
            gets the batch on the device, and waits for the device nowhere.
        optimizer: takes the step; clips, so that it knows the norm.
        graph: take it as a CUDA graph. Where references run, which may wait for the device, there
            is none.
        redraws: whether activations are recomputed with the random numbers of before, which a graph
            cannot draw twice: then there is none either.
        shared: whether gradients come from other ranks too: then there is none either.
        log: called with a line that says whether the graph is used, or why not.
    """

    def take(batch: Batch, /) -> tuple[Tensor, Tensor]:
        loss = accumulate(batch)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.grad_norm is None:
            raise ValueError("training_step: the optimizer must clip; give it a max_grad_norm")
        return loss, optimizer.grad_norm

    if not graph:
        return take
    if reason := _obstacle(redraws, shared):
        log(f"No CUDA graph is captured: {reason}")
        return take
    log(f"The whole step is captured in a CUDA graph after {WARM_UP} steps")
    return GraphedStep(take, optimizer)


def _obstacle(redraws: bool, shared: bool) -> str:
    """Return why no graph can be captured, or nothing."""
    fallen = "every operation" if runtime.REFERENCE else ", ".join(sorted(fallen_back()))
    if fallen:
        return f"{fallen} runs on the reference"
    if shared:
        return "gradients are reduced over several processes"
    return "dropout is recomputed with --activation-checkpointing" if redraws else ""


class GraphedStep:
    """Takes the steps that `take` would take, the first few by it, then by replaying a graph of it.

    The batch is copied into the same tensors every time, and the learning rate of each group is a
    float32 tensor, to be filled: with rates that are rounded to float32 anyway (`optim.set_rate`)
    the steps are those of `take` bit for bit. Every batch has the shape of the first. Once the
    optimizer has loaded another state, the graph is captured anew.

    Args:
        take: a whole step; it waits for the device nowhere and leaves no gradient behind.
        optimizer: its optimizer, of parameters on a GPU.
    """

    def __init__(self, take: Step, optimizer: Optimizer):
        self._take, self._optimizer = take, optimizer
        self._device = optimizer.param_groups[0]["params"][0].device
        self._batch: Batch | None = None
        self._forget()
        optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def __call__(self, batch: Batch, /) -> tuple[Tensor, Tensor]:
        """Take a step; return its loss and gradient norm, in tensors of their own."""
        static = self._copied(batch)
        results = self._replay(lambda: self._take(static))
        loss, norm = (x.clone() for x in results)  # the next replay overwrites them
        return loss, norm

    def _copied(self, batch: Batch) -> Batch:
        if self._batch is None:
            self._batch = tuple(torch.empty_like(x, device=self._device) for x in batch)
        for static, x in zip(self._batch, batch, strict=True):
            # Fresh pinned memory, which PyTorch keeps until the device has read it.
            static.copy_(x.pin_memory(), non_blocking=True)
        return self._batch

    def _forget(self) -> None:
        self._replay = Replay(self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self._device)
