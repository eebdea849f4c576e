# ruff: noqa: ANN001, ANN201
"""Triton kernels of residual connection and LayerNorm: each row is read and written once per pass.

Letters: T rows, C columns, BLOCK the power of 2 that holds a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16.
NUMBERS = ["T", "rows_per_program"]


@triton.jit
def normalise(
    x, update, weight, bias, total, normed, moments, x_row, update_row, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, UPDATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One row: total = x + update, rounded, if UPDATE; normed is its LayerNorm, moments are mean and 1 / deviation."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < C
    # [BLOCK]
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    if UPDATE:
        added = tl.load(update + row * update_row + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row * C + column, value, mask=inside)
    value = value.to(tl.float32)
    average = tl.sum(value, 0) / C
    centred = tl.where(inside, value - average, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    result = centred * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * C + column, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(moments + row, average)
    tl.store(moments + tl.num_programs(0) + row, scale)


@triton.jit(do_not_specialize=NUMBERS)
def gradients(
    d_total, d_normed, total, weight, moments, d_x, partials, T, rows_per_program,
    C: tl.constexpr, BLOCK: tl.constexpr, SKIP: tl.constexpr, NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``rows_per_program`` neighbouring rows: d_x, plus d_total if SKIP, and partials [2, programs, C].

    The latter are the rows' sums for weight and bias. d_total, d_normed and total are tuples (data, row stride).
    """
    d_total, d_total_row = d_total
    d_normed, d_normed_row = d_normed
    total, total_row = total
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < C
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    to_weight, to_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, T)):
        row = tl.cast(i, tl.int64)
        # [BLOCK]
        grad = tl.load(d_normed + row * d_normed_row + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + row * total_row + column, mask=inside, other=0.0).to(tl.float32)
        if NEED_X and SKIP:  # loaded before the sums, which all warps wait for
            skipped = tl.load(d_total + row * d_total_row + column, mask=inside, other=0.0).to(tl.float32)
        average, scale = tl.load(moments + row), tl.load(moments + T + row)
        unit = tl.where(inside, (value - average) * scale, 0.0)
        if NEED_X:
            g = grad * factor
            flat, slope = tl.sum(g, 0) / C, tl.sum(g * unit, 0) / C
            result = (g - flat - unit * slope) * scale
            if SKIP:
                result += skipped
            tl.store(d_x + row * C + column, result.to(d_x.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            to_weight += grad * unit
            to_bias += grad
    if NEED_SUMS:
        at = program.to(tl.int64) * C + column
        tl.store(partials + at, to_weight, mask=inside)
        tl.store(partials + tl.num_programs(0).to(tl.int64) * C + at, to_bias, mask=inside)
