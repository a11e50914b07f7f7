"""Muon's kernels: momentum of all matrices, and the three products of a Newton-Schulz step.

Matrices of all shapes share every launch. Their bfloat16 values X are in one buffer, in the order
of memory of the parameters, so that the last X is read as gradients are. With R <= C the sides of a
matrix, tables say where each is, and which tiles there are:

    matrices [M, 9] int64     columns OFFSET to PARTIALS below
    tiles    [K, 3] int32     matrix, tile row, tile column

A = X · Xᵀ and B = b · A + c · A · A are symmetric: only tiles on and above the diagonal are
computed, and stored twice. The first X is not normalized: its norm is the root of the trace of A,
which the tiles on the diagonal leave behind, and the first B and X take the factor 1 / norm on the
way.
"""

import triton
import triton.language as tl
from triton import knobs

from tritium.kernels.optimizers._pointer_table import (
    FORMAT_COLUMN,
    GRAD,
    THREADS,
    locate,
)
from tritium.kernels.optimizers._rounding import element_bits
from tritium.kernels.optimizers._step_kernels import BASE, STATE
from tritium.kernels.optimizers._storage import (
    load_grad,
    load_state,
    state_kind,
    store_grad,
    store_state,
)
from tritium.kernels.optimizers.grad_norm import is_finite

# Triton's interpreter multiplies the bits of bfloat16; products in float32 are the same there.
FACTOR = tl.constexpr(tl.float32 if knobs.runtime.interpret else tl.bfloat16)
EVEN = tl.constexpr(16)  # elements: offsets and strides that are multiples of it move 16 bytes

# Columns of `matrices`.
OFFSET = tl.constexpr(0)  # of X in the buffer
SMALL = tl.constexpr(1)  # R
LARGE = tl.constexpr(2)  # C
TALL = tl.constexpr(3)  # whether it is stored as [C, R]
GRAM = tl.constexpr(4)  # offset of A and B in theirs, which are [LEAD, LEAD]
LEAD = tl.constexpr(5)
PARTIALS = tl.constexpr(6)  # index of the first of its sums over tiles on the diagonal
TENSOR = tl.constexpr(7)  # index of the parameter, or -1 if another matrix of it comes before
MOMENT = tl.constexpr(8)  # address of the second moments of rows, or 0
WIDTH = tl.constexpr(9)

# Columns of the coefficients of a tensor, behind those of every step and of Adam's, and the rate.
ONE_MINUS_MOMENTUM = tl.constexpr(BASE.value + 7)
BEHIND = tl.constexpr(BASE.value + 8)


@triton.jit
def _muon_momentum_kernel(
    tensors_ptr, chunks_ptr, coefs_ptr, norm_ptr, offsets_ptr, x_ptr,
    COEFS: tl.constexpr, STATES: tl.constexpr, FORMATS: tl.constexpr, ZERO: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor, start, full, end = locate(tensors_ptr, chunks_ptr, chunk, COLUMNS, CHUNK, BLOCK)
    row_ptr = tensors_ptr + tensor * COLUMNS
    code = tl.load(row_ptr + FORMAT_COLUMN)
    offset = tl.load(offsets_ptr + tensor)
    apply = True
    if norm_ptr is not None:
        apply = is_finite(tl.load(norm_ptr))
    if offset >= 0:
        coef_ptr = coefs_ptr + tensor * (BASE + COEFS)
        to_ptr = x_ptr + offset // 16 * 16
        for i in tl.static_range(len(FORMATS)):
            if code == FORMATS[i]:
                if apply:
                    for first in range(full, end, THREADS):
                        _momentum_block(
                            row_ptr, coef_ptr, to_ptr, first, end, STATES, FORMATS[i], ZERO,
                            THREADS, False,
                        )  # fmt: skip
                    for first in range(start, full, BLOCK):
                        _momentum_block(
                            row_ptr, coef_ptr, to_ptr, first, end, STATES, FORMATS[i], ZERO,
                            BLOCK, True,
                        )  # fmt: skip
                elif ZERO:
                    address = tl.load(row_ptr + GRAD)
                    for first in range(start, end, BLOCK):
                        offs = first + tl.arange(0, BLOCK)
                        zero = tl.zeros((BLOCK,), dtype=tl.float32)
                        store_grad(address, offs, zero, end, FORMATS[i], False)


@triton.jit
def _momentum_block(
    row_ptr, coef_ptr, to_ptr, first, end, STATES: tl.constexpr, FORMAT: tl.constexpr,
    ZERO: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = state_kind(FORMAT, 0)
    offs = first + tl.arange(0, N)
    grad = tl.load(row_ptr + GRAD)
    state, scales = tl.load(row_ptr + STATE), tl.load(row_ptr + STATE + STATES)
    g = load_grad(grad, offs, end, FORMAT, FULL)
    if ZERO:
        store_grad(grad, offs, tl.zeros((N,), dtype=tl.float32), end, FORMAT, FULL)
    g *= tl.load(coef_ptr)
    m = load_state(state, scales, first, offs, end, KIND, N, FULL)
    m += tl.load(coef_ptr + ONE_MINUS_MOMENTUM) * (g - m)
    u = (m + tl.load(coef_ptr + BEHIND) * (g - m)).to(tl.bfloat16)
    if FULL:
        tl.store(to_ptr + offs, u)
    else:
        tl.store(to_ptr + offs, u, mask=offs < end)
    bits = element_bits(offs, tl.load(coef_ptr + 4).to(tl.uint32, bitcast=True))
    store_state(state, scales, first, offs, m, bits, end, KIND, 1, N, FULL)


@triton.jit
def _hinted(value, EVEN_: tl.constexpr):
    """Return an offset or a stride so that the compiler sees what is known of it.

    A hint by `tl.multiple_of` would be lost where this is inlined.
    """
    return value // EVEN * EVEN if EVEN_ else value


@triton.jit
def _tile_ptrs(base_ptr, rows, columns, lead, n_rows, n_columns):
    """Return pointers to elements of a matrix stored by rows, and which of them exist."""
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return base_ptr + rows.to(tl.int64)[:, None] * lead + columns[None, :], mask


@triton.jit
def _load_tile(base_ptr, rows, columns, lead, n_rows, n_columns):
    ptrs, mask = _tile_ptrs(base_ptr, rows, columns, lead, n_rows, n_columns)
    return tl.load(ptrs, mask=mask, other=0.0).to(FACTOR)


@triton.jit
def _inverse_norm(matrix_ptr, numbers_ptr, partials_ptr, small, TILE: tl.constexpr):
    """Return 1 / max(norm, eps), the norm from the sums over tiles on the diagonal."""
    count = (small + TILE - 1) // TILE
    first_ptr = partials_ptr + tl.load(matrix_ptr + PARTIALS)
    squares = 0.0
    for i in range(0, count):
        squares += tl.load(first_ptr + i)
    return 1 / tl.maximum(tl.sqrt_rn(squares), tl.load(numbers_ptr))


@triton.jit
def _muon_gram_kernel(
    x_ptr, a_ptr, matrices_ptr, tiles_ptr, partials_ptr, coefs_ptr, COEFS: tl.constexpr,
    FIRST: tl.constexpr, EVEN_: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles_ptr + 3 * program).to(tl.int64)
    i, j = tl.load(tiles_ptr + 3 * program + 1), tl.load(tiles_ptr + 3 * program + 2)
    matrix_ptr = matrices_ptr + matrix * WIDTH
    small = tl.load(matrix_ptr + SMALL).to(tl.int32)
    large = tl.load(matrix_ptr + LARGE).to(tl.int32)
    x_ptr += _hinted(tl.load(matrix_ptr + OFFSET), EVEN_)
    offs_i = i * TILE + tl.arange(0, TILE)
    offs_j = j * TILE + tl.arange(0, TILE)
    offs_k = tl.arange(0, DEPTH)
    a = tl.zeros((TILE, TILE), dtype=tl.float32)
    large = _hinted(large, EVEN_)
    small = _hinted(small, EVEN_)
    if tl.load(matrix_ptr + TALL) != 0:
        for k in range(0, large, DEPTH):
            x_ki = _load_tile(x_ptr, k + offs_k, offs_i, small, large, small)
            x_kj = _load_tile(x_ptr, k + offs_k, offs_j, small, large, small)
            a = tl.dot(tl.trans(x_ki), x_kj, a)
    else:
        for k in range(0, large, DEPTH):
            x_ik = _load_tile(x_ptr, offs_i, k + offs_k, large, small, large)
            x_jk = _load_tile(x_ptr, offs_j, k + offs_k, large, small, large)
            a = tl.dot(x_ik, tl.trans(x_jk), a)
    if FIRST and i == j:
        diagonal = tl.where(offs_i[:, None] == offs_j[None, :], a, 0.0)
        tl.store(partials_ptr + tl.load(matrix_ptr + PARTIALS) + i, tl.sum(diagonal))
        # From here on the tensor's gradient is X, which has been clipped.
        tensor = tl.load(matrix_ptr + TENSOR)
        tl.store(coefs_ptr + tensor * (BASE + COEFS), 1.0, mask=(i == 0) & (tensor >= 0))
    _store_symmetric(a_ptr, a.to(tl.bfloat16), matrix_ptr, i, j, offs_i, offs_j)


@triton.jit
def _store_symmetric(a_ptr, tile, matrix_ptr, i, j, offs_i, offs_j):
    # With the rows and columns of zeros that fill it up.
    a_ptr += _hinted(tl.load(matrix_ptr + GRAM), True)
    lead = _hinted(tl.load(matrix_ptr + LEAD).to(tl.int32), True)
    ptrs, mask = _tile_ptrs(a_ptr, offs_i, offs_j, lead, lead, lead)
    tl.store(ptrs, tile, mask=mask)
    if i != j:
        ptrs, mask = _tile_ptrs(a_ptr, offs_j, offs_i, lead, lead, lead)
        tl.store(ptrs, tl.trans(tile), mask=mask)


@triton.jit(do_not_specialize=["step"])
def _muon_square_kernel(
    a_ptr, b_ptr, matrices_ptr, tiles_ptr, partials_ptr, numbers_ptr, step, NUMBERS: tl.constexpr,
    FIRST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles_ptr + 3 * program).to(tl.int64)
    i, j = tl.load(tiles_ptr + 3 * program + 1), tl.load(tiles_ptr + 3 * program + 2)
    matrix_ptr, numbers_ptr = matrices_ptr + matrix * WIDTH, numbers_ptr + matrix * NUMBERS
    small = tl.load(matrix_ptr + SMALL).to(tl.int32)
    lead = _hinted(tl.load(matrix_ptr + LEAD).to(tl.int32), True)
    from_ptr = a_ptr + _hinted(tl.load(matrix_ptr + GRAM), True)
    offs_i = i * TILE + tl.arange(0, TILE)
    offs_j = j * TILE + tl.arange(0, TILE)
    offs_k = tl.arange(0, DEPTH)
    square = tl.zeros((TILE, TILE), dtype=tl.float32)
    for k in range(0, small, DEPTH):
        a_ik = _load_tile(from_ptr, offs_i, k + offs_k, lead, lead, lead)
        a_kj = _load_tile(from_ptr, k + offs_k, offs_j, lead, lead, lead)
        square = tl.dot(a_ik, a_kj, square)
    b, c = tl.load(numbers_ptr + 4 + 3 * step), tl.load(numbers_ptr + 5 + 3 * step)
    if FIRST:
        inverse = _inverse_norm(matrix_ptr, numbers_ptr, partials_ptr, small, TILE)
        b, c = b * inverse * inverse, c * inverse * inverse * inverse * inverse
    a = _load_tile(from_ptr, offs_i, offs_j, lead, lead, lead).to(tl.float32)
    tile = (b * a + c * square).to(tl.bfloat16)
    _store_symmetric(b_ptr, tile, matrix_ptr, i, j, offs_i, offs_j)


@triton.jit(do_not_specialize=["step"])
def _muon_product_kernel(
    x_ptr, b_ptr, y_ptr, matrices_ptr, tiles_ptr, partials_ptr, numbers_ptr, step,
    NUMBERS: tl.constexpr, FIRST: tl.constexpr, EVEN_: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles_ptr + 3 * program).to(tl.int64)
    i, j = tl.load(tiles_ptr + 3 * program + 1), tl.load(tiles_ptr + 3 * program + 2)
    matrix_ptr, numbers_ptr = matrices_ptr + matrix * WIDTH, numbers_ptr + matrix * NUMBERS
    small = _hinted(tl.load(matrix_ptr + SMALL).to(tl.int32), EVEN_)
    large = _hinted(tl.load(matrix_ptr + LARGE).to(tl.int32), EVEN_)
    lead = _hinted(tl.load(matrix_ptr + LEAD).to(tl.int32), True)
    b_ptr += _hinted(tl.load(matrix_ptr + GRAM), True)
    offset = _hinted(tl.load(matrix_ptr + OFFSET), EVEN_)
    offs_i = i * TILE + tl.arange(0, TILE)
    offs_j = j * TILE + tl.arange(0, TILE)
    offs_k = tl.arange(0, DEPTH)
    factor = 1.0
    if FIRST:
        factor = _inverse_norm(matrix_ptr, numbers_ptr, partials_ptr, small, TILE)
    weight = tl.load(numbers_ptr + 3 + 3 * step)
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    if tl.load(matrix_ptr + TALL) != 0:
        for k in range(0, small, DEPTH):
            x_jk = _load_tile(x_ptr + offset, offs_j, k + offs_k, small, large, small)
            b_ki = _load_tile(b_ptr, k + offs_k, offs_i, lead, lead, lead)
            product = tl.dot(x_jk, b_ki, product)
        ptrs, mask = _tile_ptrs(x_ptr + offset, offs_j, offs_i, small, large, small)
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        y = (factor * (weight * x + product)).to(tl.bfloat16)
        ptrs, mask = _tile_ptrs(y_ptr + offset, offs_j, offs_i, small, large, small)
        tl.store(ptrs, y, mask=mask)
    else:
        for k in range(0, small, DEPTH):
            b_ik = _load_tile(b_ptr, offs_i, k + offs_k, lead, lead, lead)
            x_kj = _load_tile(x_ptr + offset, k + offs_k, offs_j, large, small, large)
            product = tl.dot(b_ik, x_kj, product)
        ptrs, mask = _tile_ptrs(x_ptr + offset, offs_i, offs_j, large, small, large)
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        y = (factor * (weight * x + product)).to(tl.bfloat16)
        ptrs, mask = _tile_ptrs(y_ptr + offset, offs_i, offs_j, large, small, large)
        tl.store(ptrs, y, mask=mask)


@triton.jit
def _muon_row_moments_kernel(
    x_ptr, matrices_ptr, tiles_ptr, numbers_ptr, norm_ptr, sums_ptr, NUMBERS: tl.constexpr,
    EVEN_: tl.constexpr, ROWS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles_ptr + 3 * program).to(tl.int64)
    matrix_ptr = matrices_ptr + matrix * WIDTH
    small = tl.load(matrix_ptr + SMALL).to(tl.int32)
    large = tl.load(matrix_ptr + LARGE).to(tl.int32)
    tall = tl.load(matrix_ptr + TALL) != 0
    n_rows = tl.where(tall, large, small)
    n_columns = _hinted(tl.where(tall, small, large), EVEN_)
    rows = tl.load(tiles_ptr + 3 * program + 1) * ROWS + tl.arange(0, ROWS)
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    from_ptr = x_ptr + _hinted(tl.load(matrix_ptr + OFFSET), EVEN_)
    for first in range(0, n_columns, BLOCK):
        x = _load_tile(from_ptr, rows, first + offs, n_columns, n_rows, n_columns).to(tl.float32)
        squares += x * x
    square_R = tl.sum(squares, axis=1)
    apply = True
    if norm_ptr is not None:
        apply = is_finite(tl.load(norm_ptr))
    if apply:
        address = tl.load(matrix_ptr + MOMENT)
        v_ptr_R = address.to(tl.pointer_type(tl.float32)) + rows
        v_R = tl.load(v_ptr_R, mask=rows < n_rows, other=1.0)
        mean_R = square_R / n_columns
        v_R += tl.load(numbers_ptr + matrix * NUMBERS + 1) * (mean_R - v_R)
        tl.store(v_ptr_R, v_R, mask=rows < n_rows)
        after_R = square_R / tl.where(v_R > SMALLEST, v_R, SMALLEST)
        tl.store(sums_ptr + 2 * program, tl.sum(square_R))
        tl.store(sums_ptr + 2 * program + 1, tl.sum(tl.where(rows < n_rows, after_R, 0.0)))


@triton.jit
def _muon_row_scale_kernel(
    x_ptr, matrices_ptr, tiles_ptr, numbers_ptr, norm_ptr, sums_ptr, NUMBERS: tl.constexpr,
    EVEN_: tl.constexpr, ROWS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    apply = True
    if norm_ptr is not None:
        apply = is_finite(tl.load(norm_ptr))
    if not apply:
        return
    program = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles_ptr + 3 * program).to(tl.int64)
    matrix_ptr = matrices_ptr + matrix * WIDTH
    small = tl.load(matrix_ptr + SMALL).to(tl.int32)
    large = tl.load(matrix_ptr + LARGE).to(tl.int32)
    tall = tl.load(matrix_ptr + TALL) != 0
    n_rows = tl.where(tall, large, small)
    n_columns = _hinted(tl.where(tall, small, large), EVEN_)
    count = (n_rows + ROWS - 1) // ROWS
    first_ptr = sums_ptr + 2 * tl.load(tiles_ptr + 3 * program + 2).to(tl.int64)
    offs_P = tl.arange(0, BLOCK // 2)
    before = tl.zeros((BLOCK // 2,), dtype=tl.float32)
    after = tl.zeros((BLOCK // 2,), dtype=tl.float32)
    for first in range(0, count, BLOCK // 2):
        mask = first + offs_P < count
        before += tl.load(first_ptr + 2 * (first + offs_P), mask=mask, other=0.0)
        after += tl.load(first_ptr + 2 * (first + offs_P) + 1, mask=mask, other=0.0)
    after_norm = tl.sqrt_rn(tl.sum(after))
    ratio = tl.sqrt_rn(tl.sum(before)) / tl.where(after_norm > SMALLEST, after_norm, SMALLEST)
    ratio *= tl.load(numbers_ptr + matrix * NUMBERS + 2)
    rows = tl.load(tiles_ptr + 3 * program + 1) * ROWS + tl.arange(0, ROWS)
    address = tl.load(matrix_ptr + MOMENT)
    v_ptr_R = address.to(tl.pointer_type(tl.float32)) + rows
    v_R = tl.load(v_ptr_R, mask=rows < n_rows, other=1.0)
    factor_R = ratio / tl.sqrt_rn(tl.where(v_R > SMALLEST, v_R, SMALLEST))
    offs = tl.arange(0, BLOCK)
    to_ptr = x_ptr + _hinted(tl.load(matrix_ptr + OFFSET), EVEN_)
    for first in range(0, n_columns, BLOCK):
        ptrs, mask = _tile_ptrs(to_ptr, rows, first + offs, n_columns, n_rows, n_columns)
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(ptrs, (x * factor_R[:, None]).to(tl.bfloat16), mask=mask)
