"""Faults put into a run: `python -m tritium.bench.runs._injected FAULT [train.py's arguments]`."""

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import train
import tritium
from tritium.data import TokenLoader
from tritium.data.verification import Verification
from tritium.training.run import checkpoint, run_state

Batch = tuple[torch.Tensor, torch.Tensor]
VOCABULARY = 512  # of the runs


@contextmanager
def disturbed(
    windows: range,
    batch: Callable[[Batch], Batch] | None = None,
    model: Callable[[torch.nn.Module], None] | None = None,
) -> Iterator[None]:
    """Disturb each step whose data begins at one of `windows`, in whatever run reads them.

    Args:
        windows: of the training data, counted from its beginning.
        batch: makes another of the step's batch.
        model: is called with the model once it has its gradients.
    """
    read, accumulate, at = TokenLoader.next_batch, train.accumulate_gradients, [0]

    def next_batch(self):
        at[0] = self.state()["windows"]
        found = read(self)
        return batch(found) if batch and at[0] in windows else found

    def accumulate_gradients(trained, *arguments):
        loss = accumulate(trained, *arguments)
        if model and at[0] in windows:
            model(trained)
        return loss

    with (
        mock.patch.object(TokenLoader, "next_batch", next_batch),
        mock.patch.object(train, "accumulate_gradients", accumulate_gradients),
    ):
        yield


def nan_in_a_gradient(model: torch.nn.Module) -> None:
    """Make one element of one gradient NaN."""
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient[0, 0] = torch.nan


def no_gradient(model: torch.nn.Module) -> None:
    """Take the gradients away, so that the step changes nothing: what a skipped step must equal."""
    for p in model.parameters():
        p.grad = None


def garbage(batch: Batch) -> Batch:
    """Return tokens drawn evenly from the vocabulary, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(VOCABULARY, x.shape, generator=generator) for x in batch)
    return tokens, targets


def further(windows: int) -> AbstractContextManager:
    """Resume at another place of the data: what a run that went back must equal."""

    def seek(loader, position, *, anyway, log):
        loader.load_state(position | {"windows": windows})

    return mock.patch.object(run_state, "seek", seek)


def full_disk(step: int) -> AbstractContextManager:
    """Let no checkpoint from `step` on be written."""
    write = checkpoint.write_durably

    def write_durably(path: Path, data: bytes) -> None:
        if int(path.parent.name.removeprefix(".step-").removesuffix(".tmp")) >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    return mock.patch.object(checkpoint, "write_durably", write_durably)


def slow_save(step: int) -> AbstractContextManager:
    """Take two seconds for the checkpoint of `step`."""
    write = checkpoint.write_durably

    def write_durably(path: Path, data: bytes) -> None:
        if path.parent.name == f".step-{step:08}.tmp":
            time.sleep(2)
        write(path, data)

    return mock.patch.object(checkpoint, "write_durably", write_durably)


STEP, FIRST = 4, 4 * 22  # windows of a step; the first of step 23
FAULTS: dict[str, Callable[[], AbstractContextManager]] = {
    "nan": partial(disturbed, range(FIRST, FIRST + STEP), model=nan_in_a_gradient),
    "left-out": partial(disturbed, range(FIRST, FIRST + STEP), model=no_gradient),
    "garbage": partial(disturbed, range(FIRST, FIRST + STEP), garbage),
    "much-garbage": partial(disturbed, range(FIRST, FIRST + 3 * STEP), garbage),
    "further": partial(further, FIRST + 3 * STEP),
    "nan-for-good": partial(disturbed, range(FIRST, 10**9), model=nan_in_a_gradient),
    "full-disk": partial(full_disk, 30),
    "slow-save": partial(slow_save, 20),
    "much-data": lambda: mock.patch.object(train, "Verification", partial(Verification, at_once=0)),
}
"""By name; steps are those of runs whose batches have STEP windows."""


def main() -> None:
    """Train with the fault that the first argument names."""
    _, fault, *arguments = sys.argv
    sys.argv = ["train.py", *arguments]
    with FAULTS[fault]():
        train.main()


if __name__ == "__main__":
    with tritium.interruptible():
        main()
