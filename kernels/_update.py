"""The update of every optimizer here: one launch for its coefficients, and one for its elements.

A rule is two functions of Triton. The first turns hyper-parameters and step counts, which live on
the device, into a few coefficients per tensor; the second turns elements of a gradient, parameter
and state, with those coefficients, into new ones. What surrounds them is written here, once:

    prepare   take the norm, count the step, ask the rule for its coefficients
    update    walk the chunks of all tensors, and apply the rule to each block

The gradient that a rule sees is negated to maximise, and is times the clip coefficient of
grad_norm.py. A norm that is not finite makes both launches leave everything as it was.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _multi_tensor
from ._multi_tensor import GRAD, GROUP, THREADS, Tables, load, locate, store
from .grad_norm import P, clip_coefficient, is_finite, total_norm

BLOCK = 1024  # elements of each tensor that a program holds at a time: 16 bytes per thread

# Addresses in the tensor table after GRAD; that of what a tensor does not have is 0.
PARAM = tl.constexpr(5)
STEP = tl.constexpr(6)
STATE = tl.constexpr(7)

# First columns of the table of parameter groups, float64; a rule adds its own.
LR = tl.constexpr(0)
SIGN = tl.constexpr(1)
HYPER = tl.constexpr(2)


class Rule(NamedTuple):
    """An update rule, in Triton.

    `prepare(hyper_ptr_N, t_N)` returns `coefs` coefficients for steps t_N; `update(g, p, state,
    coefs, HELD)` returns p and state. Bit i of HELD says whether the tensors have state i at all:
    without it `state[i]` is no tile, and what is returned for it is not stored.
    """

    prepare: triton.JITFunction
    update: triton.JITFunction
    coefs: int


class Part(NamedTuple):
    """The chunks [K, 2] of those tensors of a table that have the state of the bits of `held`."""

    held: int
    chunks: Tensor


def _name_after_rule(specialization) -> str:
    return specialization.constants["RULE"].__name__ + "_kernel"


@triton.jit(repr=_name_after_rule)
def _optimizer_prepare_kernel(
    tensors_ptr, hyper_ptr, coefs_ptr, partials_ptr, norm_ptr, skipped_ptr, max_norm, n_tensors,
    n_partials, RULE: tl.constexpr, COEFS: tl.constexpr, COLUMNS: tl.constexpr,
    HYPERS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    clip = 1.0
    if partials_ptr is not None:
        norm = total_norm(partials_ptr, n_partials, BLOCK_P)
        tl.store(norm_ptr, norm)
        if not is_finite(norm):
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)
            return
        clip = clip_coefficient(norm, max_norm)
    for first in range(0, n_tensors, BLOCK_N):
        offs_N = first + tl.arange(0, BLOCK_N)
        mask_N = offs_N < n_tensors
        row_ptr_N = tensors_ptr + offs_N * COLUMNS
        address_N = tl.load(row_ptr_N + STEP, mask=mask_N, other=0)
        step_ptr_N = address_N.to(tl.pointer_type(tl.float32))
        t_N = tl.load(step_ptr_N, mask=address_N != 0, other=0.0) + 1
        tl.store(step_ptr_N, t_N, mask=address_N != 0)
        hyper_ptr_N = hyper_ptr + tl.load(row_ptr_N + GROUP, mask=mask_N, other=0) * HYPERS
        coef_ptr_N = coefs_ptr + offs_N * (1 + COEFS)
        scale_N = tl.load(hyper_ptr_N + SIGN).to(tl.float32) * clip
        tl.store(coef_ptr_N, scale_N, mask=mask_N)
        # In float64, which one program can afford: in float32 1 - beta^t loses four digits.
        coefs = RULE(hyper_ptr_N, t_N.to(tl.float64))
        for i in tl.static_range(COEFS):
            tl.store(coef_ptr_N + 1 + i, coefs[i].to(tl.float32), mask=mask_N)


@triton.jit(repr=_name_after_rule)
def _optimizer_update_kernel(
    tensors_ptr, chunks_ptr, coefs_ptr, norm_ptr,
    RULE: tl.constexpr, COEFS: tl.constexpr, STATES: tl.constexpr, HELD: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        if not is_finite(norm):
            return
    chunk = tl.program_id(0).to(tl.int64)
    tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
    row_ptr = tensors_ptr + tensor * COLUMNS
    addresses = (tl.load(row_ptr + GRAD), tl.load(row_ptr + PARAM))
    for i in tl.static_range(STATES):
        addresses += (tl.load(row_ptr + STATE + i),)
    coef_ptr = coefs_ptr + tensor * (1 + COEFS)
    scale = tl.load(coef_ptr)
    coefs = ()
    for i in tl.static_range(COEFS):
        coefs += (tl.load(coef_ptr + 1 + i),)
    for first in range(start, full, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        _update_block(addresses, scale, coefs, offs, end, RULE, STATES, HELD, True)
    # One element per thread keeps neighbours together where accesses are 4 bytes wide.
    for first in range(full, end, THREADS):
        offs = first + tl.arange(0, THREADS)
        _update_block(addresses, scale, coefs, offs, end, RULE, STATES, HELD, False)


@triton.jit
def _update_block(
    addresses, scale, coefs, offs, end,
    RULE: tl.constexpr, STATES: tl.constexpr, HELD: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = load(addresses[0], offs, end, tl.float32, FULL) * scale
    p = load(addresses[1], offs, end, tl.float32, FULL)
    state = ()
    for i in tl.static_range(STATES):
        if HELD >> i & 1:
            state += (load(addresses[2 + i], offs, end, tl.float32, FULL),)
        else:
            state += (0.0,)
    p, state = RULE(g, p, state, coefs, HELD)
    store(addresses[1], offs, p, end, tl.float32, FULL)
    for i in tl.static_range(STATES):
        if HELD >> i & 1:
            store(addresses[2 + i], offs, state[i], end, tl.float32, FULL)


def launch_update(
    rule: Rule,
    tables: Tables,
    parts: list[Part],
    hyper: Tensor,
    partials_P: Tensor | None,
    norm: Tensor | None,
    skipped: Tensor,
    max_norm: float,
) -> None:
    """Launch one step of `rule`; with `norm`, which it fills, only if that turns out finite."""
    n_tensors, columns = tables.tensors.shape
    coefs = torch.empty(n_tensors, 1 + rule.coefs, device=hyper.device)
    n_partials = 0 if partials_P is None else len(partials_P)
    _optimizer_prepare_kernel[(1,)](
        tables.tensors, hyper, coefs, partials_P, norm, skipped, max_norm, n_tensors, n_partials,
        RULE=rule.prepare, COEFS=rule.coefs, COLUMNS=columns, HYPERS=hyper.shape[1],
        BLOCK_N=128, BLOCK_P=P,
    )  # fmt: skip
    for held, chunks in parts:
        _optimizer_update_kernel[(len(chunks),)](
            tables.tensors, chunks, coefs, norm,
            RULE=rule.update, COEFS=rule.coefs, STATES=columns - STATE.value, HELD=held,
            COLUMNS=columns, CHUNK=_multi_tensor.CHUNK, BLOCK=BLOCK, num_warps=THREADS.value // 32,
        )  # fmt: skip
