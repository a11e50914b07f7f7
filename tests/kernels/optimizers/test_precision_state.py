"""State of every precision saves, loads and copies bit for bit, and converts closely."""

import copy
import io
import pickle

import pytest
import torch
from small_training import assert_equal, bits
from torch import nn

from tritium.kernels import SGD, AdamW, Lion
from tritium.kernels.optimizers import _rounding
from tritium.kernels.optimizers._pointer_table import flat
from tritium.kernels.optimizers._rounding import Q

pytestmark = pytest.mark.usefixtures("pointer_tables")

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
N = 4100
EVERY = [
    (F32, {}), (F32, {"state_dtype": BF16}), (F32, {"state_dtype": U8}), (BF16, {}),
    (BF16, {"master": "split"}), (BF16, {"master": "split", "state_dtype": U8}),
    (BF16, {"master": None}), (BF16, {"master": None, "state_dtype": BF16}),
    (BF16, {"master": None, "state_dtype": U8}),
]  # fmt: skip
BY_PRECISION = pytest.mark.parametrize(("dtype", "options"), EVERY, ids=str)


def parameters(dtype, device):
    return [nn.Parameter(torch.randn(n, device=device).to(dtype)) for n in (9, N)]


def train(optimizer, steps, start=0):
    for seed in range(start, start + steps):
        generator = torch.Generator().manual_seed(seed)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    return optimizer


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(optimizer, saved, **options):
    """Another optimizer of equal parameters that has loaded `saved`."""
    ps = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = AdamW(ps, **options)
    other.load_state_dict(saved)
    return other


def resumed(optimizer, **options):
    return load(optimizer, through_a_file(optimizer.state_dict()), **options)


def deep_copied(optimizer, **options):
    return copy.deepcopy(optimizer)


def pickled(optimizer, **options):
    return pickle.loads(pickle.dumps(optimizer))


@BY_PRECISION
@pytest.mark.parametrize("copied", [resumed, deep_copied, pickled], ids=lambda f: f.__name__)
def test_copies_continue_alike(copied, dtype, options, path, device):
    options = options | {"seed": 3}
    optimizer = train(AdamW(parameters(dtype, device), **options), 1)
    twin = copied(optimizer, **options)
    assert_equal(bits(optimizer), bits(twin))
    for x in (optimizer, twin):
        train(x, 2, start=1)
    assert_equal(bits(optimizer), bits(twin))


@BY_PRECISION
def test_state_has_the_documented_tensors(dtype, options, device):
    optimizer = train(AdamW(parameters(dtype, device), ema_decay=0.9, **options), 1)
    small, large = map(optimizer.state.__getitem__, optimizer.param_groups[0]["params"])
    extra = {None: None, "split": "remainder"}.get(options.get("master", ""), "master")
    extra = {extra} - {None} if dtype == BF16 else set()
    names = {"step", "exp_avg", "exp_avg_sq", "ema"} | extra
    kind = options.get("state_dtype", F32)
    scales = {"exp_avg_scale", "exp_avg_sq_scale"} if kind == U8 else set()
    assert small.keys() == names
    assert large.keys() == names | scales
    for state, expected in ((small, F32 if kind == U8 else kind), (large, kind)):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected
        assert state["ema"].dtype == F32
        assert "remainder" not in state or state["remainder"].dtype == torch.int16
    assert all(large[name].shape == (-(-N // Q),) for name in scales)


@pytest.mark.parametrize("master", ["float32", "split", None])
def test_loads_the_state_of_torch_for_bfloat16(master, path, device):
    torch_result = train(torch.optim.AdamW(parameters(BF16, device)), 2)
    actual = load(torch_result, through_a_file(torch_result.state_dict()), master=master)
    for p, q in zip(*(x.param_groups[0]["params"] for x in (actual, torch_result)), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert actual.state[p][name].dtype == F32
            assert torch.equal(actual.state[p][name], torch_result.state[q][name].float())
        assert actual.state[p]["step"].item() == 2
    exact = [nn.Parameter(p.detach().float()) for p in actual.param_groups[0]["params"]]
    wide = AdamW(exact)
    wide.load_state_dict(torch_result.state_dict())
    for p, e in zip(actual.param_groups[0]["params"], exact, strict=True):
        p.grad = torch.randn_like(p)
        e.grad = p.grad.float()
    actual.step()
    wide.step()
    for p, e in zip(actual.param_groups[0]["params"], exact, strict=True):
        if master == "float32":
            assert torch.equal(actual.state[p]["master"], e)
        elif master == "split":
            assert torch.equal(_rounding.join_reference(p, actual.state[p]["remainder"]), e)
        else:
            torch.testing.assert_close(p.float(), e.detach(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("saved", ["float32", "split"])
@pytest.mark.parametrize("loading", ["float32", "split", None])
def test_refuses_the_state_of_another_master(saved, loading, device):
    optimizer = train(AdamW(parameters(BF16, device), master=saved), 1)
    if saved == loading:
        resumed(optimizer, master=loading)
        return
    with pytest.raises(ValueError, match="load what the same rule saved, with the same options"):
        resumed(optimizer, master=loading)


def moments(optimizer):
    """Each parameter's moments in float32, with their 8-bit scales."""
    for p in optimizer.param_groups[0]["params"]:
        for name, kind in (("exp_avg", _rounding.SIGNED), ("exp_avg_sq", _rounding.UNSIGNED)):
            x, scale_B = optimizer.state[p][name], optimizer.state[p].get(f"{name}_scale")
            if scale_B is not None:
                x = _rounding.decode_reference(flat(x), scale_B, kind.value)
            yield name, x.float(), scale_B


@pytest.mark.parametrize(("master", "held"), [("float32", "master"), ("split", "remainder")])
def test_refuses_the_state_of_a_bfloat16_parameter_for_a_float32_one(master, held, device):
    saved = train(AdamW(parameters(BF16, device), master=master), 1).state_dict()
    loading = AdamW(parameters(F32, device), master=master)
    with pytest.raises(ValueError, match=f"float32 parameter must hold no {held}, got that of"):
        loading.load_state_dict(saved)
    for own in saved["state"].values():  # as the message says
        del own[held]
    loading.load_state_dict(saved)


@pytest.mark.parametrize("state_dtype", [BF16, U8], ids=str)
def test_moments_convert_and_come_back(state_dtype, device):
    wide = train(AdamW(parameters(F32, device)), 2)
    narrow = resumed(wide, state_dtype=state_dtype)
    for (name, x, _), (_, y, scale_B) in zip(moments(wide), moments(narrow), strict=True):
        if scale_B is None:
            allowed = 2**-8 * x.abs() if state_dtype == BF16 else 0 * x
        else:  # half the distance between the codes around it
            unit = scale_B.repeat_interleave(Q)[: len(x)]
            power = 2 if name == "exp_avg" else 4
            c = (x.abs() / unit) ** (1 / power)
            allowed = unit * ((c + 1) ** power - c**power) * 0.51
            if name == "exp_avg_sq":
                assert torch.equal(y == 0, x == 0)
                allowed = allowed.maximum(unit)
        assert ((x - y).abs() <= allowed).all()
    back = resumed(narrow)
    assert_equal([x for _, x, _ in moments(narrow)], [x for _, x, _ in moments(back)])
    assert all(x.dtype == F32 for state in back.state.values() for x in state.values())
    again = resumed(back, state_dtype=state_dtype)
    for (_, x, scale_B), (_, y, _) in zip(moments(narrow), moments(again), strict=True):
        atol = 0.0 if scale_B is None else 1e-6 * x.abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_codes_load_into_another_order_of_memory(path, device):
    p = nn.Parameter(torch.randn(64, 80, device=device))
    optimizer = train(AdamW([p], state_dtype=U8), 2)
    saved = through_a_file(optimizer.state_dict())
    q = nn.Parameter(p.detach().T.contiguous().T)
    other = AdamW([q], state_dtype=U8)
    other.load_state_dict(saved)
    for name, kind in (("exp_avg", _rounding.SIGNED), ("exp_avg_sq", _rounding.UNSIGNED)):
        wide = []
        for x in (optimizer.state[p], other.state[q]):
            wide.append(torch.empty_like(x[name], dtype=F32))
            scale_B = x[f"{name}_scale"]
            flat(wide[-1]).copy_(_rounding.decode_reference(flat(x[name]), scale_B, kind.value))
        x, y = wide
        assert y.stride() == (1, 64)
        largest = x.abs().max().item()
        assert (x - y).abs().mean() < 0.01 * x.abs().mean()
        torch.testing.assert_close(x, y, rtol=0, atol=0.01 * largest)
    train(other, 1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("exp_avg_scale"),
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][:-1]),
        lambda state: state.update(exp_avg=state["exp_avg"].float()),
    ],
    ids=["without scales", "too few scales", "scales of nothing"],
)
@pytest.mark.parametrize("state_dtype", [F32, U8], ids=str)
def test_refuses_codes_without_their_scales(spoil, state_dtype, device):
    optimizer = train(AdamW(parameters(F32, device), state_dtype=U8), 1)
    saved = through_a_file(optimizer.state_dict())
    spoil(saved["state"][1])
    before = bits(optimizer)
    with pytest.raises(ValueError, match="AdamW: exp_avg_scale must have the shape"):
        load(optimizer, saved, state_dtype=state_dtype)
    assert_equal(bits(optimizer), before)


@BY_PRECISION
def test_load_hooks_see_tensors(dtype, options, device):
    optimizer = train(AdamW(parameters(dtype, device), **options), 1)
    other, seen = AdamW(copy.deepcopy(optimizer.param_groups[0]["params"]), **options), []

    def look(state):
        assert all(isinstance(x, torch.Tensor) for own in state.values() for x in own.values())
        seen.append(len(state))

    other.register_load_state_dict_pre_hook(lambda _, saved: look(saved["state"]))
    other.register_load_state_dict_post_hook(lambda loaded: look(loaded.state))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [2, 2]
    assert_equal(bits(optimizer), bits(other))


@pytest.mark.parametrize(("actual", "options"), [(SGD, {"momentum": 0.9}), (SGD, {}), (Lion, {})])
def test_rules_that_count_no_steps_count_them_for_random_bits(actual, options, path, device):
    optimizer = train(actual(parameters(BF16, device), lr=0.01, master=None, **options), 2)
    twin = actual(
        copy.deepcopy(optimizer.param_groups[0]["params"]), lr=0.01, master=None, **options
    )
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    for x in (optimizer, twin):
        train(x, 2, start=2)
    assert_equal(bits(optimizer), bits(twin))
    assert all(state["step"].item() == 4 for state in twin.state.values())
