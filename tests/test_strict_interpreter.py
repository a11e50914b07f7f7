"""The strict interpreter refuses launches that fail or corrupt on a GPU, and no others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from probe import probe
from strict_arithmetic import MENDS
from strict_interpreter import KernelError, _allowed, allow, program_order

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted")


@triton.jit
def _copy(x_ptr, y_ptr, N, shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + shift, mask=offs < N, other=0)
    tl.store(y_ptr + offs, x, mask=offs < N)


@triton.jit
def _hint(x_ptr, HINT: tl.constexpr, shift):
    offs = tl.arange(0, 8) + shift
    if HINT == "pointer":
        x_ptr = tl.multiple_of(x_ptr, 16)
    elif HINT == "multiple_of":
        offs = tl.multiple_of(offs, 8)
    elif HINT == "multiple_of every lane":
        offs = tl.multiple_of(offs * 2, 8)
    elif HINT == "max_contiguous":
        offs = tl.max_contiguous(offs + offs % 2, 4)
    else:
        offs = tl.max_constancy(offs // 2, 2)
    tl.store(x_ptr + offs, 0)


def hint(hint, shift=0, x=None):
    _hint[1,](torch.zeros(32) if x is None else x, hint, shift)


def refuses(what: str, launch: Callable, *args, **kwargs):
    with pytest.raises(KernelError, match=what):
        launch(*args, **kwargs)


@probe("_patch_lang_core")
def test_a_false_hint_on_a_pointer_is_refused():
    hint("pointer")
    refuses(r"_hint, program .*multiple_of\(..., 16\)", hint, "pointer", x=torch.zeros(33)[1:])


@probe("_patch_lang_core")
def test_false_hints_on_offsets_are_refused():
    for name, shift in [("multiple_of", 1), ("max_contiguous", 0), ("max_constancy", 1)]:
        refuses(f"false hint tl.{name}", hint, name, shift)
    refuses("false hint", hint, "multiple_of every lane")
    for name, shift in [("multiple_of", 8), ("max_constancy", 2)]:
        hint(name, shift)


@triton.jit
def _last_writes(x_ptr):
    x = tl.load(x_ptr)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr, x)


@probe("create_masked_store")
def test_writing_what_many_have_read_is_refused():
    refuses("store what several programs read", _last_writes[3,], torch.zeros(1))


@triton.jit
def _atomic(x_ptr, shift, OP: tl.constexpr):
    if OP == "add":
        tl.atomic_add(x_ptr + shift, 1)
    elif OP == "cas":
        tl.atomic_cas(x_ptr + shift, 0, 1)
    else:
        tl.atomic_xchg(x_ptr + shift, tl.program_id(0))


@probe("set_grid_idx")
def test_programs_run_in_the_order_asked_for():
    x = torch.zeros(1, dtype=torch.int32)
    last = {}
    for order in ("forward", "reverse", "shuffled"):
        with program_order(order):
            _atomic[99,](x, 0, "exchange")
        last[order] = x.item()
    assert (last["forward"], last["reverse"]) == (98, 0)
    assert 0 < last["shuffled"] < 98


@probe("set_grid_dim")
def test_a_grid_that_cuda_refuses_is_refused():
    refuses("grid", _atomic[1, 65536], torch.zeros(1, dtype=torch.int32), 0, "add")


@probe("create_masked_load")
def test_a_load_out_of_bounds_is_refused():
    x, y = torch.zeros(10)[1:9], torch.empty(8)
    _copy[1,](x, y, 7, 1, BLOCK=8)
    what = r"_copy, program \(0, 0, 0\): load out of bounds in 1 of 8 lanes, the first "
    refuses(what + "0 bytes past the end of x_ptr", _copy[1,], x, y, 8, 1, BLOCK=8)
    refuses(what + "4 bytes before the start of x_ptr", _copy[1,], x, y, 8, -1, BLOCK=8)


@probe("create_masked_load")
def test_a_load_between_the_elements_of_a_view_is_refused():
    x = torch.zeros(8, 2)
    refuses("between the elements", _copy[1,], x[:, 0], torch.empty(8), 8, 0, BLOCK=8)


@triton.jit
def _no_other(x_ptr, y_ptr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < 4))


@probe("create_masked_load")
def test_a_masked_lane_without_other_is_nan():
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.zeros(8, dtype=dtype)
        _no_other[1,](torch.ones(8, dtype=dtype), y)
        assert y.isnan().tolist() == [False] * 4 + [True] * 4


@triton.jit
def _from_table(table_ptr, y_ptr):
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr, tl.load(x_ptr))


@probe("create_masked_load")
def test_an_address_from_a_table_must_be_allowed():
    x, y = torch.ones(1), torch.zeros(1)
    table = torch.tensor([x.data_ptr()])
    with allow(x):
        _from_table[1,](table, y)
    assert y.item() == 1
    refuses("load out of bounds", _from_table[1,], table, y)


@probe("create_masked_load")
def test_a_misaligned_load_is_refused():
    x = torch.zeros(4)
    with allow(x):
        what = "load of 4 bytes is not aligned to 4 bytes"
        refuses(what, _from_table[1,], torch.tensor([x.data_ptr() + 2]), torch.zeros(1))


@probe("create_masked_store")
def test_a_store_out_of_bounds_is_refused():
    what = "store out of bounds in 2 of 8 lanes, the first 0 bytes past the end of y_ptr"
    refuses(what, _copy[1,], torch.zeros(8), torch.zeros(8)[:6], 8, 0, BLOCK=8)


@probe("create_masked_store")
def test_two_programs_that_write_one_place_are_refused():
    what = "store what program number 0 wrote"
    refuses(what, _copy[2,], torch.zeros(8), torch.zeros(8), 8, 0, BLOCK=8)


@triton.jit
def _neighbour(x_ptr, shift):
    p = tl.program_id(0)
    tl.store(x_ptr + p, tl.load(x_ptr + p + shift) + 1)


@probe("create_masked_load")
def test_reading_what_another_program_wrote_is_refused():
    with program_order("reverse"):
        refuses("load what program number 1 wrote", _neighbour[2,], torch.zeros(4), 1)


@probe("create_masked_store")
def test_writing_what_another_program_read_is_refused():
    refuses("store what program number 0 read", _neighbour[2,], torch.zeros(4), 1)


@probe("create_atomic_rmw")
def test_an_atomic_past_the_end_is_refused():
    room = torch.zeros(4, dtype=torch.int32)
    refuses("atomic out of bounds", _atomic[1,], room[:2], 2, "add")


@probe("create_atomic_cas")
def test_an_exchange_past_the_end_is_refused():
    room = torch.zeros(4, dtype=torch.int32)
    refuses("atomic out of bounds", _atomic[1,], room[:2], 2, "cas")


@triton.jit
def _multiply(y_ptr, a, b):
    tl.device_assert(a != 3, "a must not be 3")
    tl.store(y_ptr, a * b)


@probe("device_assert")
def test_int32_overflow_is_refused():
    refuses("int32 overflow", _multiply[1,], torch.zeros(1, dtype=torch.int64), 1 << 20, 1 << 12)


@probe("device_assert")
def test_device_assertions_hold():
    refuses("a must not be 3", _multiply[1,], torch.zeros(1, dtype=torch.int64), 3, 1)


@triton.jit
def _honest(x_ptr, y_ptr, count_ptr, N):
    p = tl.program_id(0)
    offs = tl.arange(0, 8)
    x = tl.load(x_ptr + offs * 2, mask=offs < N, other=0.0)
    tl.store(y_ptr + p * N + offs, x, mask=offs < N)
    tl.store(y_ptr + p * N + offs, x + tl.load(y_ptr + p * N + offs, offs < N, 0.0), offs < N)
    tl.atomic_add(count_ptr, 1)


def test_an_honest_kernel_passes():
    # Shared reads, rewriting one's own, atomics by all, masked lanes astray, a strided argument.
    x, y, count = torch.ones(5, 2)[:, 0], torch.empty(3, 5), torch.zeros(1, dtype=torch.int32)
    _honest[3,](x, y, count, 5)
    assert y.equal(torch.full((3, 5), 2.0))
    assert count.item() == 3


def test_a_view_beside_its_tensor_takes_nothing_away():
    x = torch.zeros(64)
    _copy[1,](x, x[2:10], 8, 40, BLOCK=8)


def test_allowing_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), allow(torch.ones(1)):
        _ = 1 / 0
    assert not _allowed


def test_every_mend_has_a_probe():
    probes = "".join(file.read_text() for file in Path(__file__).parent.glob("test_strict_*.py"))
    assert [name for _, name in MENDS if f'@probe("{name}")' not in probes] == []
