# ruff: noqa: ANN001, ANN201
"""Triton kernels of residual connection and LayerNorm or RMSNorm: each row is read and written once per pass.

Letters: T tokens, H rows of each (HEADS), C columns, ROWS and BLOCK the rows and columns of a program's tile; BLOCK is
the power of 2 that holds a row. Rows that are read have a stride per token and one per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16.
NUMBERS = ["rows", "rows_per_program"]


@triton.jit
def offsets(row, token_stride, head_stride, HEADS: tl.constexpr):
    """Offsets of rows [ROWS] of a tensor with these strides."""
    if HEADS == 1:
        return row * token_stride
    return row // HEADS * token_stride + row % HEADS * head_stride


@triton.jit(do_not_specialize=NUMBERS[:1])
def normalise(
    x, update, weight, bias, total, normed, moments, rows, x_token, x_head, update_token, update_head, eps,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RMS: tl.constexpr, UPDATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: total = x + update, rounded, if UPDATE; normed is its norm.

    moments are mean and 1 / deviation [2, rows], or 1 / root mean square [1, rows] if RMS.
    """
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    exists = row < rows
    inside = column < C if ROWS == 1 else exists[:, None] & (column < C)
    x_row, at = offsets(row, x_token, x_head, HEADS)[:, None], row[:, None] * C + column
    # [ROWS, BLOCK]
    value = tl.load(x + x_row + column, mask=inside, other=0.0)
    if UPDATE:
        update_row = offsets(row, update_token, update_head, HEADS)[:, None]
        added = tl.load(update + update_row + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask=inside)
    value = value.to(tl.float32)
    if not RMS:
        average = tl.sum(value, 1) / C
        value = tl.where(inside, value - average[:, None], 0.0)
        tl.store(moments + row, average, mask=exists)
        moments += rows
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    result = value * scale[:, None] * tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(moments + row, scale, mask=exists)


@triton.jit(do_not_specialize=NUMBERS)
def gradients(
    d_total, d_normed, total, weight, moments, d_x, partials, rows, rows_per_program,
    C: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RMS: tl.constexpr, SKIP: tl.constexpr, NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``rows_per_program`` neighbouring rows: d_x, plus d_total if SKIP, and partials [2, programs, C].

    The latter are the rows' sums for weight and bias, [1, programs, C] for the weight alone if RMS. d_total, d_normed
    and total are tuples (data, token stride, head stride).
    """
    d_total, d_total_token, d_total_head = d_total
    d_normed, d_normed_token, d_normed_head = d_normed
    total, total_token, total_head = total
    program, column = tl.program_id(0), tl.arange(0, BLOCK)[None, :]
    factor = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    to_weight, to_bias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    begin = program * rows_per_program
    for i in range(begin, tl.minimum(begin + rows_per_program, rows), ROWS):
        row = tl.cast(i, tl.int64) + tl.arange(0, ROWS)
        exists = row < rows
        inside = column < C if ROWS == 1 else exists[:, None] & (column < C)
        d_normed_row = offsets(row, d_normed_token, d_normed_head, HEADS)[:, None]
        total_row = offsets(row, total_token, total_head, HEADS)[:, None]
        # [ROWS, BLOCK]
        grad = tl.load(d_normed + d_normed_row + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + total_row + column, mask=inside, other=0.0).to(tl.float32)
        if NEED_X and SKIP:  # loaded before the sums, which all warps wait for
            d_total_row = offsets(row, d_total_token, d_total_head, HEADS)[:, None]
            skipped = tl.load(d_total + d_total_row + column, mask=inside, other=0.0).to(tl.float32)
        if not RMS:
            value -= tl.load(moments + row, mask=exists, other=0.0)[:, None]
        scale = tl.load((moments if RMS else moments + rows) + row, mask=exists, other=0.0)[:, None]
        unit = tl.where(inside, value * scale, 0.0)
        if NEED_X:
            g = grad * factor
            slope = tl.sum(g * unit, 1)[:, None] / C
            if not RMS:
                g -= tl.sum(g, 1)[:, None] / C
            result = (g - unit * slope) * scale
            if SKIP:
                result += skipped
            tl.store(d_x + row[:, None] * C + column, result.to(d_x.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            to_weight += grad * unit
            to_bias += grad
    if NEED_SUMS:
        at = program.to(tl.int64) * C + tl.arange(0, BLOCK)
        inside = tl.arange(0, BLOCK) < C
        tl.store(partials + at, tl.sum(to_weight, 0), mask=inside)
        if not RMS:
            tl.store(partials + tl.num_programs(0).to(tl.int64) * C + at, tl.sum(to_bias, 0), mask=inside)
