"""Prove which steps are captured, from what, and when anew, on a stand-in for CUDA.

The graphs of a GPU are in tests/kernels/optimizers/test_optimizer_cuda_graph.py.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tritium.kernels import SGD, runtime
from tritium.training.cuda_graph import WARM_UP, GraphedStep, training_step
from tritium.training.optim import set_rate


class Graph:
    """A CUDA graph, but on a CPU: it replays the Python that it saw."""

    def __init__(self):
        self.replay = lambda: pytest.fail("replayed before it was captured")


@pytest.fixture
def gpu(monkeypatch):
    """Stand in for what CUDA does; return the list of captures."""
    captured = []

    @contextmanager
    def capture(graph):
        captured.append(graph)
        yield

    class Stream:
        def __init__(self, _):
            pass

        def wait_stream(self, _):
            pass

    @contextmanager
    def on(_):
        yield

    for name, stand_in in {
        "CUDAGraph": Graph, "graph": capture, "Stream": Stream, "stream": on,
        "current_stream": Stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    return captured


def optimizer():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return SGD([p], lr=0.1, max_grad_norm=1.0)


def batch(i):
    return torch.full((2, 3), i), torch.full((2, 3), 10 * i)


def test_replays_what_it_captured_on_every_batch_and_rate(gpu):
    owner, calls = optimizer(), []

    def take(static):
        """Return results that depend on the batch and the rate alone, as a graph does."""
        calls.append(static)
        rate = owner.param_groups[0]["lr"]
        results = static[0].sum() * rate, static[1].sum() * 1.0

        def replay():
            results[0].copy_(static[0].sum() * rate)
            results[1].copy_(static[1].sum() * 1.0)

        if gpu:
            gpu[-1].replay = replay
        return results

    step = GraphedStep(take, owner)
    found = []
    for i in range(1, WARM_UP + 6):
        set_rate(owner, 0.5 * i)
        found.append(step(batch(i)))
    assert [loss.item() for loss, _ in found] == [3.0 * i * i for i in range(1, WARM_UP + 6)]
    assert [norm.item() for _, norm in found] == [60.0 * i for i in range(1, WARM_UP + 6)]
    assert len(calls) == WARM_UP + 1
    assert len({id(x) for static in calls for x in static}) == 2
    assert len(gpu) == 1


def test_another_state_is_captured_anew(gpu):
    owner = optimizer()
    owner.step()

    def take(static):
        result = static[0].sum() * owner.param_groups[0]["lr"]
        if gpu:
            gpu[-1].replay = lambda: None
        return result, result

    step = GraphedStep(take, owner)
    for i in range(WARM_UP + 2):
        step(batch(i))
    assert len(gpu) == 1
    owner.load_state_dict(owner.state_dict())
    assert owner.param_groups[0]["lr"].dtype == torch.float32
    for i in range(WARM_UP):
        step(batch(i))
    assert len(gpu) == 1
    step(batch(1))
    assert len(gpu) == 2


@pytest.mark.parametrize(
    ("reference", "fallen", "what"), [(True, (), "every operation"), (False, ("rope",), "rope")]
)
def test_references_are_not_captured(reference, fallen, what, monkeypatch, gpu):
    said, owner = [], optimizer()
    monkeypatch.setattr(runtime, "REFERENCE", reference)
    monkeypatch.setattr(runtime, "_fallen", frozenset(fallen))
    step = training_step(lambda batch: batch[0].sum(), owner, graph=True, log=said.append)
    assert not isinstance(step, GraphedStep)
    assert said == [f"No CUDA graph is captured: {what} runs on the reference"]


def test_without_a_graph_it_is_a_plain_step():
    owner = optimizer()
    step = training_step(lambda batch: batch[0].sum(), owner, graph=False, log=pytest.fail)
    loss, norm = step(batch(1))
    assert (loss.item(), norm.item()) == (6.0, pytest.approx(2**0.5))
    assert owner.param_groups[0]["params"][0].grad is None


def test_the_rate_is_filled_into_a_tensor():
    owner = optimizer()
    rate = owner.param_groups[0]["lr"] = torch.tensor(0.0)
    set_rate(owner, 0.25)
    assert owner.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
