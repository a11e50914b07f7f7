"""PyTorch's own database of optimizers: every sample steps as torch's does, no error is taken.

Each rule errs against float64 at most twice as much as torch's class does in float32.
"""

import copy
import inspect
import warnings

import pytest
import torch
from small_training import assert_no_worse, parameters, train
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

from tritium import kernels

pytestmark = pytest.mark.usefixtures("pointer_tables")

RULES = {info.name: info for info in optim_db if hasattr(kernels, info.name)}
SAMPLES = [
    pytest.param(name, sample.kwargs, id=f"{name}, {sample.desc}, {device}")
    for name, info in RULES.items()
    if name != "Muon"  # which torch steps in bfloat16, and of matrices alone: test_muon.py
    for device in ("cpu", "cuda")  # whose samples only differ in having more
    for sample in info.optim_inputs_func(device=torch.device(device))
]
ERRORS = [
    pytest.param(name, error.optimizer_error_input, id=f"{name}, {i}")
    for name, info in RULES.items()
    for i, error in enumerate(info.optim_error_inputs_func(torch.device("cpu"), torch.float32))
]
BESIDE = [{"foreach": False}, {"fused": True}]


def test_counts():
    assert sorted(RULES) == ["Adagrad", "Adam", "AdamW", "Muon", "RMSprop", "SGD"]
    assert (len(SAMPLES), len(ERRORS)) == (81, 54)


@pytest.mark.parametrize(("name", "options"), SAMPLES)
def test_steps_as_torch(name, options, path, device):
    actual, expected = getattr(kernels, name), getattr(torch.optim, name)
    plain = {k: v for k, v in options.items() if k != "capturable"}  # a CPU's refuses it
    for i, flags in enumerate(BESIDE):
        known = {k: v for k, v in flags.items() if k in inspect.signature(actual).parameters}
        mine = parameters([(5,), (2, 3)][: 1 + i % 2], device)
        copied, exact = copy.deepcopy(mine), [nn.Parameter(p.detach().double()) for p in mine]
        optimizer = train(lambda ps, known=known: actual(ps, **options, **known), mine, 3)
        for ps in (copied, exact):
            other = train(lambda ps: expected(ps, **plain), ps, 3)
        assert_no_worse(mine, copied, exact)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        again = actual(mine, **options)
        again.load_state_dict(copy.deepcopy(other.state_dict()))
        train(None, mine, 1, start=3, optimizer=again)


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_refuses_the_errors_of_torch(name, error):
    params = [nn.Parameter(torch.ones(2))] if error.params is None else error.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns of a parameter that comes twice
        with pytest.raises((TypeError, ValueError), match=r"\w"):
            getattr(kernels, name)(params, **error.kwargs)
