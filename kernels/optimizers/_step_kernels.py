"""Kernels of every optimizer step: one launch for its coefficients, one for its elements.

A rule is two functions of Triton. The first turns hyper-parameters and step counts, which live on
the device, into a few coefficients per tensor; the second turns elements of a gradient and of the
state, with those coefficients, into the distance that the parameter moves down, and new state. The
rest of the step is in this file, once for all rules. For gradient g, parameter p and step u:

    g := sign · clip · g + l2 · p + l1 · sign(p)
    p := p - (lr · decay · p + u)
    ema := ema + (1 - ema_decay) · (p - ema)

where sign is -1 to maximise, clip comes from grad_norm.py, and weight decay is either l2 or
decoupled. A norm that is not finite makes both launches leave everything as it was.

Tensors of one model may be stored in several formats (_storage.py): the kernel has a branch for
each, so that there is one launch however they are mixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.launcher import Launcher
from tritium.kernels.optimizers import _pointer_table
from tritium.kernels.optimizers._pointer_table import (
    FIRST,
    FORMAT_COLUMN,
    GRAD,
    GROUP,
    KEY,
    LR,
    SIZE,
    STEP,
    THREADS,
    Tables,
    load,
    locate,
    store,
)
from tritium.kernels.optimizers._rounding import element_bits, hash_bits
from tritium.kernels.optimizers._storage import (
    Format,
    has_ema,
    load_grad,
    load_param,
    load_state,
    state_kind,
    store_grad,
    store_param,
    store_state,
)
from tritium.kernels.optimizers.grad_norm import P, clip_coefficient, is_finite, total_norm

BLOCK = 1024  # elements of each tensor that a program holds at a time: 16 bytes per thread

# Columns of the table of tensors: the address of the parameter, of its master or its other bits, of
# its moving average, then of the states, then of their scales.
PARAM = tl.constexpr(GRAD.value + 1)
EXTRA = tl.constexpr(GRAD.value + 2)
EMA = tl.constexpr(GRAD.value + 3)
STATE = tl.constexpr(GRAD.value + 4)

# First columns of the table of parameter groups, float64; a rule adds its own.
RATE = tl.constexpr(0)
SIGN = tl.constexpr(1)
PENALTY2 = tl.constexpr(2)
PENALTY1 = tl.constexpr(3)
DECAY = tl.constexpr(4)
HYPER = tl.constexpr(5)

# First columns of the coefficients of a tensor: clip · sign, l2, l1, decay, float32; key, uint32.
BASE = tl.constexpr(5)

# Columns of the sums of squares over a chunk.
GRADS = tl.constexpr(0)
UPDATES = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)
SUMS = tl.constexpr(3)


class Rule(NamedTuple):
    """An update rule, in Triton.

    `prepare(lr_N, hyper_ptr_N, t_N)` returns `coefs` coefficients for steps t_N; `update(g, state,
    coefs, FORMAT)` returns u and state. Where `has_state(FORMAT, i)` is false the tensors have no
    state i: `state[i]` is no tile, and what is returned for it is not stored.
    """

    prepare: triton.JITFunction
    update: triton.JITFunction
    coefs: int


class StepFlags(NamedTuple):
    """Optional parts of an update."""

    l1: bool = False
    """Some group has a penalty l1."""
    l2: bool = False
    """Some group has weight decay inside the gradient."""
    zero: bool = False
    """Gradients are zeroed."""
    ema_weight: float = 0.0
    """1 - ema_decay."""
    cautious: bool = False
    """Only elements that the rule does not push away from 0 decay."""


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
        step_N = tl.load(row_ptr_N + STEP, mask=mask_N, other=0)
        step_ptr_N = step_N.to(tl.pointer_type(tl.float32))
        t_N = tl.load(step_ptr_N, mask=step_N != 0, other=0.0) + 1
        tl.store(step_ptr_N, t_N, mask=step_N != 0)
        hyper_ptr_N = hyper_ptr + tl.load(row_ptr_N + GROUP, mask=mask_N, other=0) * HYPERS
        rate_N = tl.load(row_ptr_N + LR, mask=mask_N, other=0)
        rate_ptr_N = rate_N.to(tl.pointer_type(tl.float32))
        lr_N = tl.load(rate_ptr_N, mask=rate_N != 0, other=0.0).to(tl.float64)
        lr_N = tl.where(rate_N != 0, lr_N, tl.load(hyper_ptr_N + RATE))
        seed_N = tl.load(row_ptr_N + KEY, mask=mask_N, other=0).to(tl.uint32)
        key_N = hash_bits(seed_N ^ hash_bits(t_N.to(tl.uint32)))
        coef_ptr_N = coefs_ptr + offs_N * (BASE + COEFS)
        scale_N = tl.load(hyper_ptr_N + SIGN).to(tl.float32) * clip
        decay_N = lr_N * tl.load(hyper_ptr_N + DECAY)
        tl.store(coef_ptr_N, scale_N, mask=mask_N)
        tl.store(coef_ptr_N + 1, tl.load(hyper_ptr_N + PENALTY2).to(tl.float32), mask=mask_N)
        tl.store(coef_ptr_N + 2, tl.load(hyper_ptr_N + PENALTY1).to(tl.float32), mask=mask_N)
        tl.store(coef_ptr_N + 3, decay_N.to(tl.float32), mask=mask_N)
        tl.store(coef_ptr_N + 4, key_N.to(tl.float32, bitcast=True), mask=mask_N)
        # In float64, which one program can afford: in float32 1 - beta^t loses four digits.
        coefs = RULE(lr_N, hyper_ptr_N, t_N.to(tl.float64))
        for i in tl.static_range(COEFS):
            tl.store(coef_ptr_N + BASE + i, coefs[i].to(tl.float32), mask=mask_N)


@triton.jit(repr=_name_after_rule)
def _optimizer_update_kernel(
    tensors_ptr, chunks_ptr, coefs_ptr, norm_ptr, sums_ptr, ema_weight,
    RULE: tl.constexpr, COEFS: tl.constexpr, STATES: tl.constexpr, FORMATS: tl.constexpr,
    L1: tl.constexpr, L2: tl.constexpr, ZERO: tl.constexpr, CAUTIOUS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
    row_ptr = tensors_ptr + tensor * COLUMNS
    code = tl.load(row_ptr + FORMAT_COLUMN)
    apply = True
    if norm_ptr is not None:
        apply = is_finite(tl.load(norm_ptr))
    if apply:
        addresses = ()
        for i in tl.static_range(COLUMNS - GRAD):
            addresses += (tl.load(row_ptr + GRAD + i),)
        coef_ptr = coefs_ptr + tensor * (BASE + COEFS)
        coefs = ()
        for i in tl.static_range(BASE + COEFS):
            coefs += (tl.load(coef_ptr + i),)
        for i in tl.static_range(len(FORMATS)):
            if code == FORMATS[i]:
                g, u, w = _update_chunk(
                    addresses, coefs, ema_weight, start, full, end, RULE, STATES, FORMATS[i], L1,
                    L2, ZERO, CAUTIOUS, sums_ptr is not None, BLOCK,
                )  # fmt: skip
                if sums_ptr is not None:
                    if norm_ptr is None:
                        tl.store(sums_ptr + chunk * SUMS + GRADS, g)
                    tl.store(sums_ptr + chunk * SUMS + UPDATES, u)
                    tl.store(sums_ptr + chunk * SUMS + WEIGHTS, w)
    else:
        if sums_ptr is not None:
            tl.store(sums_ptr + chunk * SUMS + UPDATES, 0.0)
        if ZERO:
            address = tl.load(row_ptr + GRAD)
            for i in tl.static_range(len(FORMATS)):
                if code == FORMATS[i]:
                    for first in range(start, end, BLOCK):
                        offs = first + tl.arange(0, BLOCK)
                        zero = tl.zeros((BLOCK,), dtype=tl.float32)
                        store_grad(address, offs, zero, end, FORMATS[i], False)


@triton.jit
def _update_chunk(
    addresses, coefs, ema_weight, start, full, end, RULE: tl.constexpr, STATES: tl.constexpr,
    FORMAT: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, ZERO: tl.constexpr,
    CAUTIOUS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One element per thread keeps neighbours together where accesses are 4 bytes wide.
    g = tl.zeros((THREADS,), dtype=tl.float32)
    u, w = g, g
    for first in range(full, end, THREADS):
        g, u, w = _update_block(
            addresses, coefs, ema_weight, first, end, g, u, w, RULE, STATES, FORMAT, L1, L2, ZERO,
            CAUTIOUS, SUM, THREADS, False,
        )  # fmt: skip
    g_sum, u_sum, w_sum = 0.0, 0.0, 0.0
    if SUM:
        g_sum, u_sum, w_sum = tl.sum(g), tl.sum(u), tl.sum(w)
    g = tl.zeros((BLOCK,), dtype=tl.float32)
    u, w = g, g
    for first in range(start, full, BLOCK):
        g, u, w = _update_block(
            addresses, coefs, ema_weight, first, end, g, u, w, RULE, STATES, FORMAT, L1, L2, ZERO,
            CAUTIOUS, SUM, BLOCK, True,
        )  # fmt: skip
    if SUM:
        g_sum, u_sum, w_sum = g_sum + tl.sum(g), u_sum + tl.sum(u), w_sum + tl.sum(w)
    return g_sum, u_sum, w_sum


@triton.jit
def _update_block(
    addresses, coefs, ema_weight, first, end, g_squares, u_squares, w_squares, RULE: tl.constexpr,
    STATES: tl.constexpr, FORMAT: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr,
    ZERO: tl.constexpr, CAUTIOUS: tl.constexpr, SUM: tl.constexpr, N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    grad, param, extra, ema = addresses[:4]
    clip, l2, l1, decay, key = coefs[:5]
    offs = first + tl.arange(0, N)
    g = load_grad(grad, offs, end, FORMAT, FULL)
    p = load_param(param, extra, offs, end, FORMAT, FULL)
    if SUM:
        g_squares += g * g
    if ZERO:
        store_grad(grad, offs, tl.zeros((N,), dtype=tl.float32), end, FORMAT, FULL)
    g *= clip
    if L2:
        g += l2 * p
    if L1:
        g += tl.where(p > 0, l1, tl.where(p < 0, -l1, 0.0))
    key = key.to(tl.uint32, bitcast=True)
    bits = element_bits(offs, key)
    state = ()
    for i in tl.static_range(STATES):
        state += (
            load_state(
                addresses[4 + i], addresses[4 + STATES + i], first, offs, end,
                state_kind(FORMAT, i), N, FULL,
            ),
        )  # fmt: skip
    u, state = RULE(g, state, coefs[5:], FORMAT)
    if CAUTIOUS:
        away = ((u > 0) & (p < 0)) | ((u < 0) & (p > 0))
        u += tl.where(away, 0.0, decay * p)
    else:
        u += decay * p
    p -= u
    if SUM:
        inside = offs < end
        u_squares += tl.where(inside, u * u, 0.0)
        w_squares += tl.where(inside, p * p, 0.0)
    store_param(param, extra, offs, p, bits, end, FORMAT, FULL)
    if has_ema(FORMAT):
        mean = load(ema, offs, end, tl.float32, FULL)
        store(ema, offs, mean + ema_weight * (p - mean), end, tl.float32, FULL)
    for i in tl.static_range(STATES):
        store_state(
            addresses[4 + i], addresses[4 + STATES + i], first, offs, state[i], bits, end,
            state_kind(FORMAT, i), i + 1, N, FULL,
        )  # fmt: skip
    return g_squares, u_squares, w_squares


@triton.jit
def divide(x, y):
    """Return x / y for y >= 0 in 3 instructions instead of 8; up to 2 ulp less accurate."""
    root = tl.rsqrt(y)
    return x * root * root


@triton.jit
def _norms_kernel(
    tensors_ptr, sums_ptr, norms_ptr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    size = tl.load(tensors_ptr + n * COLUMNS + SIZE)
    first = tl.load(tensors_ptr + n * COLUMNS + FIRST)
    count = tl.maximum((size + CHUNK - 1) // CHUNK, 1)
    for i in tl.static_range(SUMS):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, count, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            total += tl.load(sums_ptr + (first + offs) * SUMS + i, mask=offs < count, other=0.0)
        tl.store(norms_ptr + n * SUMS + i, tl.sum(total))


def launch_update(
    rule: Rule,
    tables: Tables,
    formats: Sequence[Format],
    hyper: Tensor,
    partials_P: Tensor | None,
    norm: Tensor | None,
    skipped: Tensor,
    max_norm: float,
    sums: Tensor | None,
    options: StepFlags,
) -> None:
    """Launch one step of `rule`; with `norm`, which it fills, only if that norm is finite.

    `sums` [K, 3], if given, receives the squares of gradients, updates and weights by chunk; with
    `norm`, those of the gradients are there already.
    """
    coefs = launch_prepare(rule, tables, hyper, partials_P, norm, skipped, max_norm)
    launch_elements(rule, tables, formats, coefs, norm, sums, options)


def launch_prepare(
    rule: Rule, tables: Tables, hyper: Tensor, partials_P: Tensor | None, norm: Tensor | None,
    skipped: Tensor, max_norm: float,
) -> Tensor:  # fmt: skip
    """Launch the coefficients of all tensors, and return them: `[N, 5 + coefs of the rule]`."""
    n_tensors, columns = tables.tensors.shape
    n_coefs = BASE.value + rule.coefs
    coefs = torch.empty(n_tensors, n_coefs, dtype=torch.float32, device=hyper.device)
    n_partials = 0 if partials_P is None else len(partials_P)
    _prepare(
        (1,),
        (tables.tensors, hyper, coefs, partials_P, norm, skipped),
        (max_norm, n_tensors, n_partials),
        (rule.prepare, rule.coefs, columns, hyper.shape[1], 128, P),
        enable_fp_fusion=False,
    )
    return coefs


def launch_elements(
    rule: Rule, tables: Tables, formats: Sequence[Format], coefs: Tensor, norm: Tensor | None,
    sums: Tensor | None, options: StepFlags,
) -> None:  # fmt: skip
    """Launch the update of all elements, with the coefficients from `launch_prepare`."""
    columns = tables.tensors.shape[1]
    block = BLOCK * (2 if all(format.is_16_bit for format in formats) else 1)
    # Products are rounded before they are added: where a compiler fuses the two depends on format,
    # alignment and what else is computed, and equal numbers would take unequal steps.
    _update(
        (len(tables.chunks),),
        (*tables, coefs, norm, sums),
        (options.ema_weight,),
        (
            rule.update, rule.coefs, (columns - STATE.value) // 2, tuple(map(int, formats)),
            options.l1, options.l2, options.zero, options.cautious, columns, _pointer_table.CHUNK,
            block,
        ),
        num_warps=THREADS.value // 32, enable_fp_fusion=False,
    )  # fmt: skip


_prepare = Launcher(_optimizer_prepare_kernel)
_update = Launcher(_optimizer_update_kernel)


def launch_norms(tables: Tables, sums: Tensor) -> Tensor:
    """Launch the sums of `sums` [K, 3] over the chunks of each tensor: `[N, 3]`, float32."""
    n_tensors, columns = tables.tensors.shape
    norms = sums.new_empty(n_tensors, SUMS.value)
    _norms_kernel[(n_tensors,)](
        tables.tensors, sums, norms, COLUMNS=columns, CHUNK=_pointer_table.CHUNK, BLOCK=1024,
        enable_fp_fusion=True,
    )  # fmt: skip
    return norms
