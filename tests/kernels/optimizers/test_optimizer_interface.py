"""Optimizers take and document torch.optim's arguments, under any default dtype."""

import copy
import functools
import inspect
import sys

import pytest
import torch
from small_training import OPTIONS, THEIRS, assert_equal, bits, parameters, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tritium.kernels import SGD, Adam, AdamW, Lion, RMSprop, clip_grad_norm_, clip_grad_norms_
from tritium.kernels.optimizers._options import EXPLAINED, StepOptions

pytestmark = pytest.mark.usefixtures("pointer_tables")

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
TORCHS = [actual for actual in THEIRS if actual is not Lion]
DAMPENED = (SGD, {"momentum": 0.9, "dampening": 0.4, "lr": 0.1})


@pytest.fixture(params=[BF16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(F32)


@pytest.mark.parametrize("actual", THEIRS)
def test_numbers_do_not_depend_on_the_default_dtype(actual, default_dtype, path, device):
    def run(dtype):
        torch.manual_seed(0)
        ps, results = parameters([(4096,)], device), []
        torch.set_default_dtype(dtype)
        for state_dtype in (F32, U8):
            optimizer = actual(
                ps, lr=0.01, max_grad_norm=1.0, record_norms=True, state_dtype=state_dtype
            )
            for step in range(2):
                for p in ps:
                    p.grad = torch.full_like(p, 0.1 + step)
                optimizer.step()
            results += [*bits(optimizer), *optimizer.norms()[1:]]
        results += [clip_grad_norm_(ps, 0.1), clip_grad_norms_(ps, 0.01), clip_grad_norm_([], 1.0)]
        return [*results, clip_grad_norms_([[]], 1.0), *(p.grad for p in ps)]

    wanted = run(F32)
    got = run(default_dtype)
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    assert_equal(got, wanted)


@pytest.mark.parametrize("actual", THEIRS)
@pytest.mark.parametrize("key", [*StepOptions.__annotations__, "wieght_decay", "clip", "params2"])
def test_a_group_takes_its_options_alone(key, actual):
    if key == "l1":
        optimizer = actual([{"params": [nn.Parameter(torch.ones(3))], key: 0.5}])
        assert optimizer.param_groups[0]["l1"] == 0.5
        return
    with pytest.raises(TypeError, match=rf"{actual.__name__}: options of .* got \['{key}'\]"):
        actual([{"params": [nn.Parameter(torch.ones(3))], key: 0.5}])


@pytest.mark.parametrize("actual", TORCHS)
def test_takes_the_groups_and_defaults_of_torch(actual):
    p = nn.Parameter(torch.ones(3))
    expected = THEIRS[actual]([p], lr=0.5)
    expected.add_param_group(
        {"params": [nn.Parameter(torch.ones(2))], "name": "b", "initial_lr": 1}
    )
    assert actual(expected.param_groups).param_groups[0]["lr"] == 0.5
    actual([p], **expected.defaults)


@pytest.mark.parametrize("actual", THEIRS)
def test_refuses_unsupported_options(actual):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{actual.__name__}: differentiable must be False"):
        actual([p], differentiable=True)
    with pytest.raises(RuntimeError, match="foreach and fused must not be True together"):
        actual([p], foreach=True, fused=True)
    with pytest.raises(TypeError, match=r"got torch.float64; .*\.float\(\)"):
        actual([nn.Parameter(torch.ones(3, dtype=torch.float64))])


@pytest.mark.parametrize("actual", TORCHS)
def test_has_the_signature_of_torch(actual):
    expected = inspect.signature(THEIRS[actual]).parameters
    mine = inspect.signature(actual).parameters
    shared = [(x.name, x.kind, x.default) for name, x in mine.items() if name in expected]
    assert shared == [(x.name, x.kind, x.default) for x in expected.values()]


def test_clips_by_the_signature_of_torch(path, device):
    expected = inspect.signature(nn.utils.clip_grad_norm_).parameters
    mine = inspect.signature(clip_grad_norm_).parameters
    assert [(x.name, x.default) for x in mine.values()] == [
        (x.name, x.default) for x in expected.values()
    ]
    p = nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.tensor([1.0, 2.0, float("inf")], device=device)
    with pytest.raises(RuntimeError, match="norm of the gradients must be finite, got inf"):
        clip_grad_norm_([p], 1.0, 2.0, error_if_nonfinite=True, foreach=True)
    assert p.grad.tolist() == [1.0, 2.0, float("inf")]
    with pytest.raises(ValueError, match="norm_type must be 2, got inf"):
        clip_grad_norm_([p], 1.0, float("inf"))
    p.grad = torch.tensor([3.0, 4.0, 0.0], device=device)
    assert clip_grad_norm_([p], 1.0, error_if_nonfinite=True).item() == 5


@pytest.mark.parametrize("actual", THEIRS)
def test_explains_every_option(actual):
    text = inspect.getdoc(actual)
    arguments = text.partition("\nArgs:\n")[2].partition("\nAttributes:\n")[0]
    words = " ".join(arguments.split())
    names = [x for x in inspect.signature(actual).parameters if x != "options"]
    for name in [*names, *StepOptions.__annotations__]:
        assert arguments.count(f"    {name}: ") == 1, name
        if name in EXPLAINED:
            assert f"{name}: {' '.join(EXPLAINED[name].split())}" in words
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(("actual", "options"), OPTIONS, ids=str)
def test_a_step_counts_as_a_change_of_the_parameters(actual, options, path, device):
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = actual([p], ema_decay=0.5, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    loss = (p * p * optimizer.state[p]["ema"]).sum()
    version = optimizer.state[p]["ema"]._version
    optimizer.step()
    assert optimizer.state[p]["ema"]._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("more", [{}, {"state_dtype": BF16, "ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize(("actual", "options"), [*OPTIONS, DAMPENED], ids=str)
def test_flattened_state_resumes(actual, options, more, device):
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    nets = [nn.Linear(3, 2, device=device) for _ in range(2)]
    first, second = (actual(net.parameters(), **options, **more) for net in nets)
    train(None, list(nets[0].parameters()), 3, start=1, optimizer=first)
    nets[1].load_state_dict(nets[0].state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(nets[0], first, options=flat))
    set_optimizer_state_dict(nets[1], second, saved, options=flat)
    for net, optimizer in zip(nets, (first, second), strict=True):
        train(None, list(net.parameters()), 2, start=8, optimizer=optimizer)
    assert_equal(bits(first), bits(second))


@pytest.mark.parametrize("actual", [Adam, AdamW, RMSprop])
def test_shared_flags_change_nothing(actual, device):
    ps = parameters([(5,)], device)
    qs = copy.deepcopy(ps)
    a = train(lambda x: actual(x, foreach=True, capturable=True), ps, 2)
    assert_equal(bits(a), bits(train(actual, qs, 2)))


METHODS = {
    "add_param_group": lambda x: x.add_param_group({"params": parameters([(2,)], "cpu")}),
    "state_dict": lambda x: x.state_dict(),
    "load_state_dict": lambda x: x.load_state_dict(x.state_dict()),
    "zero_grad": lambda x: x.zero_grad(),
}


@pytest.mark.parametrize("name", METHODS)
def test_decorators_of_torchs_methods_run_except_the_one_that_imports_the_compiler(
    name, monkeypatch
):
    optimizer, called = Adam(parameters([(3,)], "cpu")), []
    usual = getattr(torch.optim.Optimizer, name)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    # What the decorator asked the compiler for at the first call, and asks for no more.
    monkeypatch.delattr(usual.__wrapped__, "__dynamo_disable", raising=False)
    METHODS[name](optimizer)
    assert "torch._dynamo" not in sys.modules

    @functools.wraps(usual)
    def others(self, *arguments, **options):
        called.append(name)
        return usual.__wrapped__(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Optimizer, name, others)
    METHODS[name](optimizer)
    assert called == [name]


def test_once_the_compiler_is_imported_it_is_kept_out(monkeypatch):
    import torch._dynamo

    seen = []
    monkeypatch.setattr(torch._dynamo, "disable", lambda f, *_, **__: seen.append(f) or f)
    usual = torch.optim.Optimizer.zero_grad.__wrapped__
    monkeypatch.delattr(usual, "__dynamo_disable", raising=False)
    Adam(parameters([(3,)], "cpu")).zero_grad()
    assert seen == [usual]
