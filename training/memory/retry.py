"""Retries of a step with a smaller memory plan after out-of-memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from tritium.model.transformer import Transformer
from tritium.training.memory.plan import AUTO, Plan, Planner


class MemoryRetry:
    """The memory plan of a run, replaced by the next smaller one after out-of-memory.

    Gradients depend on the plan by rounding alone: a failed step is repeated from the same
    weights, batch and random numbers.

    Args:
        planner: the plans and the settings.
        saved: `state()` of the run that is resumed; its choices hold if the settings are the same.
        log: called with the plan, if AUTO chose it, and with one line for each that failed.

    Attributes:
        first: the plan before the memory ever ran out.
        now: the current plan.
    """

    def __init__(self, planner: Planner, saved: dict | None, log: Callable):
        self._planner, self._log = planner, log
        asked = {
            "activation_checkpointing": planner.policy, "micro_batch_size": planner.micro_batch,
        }  # fmt: skip
        if saved is None:
            self.first = self.now = planner.asked()
            if AUTO in asked.values():
                planner.show(log)
            return
        same = {name for name, value in asked.items() if value in (AUTO, saved["first"][name])}
        self.first, self.now = (
            Plan(**{name: saved[which][name] if name in same else x for name, x in asked.items()})
            for which in ("first", "now")
        )

    def state(self) -> dict:
        """Return both plans, for a checkpoint."""
        return {"first": asdict(self.first), "now": asdict(self.now)}

    def attempt(self, model: Transformer, gradients: Callable[[int], Tensor]) -> Tensor:
        """Compute gradients; after out-of-memory, again with a smaller plan.

        Args:
            model: the model, without gradients.
            gradients: adds the gradients of one batch, in micro-batches of that many sequences.

        Returns:
            What `gradients` returns.

        Raises:
            torch.OutOfMemoryError: "there is no smaller plan".
        """
        device = self._planner.memory.device
        on_gpu = device.type == "cuda"
        model.activation_checkpointing = self.now.activation_checkpointing
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return gradients(self.now.micro_batch_size)  # a graph of what eager steps have tried
        host_random = torch.get_rng_state()
        device_random = torch.cuda.get_rng_state(device) if on_gpu else None
        while True:
            model.activation_checkpointing = self.now.activation_checkpointing
            try:
                return gradients(self.now.micro_batch_size)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            # The tensors of the failed pass, which the error held, are gone only here.
            model.zero_grad()
            self._step_down(reason)
            torch.set_rng_state(host_random)
            if device_random is not None:
                torch.cuda.empty_cache()
                torch.cuda.set_rng_state(device_random, device)

    def _step_down(self, reason: str) -> None:
        smaller = self._planner.below(self.now)
        if smaller is None:
            need = self._planner.bytes_of(self.now).total / 2**30
            raise torch.OutOfMemoryError(
                f"{reason}; {self.now} is predicted to take {need:.2f} GiB, and there is no "
                "smaller plan: take a smaller model, a shorter context or a larger device"
            )
        self._log(f"{reason} with {self.now}: doing the step again with {smaller}")
        self.now = smaller
