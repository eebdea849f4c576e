# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels of the gated activation (SwiGLU, arXiv 2002.05202): each element is read and written once.

Letters: T tokens, F width of the result, BT x BF a tile of it. Inputs have row strides; results are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16.
NUMBERS = ["T", "rows_per_program"]


@triton.jit
def _sigmoid(x):
    root = tl.exp2(-tl.abs(x) * 0.7213475204444817)
    e = root * root  # e^-|x|, no more than 1; a GPU's exp2 takes results below 1e-38 for 0
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _load(start, column, F: tl.constexpr, WANTED: tl.constexpr = True):
    """Columns [BF] of a row of x and of the gate; zeros unless WANTED."""
    x, gate = tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    if WANTED:
        x = tl.load(start + column, mask=column < F, other=0.0).to(tl.float32)
        gate = tl.load(start + F + column, mask=column < F, other=0.0).to(tl.float32)
    return x, gate


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    projected, bias, out, projected_row, T,
    F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out [T, F] = x silu(gate) with [x | gate] = projected [T, 2F] + bias; one program per tile, row-major."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row, column = tile * BT + tl.arange(0, BT), block * BF + tl.arange(0, BF)
    inside = (row < T)[:, None] & (column < F)[None, :]
    x_bias, gate_bias = _load(bias, column, F, BIAS)
    at = projected + row[:, None].to(tl.int64) * projected_row + column[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32) + x_bias[None, :]
    gate = tl.load(at + F, mask=inside, other=0.0).to(tl.float32) + gate_bias[None, :]
    result = x * (gate * _sigmoid(gate))
    tl.store(out + row[:, None].to(tl.int64) * F + column[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store(start, column, to_x, to_gate, F: tl.constexpr):
    tl.store(start + column, to_x.to(start.dtype.element_ty), mask=column < F)
    tl.store(start + F + column, to_gate.to(start.dtype.element_ty), mask=column < F)


@triton.jit(do_not_specialize=NUMBERS)
def backward(
    grad, projected, bias, d_projected, sums, grad_row, projected_row, T, rows_per_program,
    F: tl.constexpr, BF: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """d_projected [T, 2F] if STORE, and its sums over the rows of each program [programs, 2F] if SUMS.

    Program (block of columns, run of ``rows_per_program`` rows) walks down its rows and keeps the sums in registers.
    """
    column, begin = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1) * rows_per_program
    x_bias, gate_bias = _load(bias, column, F, BIAS)
    x_sums, gate_sums = tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    for row in range(begin, min(begin + rows_per_program, T)):
        at = tl.cast(row, tl.int64)
        x, gate = _load(projected + at * projected_row, column, F)
        d = tl.load(grad + at * grad_row + column, mask=column < F, other=0.0).to(tl.float32)
        x += x_bias
        gate += gate_bias
        s = _sigmoid(gate)
        to_x = d * (gate * s)
        to_gate = d * x * (s * (1.0 + gate * (1.0 - s)))  # d times silu's derivative first could overflow
        if STORE:
            _store(d_projected + at * (2 * F), column, to_x, to_gate, F)
        if SUMS:
            x_sums += to_x
            gate_sums += to_gate
    if SUMS:
        _store(sums + tl.program_id(1).to(tl.int64) * (2 * F), column, x_sums, gate_sums, F)
