"""Prove that every random number generator continues where it was, through JSON."""

import json
import random

import numpy as np
import torch

from tritium.training.run import random_state


def draw(device):
    numbers = [torch.rand(()).item(), torch.randn((), device=device).item(), random.gauss(0, 1)]
    return [*numbers, random.random(), np.random.normal(), np.random.randint(1 << 30)]


def test_goes_on_where_it_was(device):
    place = torch.device(device)
    random_state.seed(1 << 40)
    for _ in range(3):  # an odd number of normals: half of a pair is kept
        draw(device)
        saved = json.loads(json.dumps(random_state.capture(place)))
        expected = [draw(device) for _ in range(3)]
        random_state.seed(7)
        random_state.restore(saved, place)
        assert [draw(device) for _ in range(3)] == expected


def test_seeds_everything(device):
    random_state.seed(3)
    expected = draw(device)
    random_state.seed(4)
    assert all(x != y for x, y in zip(draw(device), expected, strict=True))
    random_state.seed(3)
    assert draw(device) == expected


def test_a_block_leaves_no_trace(device):
    random_state.seed(3)
    expected = draw(device)
    random_state.seed(3)
    with random_state.preserved(torch.device(device)):
        draw(device)
    assert draw(device) == expected
