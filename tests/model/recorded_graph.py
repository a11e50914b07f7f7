"""A stand-in for CUDA graphs on a CPU: it records operators, and runs them again on their tensors.

As a graph does, it knows nothing of Python any more: tensors are where they were when they were
captured, and numbers of the host are what they were then. Whatever would wait for the device, or
make a shape that depends on data, is an error while it records.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "item", "multinomial", "repeat_interleave",
}  # fmt: skip


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class RecordedGraph(TorchDispatchMode):
    """Takes the place of `torch.cuda.CUDAGraph`; `with` it is the capture."""

    def __init__(self):
        super().__init__()
        self.calls, self.generators, self.replays = [], [], 0
        self._before = []  # a capture computes nothing: what it has overwritten is put back

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in WAITS:
            raise RuntimeError(f"{name} is not permitted when stream is capturing\nmore lines")
        if used := [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]:
            (own,), (registered,) = used, self.generators  # of one state, in two objects of Python
            assert torch.equal(own.get_state(), registered.get_state())
        if func._schema.is_mutable:
            self._before += [(x, x.clone()) for x in tensors((args, kwargs))]
            self._before += [(x, x.get_state()) for x in used]
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, before in reversed(self._before):
            x.copy_(before) if isinstance(x, torch.Tensor) else x.set_state(before)

    @property
    def signature(self):
        """Operators, and the shapes that they are given and return."""
        return [
            (str(func), [tuple(x.shape) for x in tensors((args, kwargs, results))])
            for func, args, kwargs, results in self.calls
        ]

    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            old = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            aliased = any(x.untyped_storage().data_ptr() in old for x in tensors(results))
            if aliased and not func._schema.is_mutable:
                continue  # a view of memory that is there
            new = func(*args, **kwargs)
            if not aliased:
                for x, y in zip(tensors(results), tensors(new), strict=True):
                    x.copy_(y)


@contextmanager
def nothing(*_):
    yield


class Stream:
    def __init__(self, _):
        pass

    def wait_stream(self, _):
        pass


def replace_cuda(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Let CUDA graphs be recorded ones; return the list of captures."""
    captured = []

    @contextmanager
    def capture(graph):
        captured.append(graph)
        with graph:
            yield

    for name, stand_in in {
        "CUDAGraph": RecordedGraph, "graph": capture, "Stream": Stream, "stream": nothing,
        "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return captured
