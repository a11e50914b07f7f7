"""Calls of one function, launched kernel by kernel at first, then replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # calls that compile kernels, choose algorithms and make what is made once


class CaptureError(RuntimeError):
    """A function could not be captured; nothing of the call has been computed."""


class Replay:
    """Calls one function of no arguments, the first few times itself, then by a CUDA graph of it.

    The function reads and writes the same tensors every time, and waits for the device nowhere.
    The graph keeps a pool of memory of its own, as large as what one call needs at once, and with
    it everything the function returns, until the object is dropped.

    Args:
        device: a GPU, where it runs.
        generator: source of its random numbers; None for PyTorch's global one. Each replay draws
            what a call would draw.
    """

    def __init__(
        self, device: torch.device, generator: torch.Generator | None = None
    ):  # fmt: skip
        self._device, self._generator = device, generator
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._called, self._results = 0, None

    def __call__(self, run: Callable[[], Any]) -> Any:
        """Call or replay `run`, always the same; return its results, which a replay overwrites.

        Raises:
            CaptureError: it cannot be captured.
        """
        if self._graph is None and self._called < WARM_UP:
            self._called += 1
            return self._on_a_side_stream(run)
        if self._graph is None:
            self._graph = self._captured(run)
        self._graph.replay()
        return self._results

    def _captured(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            if self._generator is not None:
                graph.register_generator_state(self._generator)
            with torch.cuda.graph(graph):
                self._results = run()
        except torch.OutOfMemoryError:  # which a smaller batch may mend
            raise
        except RuntimeError as error:
            raise CaptureError(f"the capture failed: {str(error).splitlines()[0]}") from error
        return graph

    def _on_a_side_stream(self, run: Callable[[], Any]) -> Any:
        """As PyTorch asks for before a capture: autograd remembers the stream that it ran on."""
        present = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            results = run()
        present.wait_stream(self._stream)
        return results
