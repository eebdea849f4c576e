# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels of log-probabilities.

For half precision, matrix products whose tiles of logits never leave the registers: they are reduced, or turned into
gradients, at once. For single precision, passes over a tile of logits in memory, between products that cuBLAS computes.

Matrices are tuples (data, row stride). ``partials`` are tops, totals, weighted and indices, each [blocks of columns,
rows]. Row strides of tiles in memory are multiples of 16, so that whole vectors are moved; memory between ``columns``
and the stride belongs to the tile and holds arbitrary values. Row offsets are 64-bit.

Letters: C model, BM x BN a tile of logits (rows x columns), BK the step along C.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-104.0)  # exp of less is 0

# Arguments that do not lead to another compilation: numbers that are 1 or a multiple of 16, slices from an odd row on.
NUMBERS = ["rows", "columns", "first"]
ROWS = ["targets", "largest", "log_sum", "logprobs", "entropy", "best", "upstream"]
ANY = [*NUMBERS, *ROWS]

# Products whose logits stay in registers


@triton.jit
def _block(rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The numbers of a program's block of rows and of its block of columns.

    GROUP blocks of rows proceed along all columns together: concurrent programs share states and weights in the cache.
    """
    program, group_size = tl.program_id(0), tl.cdiv(columns, BN) * GROUP
    first, number = program // group_size * GROUP, program % group_size
    size = tl.minimum(tl.cdiv(rows, BM) - first, GROUP)
    return first + number % size, number // size


@triton.jit
def _product(
    hidden, weight, row, column, rows, columns, C: tl.constexpr,
    UNIT: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 logits from ``row`` and ``column`` on, arbitrary beyond the last ones.

    With TMA the operands are descriptors. Else their strides are in units of UNIT elements, times 16, and the last row
    or column is read again instead of a mask.
    """
    x = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for begin in range(0, C, BK):
            x = tl.dot(hidden.load([row, begin]), weight.load([column, begin]).T, x)
    else:
        k = tl.arange(0, BK)
        h_row = tl.minimum(row + tl.arange(0, BM), rows - 1)[:, None].to(tl.int64)
        w_row = tl.minimum(column + tl.arange(0, BN), columns - 1)[:, None].to(tl.int64)
        h_at = hidden[0] + h_row * (tl.cast(hidden[1], tl.int64) // 16 * UNIT) + k[None, :]
        w_at = weight[0] + w_row * (tl.cast(weight[1], tl.int64) // 16 * UNIT) + k[None, :]
        for begin in range(0, C, BK):
            if C % BK == 0:
                h = tl.load(h_at)  # [BM, BK]
                w = tl.load(w_at)  # [BN, BK]
            else:
                inside = (k < C - begin)[None, :]
                h = tl.load(h_at, mask=inside, other=0.0)
                w = tl.load(w_at, mask=inside, other=0.0)
            x = tl.dot(h, tl.trans(w), x)
            h_at += BK
            w_at += BK
    return x


@triton.jit(do_not_specialize=ANY)
def reduce_tile(
    hidden, weight, targets, logprobs, partials, shares, rows, columns,
    STATISTICS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Partial results of each row of a tile for ``combine``, and the targets' logits in ``logprobs``.

    They are the largest logit m and sum exp(x - m); with STATISTICS also sum exp(x - m) (x - m) and the first column of
    the largest. With SHARES all exp(x - m) are stored too, for ``gradient_shares``.
    """
    tops, totals, weighted, indices = partials
    row_block, block = _block(rows, columns, BM, BN, GROUP)
    row, first = row_block * BM + tl.arange(0, BM), block * BN
    column, inside = tl.arange(0, BN), row < rows
    target = _within(targets, row, inside, first, BN)
    x = _product(hidden, weight, row_block * BM, first, rows, columns, C, UNIT, TMA, BM, BN, BK)
    if tl.max(target, 0) >= 0:
        chosen = tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        tl.store(logprobs + row, chosen, mask=target >= 0)
    if first + BN > columns:
        x = tl.where((first + column < columns)[None, :], x, float("-inf"))
    top = tl.max(x, 1)
    at = block.to(tl.int64) * rows + row
    if STATISTICS:
        index = tl.min(tl.where(x == top[:, None], column[None, :], BN - 1), 1)
        tl.store(indices + at, tl.minimum(first + index, columns - 1), mask=inside)
    origin = tl.where(top > float("-inf"), top, 0.0)  # nothing but minus infinity (or NaN)
    shifted = x - origin[:, None]
    e = tl.exp2(shifted * LOG2_E)
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, tl.sum(e, 1), mask=inside)
    if STATISTICS:
        # Clamped: 0 times minus infinity would be NaN, and such logits have no part in the entropy.
        tl.store(weighted + at, tl.sum(e * tl.maximum(shifted, LOWEST), 1), mask=inside)
    if SHARES:
        data, stride = shares
        address = data + row[:, None].to(tl.int64) * stride + (first + column)[None, :]
        mask = inside[:, None] & (first + column < stride)[None, :]
        tl.store(address, e.to(data.dtype.element_ty), mask=mask)


@triton.jit
def _within(targets, row, inside, first, BN: tl.constexpr):
    """Targets relative to ``first``; -1 for those outside of the BN columns from there on."""
    target = tl.load(targets + row, mask=inside, other=-1)
    here = (target >= first) & (target < first + BN)
    return tl.where(here, target - first, -1).to(tl.int32)


@triton.jit(do_not_specialize=ANY)
def combine(
    partials, targets, largest, log_sum, logprobs, entropy, best, rows, columns,
    STATISTICS: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Results of BR rows from the partial results of ``reduce_tile``, BLOCKS blocks at a time, in order."""
    tops, totals, weighted, indices = partials
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside, blocks = row < rows, tl.cdiv(columns, BN)
    row = tl.minimum(row, rows - 1)  # results of the repeated last one are not stored
    m, total = tl.full([BR], float("-inf"), tl.float32), tl.zeros([BR], tl.float32)
    mean, index = tl.zeros([BR], tl.float32), tl.zeros([BR], tl.int32)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        at = block[:, None].to(tl.int64) * rows + row[None, :]
        mask = (block < blocks)[:, None]
        tops_here = tl.load(tops + at, mask=mask, other=float("-inf"))  # [BLOCKS, BR]
        sums = tl.load(totals + at, mask=mask, other=0.0)
        top = tl.max(tops_here, 0)
        new = tl.maximum(m, top)
        origin = tl.where(new > float("-inf"), new, 0.0)
        shift, shifts = m - origin, tops_here - origin[None, :]
        factor, factors = tl.exp(shift), tl.exp(shifts)
        if STATISTICS:
            means = tl.load(weighted + at, mask=mask, other=0.0)
            changed = factor * (mean + tl.maximum(shift, LOWEST) * total)
            mean = changed + tl.sum(factors * (means + tl.maximum(shifts, LOWEST) * sums), 0)
            indices_here = tl.load(indices + at, mask=mask, other=0)
            new_index = tl.min(tl.where(tops_here == top[None, :], indices_here, columns - 1), 0)
            index = tl.where(top > m, new_index, index)
        total = total * factor + tl.sum(factors * sums, 0)
        m = new
    target = tl.load(targets + row)
    chosen = tl.load(logprobs + row)
    chosen = tl.where((target >= 0) & (target < columns), chosen, float("nan"))
    # The sum is at least 1, as it holds exp(0), and the target's logit is not above the largest: never above 0.
    tl.store(largest + row, m, mask=inside)
    tl.store(log_sum + row, tl.log(total), mask=inside)
    tl.store(logprobs + row, (chosen - m) - tl.log(total), mask=inside)
    if STATISTICS:
        tl.store(entropy + row, tl.log(total) - mean / total, mask=inside)
        tl.store(best + row, index.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=ANY)
def gradient_tile(
    hidden, weight, changes, targets, largest, log_sum, upstream, rows, columns, first,
    C: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """changes = upstream * (onehot(target) - softmax) of a tile whose columns begin at token ``first``."""
    row_block, block = _block(rows, columns, BM, BN, GROUP)
    row, within = row_block * BM + tl.arange(0, BM), tl.arange(0, BN)
    column, inside = block * BN + within, row < rows
    target = _within(targets, row, inside, first + block * BN, BN)
    m, log_total = tl.load(largest + row, mask=inside, other=0.0), tl.load(log_sum + row, mask=inside, other=0.0)
    g = tl.load(upstream + row, mask=inside, other=0.0)
    x = _product(hidden, weight, row_block * BM, block * BN, rows, columns, C, UNIT, TMA, BM, BN, BK)
    p = tl.exp2((x - m[:, None]) * LOG2_E - (log_total * LOG2_E)[:, None])
    if tl.max(target, 0) >= 0:
        p -= tl.where(within[None, :] == target[:, None], 1.0, 0.0)
    data, stride = changes
    address = data + row[:, None].to(tl.int64) * stride + column[None, :]
    mask = inside[:, None] & (column < stride)[None, :]
    tl.store(address, (-g[:, None] * p).to(data.dtype.element_ty), mask=mask)


# Passes over logits in memory, or over shares


@triton.jit(do_not_specialize=ANY)
def gradient_shares(
    shares, tops, targets, largest, log_sum, rows, columns,
    BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """onehot(target) - softmax in place of the shares of ``reduce_tile``, BLOCKS blocks of a row."""
    row = tl.program_id(0)  # there can be more rows than the second dimension of a grid permits
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BN + tl.arange(0, BN)[None, :]  # [BLOCKS, BN]
    data, stride = shares
    address = data + row.to(tl.int64) * stride + column
    target = tl.load(targets + row)
    top = tl.load(tops + block.to(tl.int64) * rows + row, mask=block * BN < columns, other=float("-inf"))
    factor = tl.exp((top - tl.load(largest + row)) - tl.load(log_sum + row))
    p = tl.load(address, mask=column < stride, other=0.0).to(tl.float32) * factor[:, None]
    y = tl.where(column == target, 1.0, 0.0) - p
    tl.store(address, y.to(data.dtype.element_ty), mask=column < stride)


@triton.jit(do_not_specialize=ANY)
def reduce_rows(
    logits, targets, largest, log_sum, logprobs, entropy, best, columns, first,
    START: tl.constexpr, LAST: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a tile of logits to its rows' results (tiles.Engine.reduce); one program per row."""
    row = tl.program_id(0)
    data, stride = logits
    base = data + row.to(tl.int64) * stride
    if START:
        m, total, weighted, index = float("-inf"), 0.0, 0.0, 0
        chosen = float("nan")  # the result for a target outside of the vocabulary
    else:
        m, total, chosen = tl.load(largest + row), tl.load(log_sum + row), tl.load(logprobs + row)
        if STATISTICS:
            weighted, index = tl.load(entropy + row), tl.load(best + row).to(tl.int32)
        else:
            weighted, index = 0.0, 0
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        # Whole vectors up to the stride, which belongs to the tile; columns beyond the last one are masked after that.
        x = tl.load(base + column, mask=column < stride, other=float("-inf"))
        x = tl.where(column < columns, x, float("-inf"))
        top = tl.max(x, 0)
        new = tl.maximum(m, top)
        origin = tl.where(new > float("-inf"), new, 0.0)  # nothing but minus infinity (or NaN) so far
        shifted, shift = x - origin, m - origin
        e, factor = tl.exp(shifted), tl.exp(shift)
        if STATISTICS:
            # Clamped: 0 times minus infinity would be NaN, and such logits have no part in the entropy.
            changed = factor * (weighted + tl.where(shift < LOWEST, LOWEST, shift) * total)
            weighted = changed + tl.sum(e * tl.where(shifted < LOWEST, LOWEST, shifted), 0)
            new_index = first + tl.min(tl.where(x == top, column, columns - 1), 0)
            index = tl.where(top > m, new_index, index)
        total = total * factor + tl.sum(e, 0)
        m = new
    target = tl.load(targets + row) - first
    here = (target >= 0) & (target < columns)
    chosen = tl.where(here, tl.load(base + target, mask=here, other=0.0), chosen)
    if STATISTICS:
        tl.store(best + row, index.to(tl.int64))
    if LAST:
        # The sum is at least 1, as it holds exp(0), and the target's logit is not above the largest: never above 0.
        if STATISTICS:
            weighted = tl.log(total) - weighted / total
        total = tl.log(total)
        chosen = (chosen - m) - total
    tl.store(largest + row, m)
    tl.store(log_sum + row, total)
    tl.store(logprobs + row, chosen)
    if STATISTICS:
        tl.store(entropy + row, weighted)


@triton.jit(do_not_specialize=ANY)
def gradient_rows(
    logits, targets, largest, log_sum, upstream, columns, first, BLOCK: tl.constexpr
):  # fmt: skip
    """upstream * (onehot(target) - softmax) of a tile, in place."""
    row, column = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    data, stride = logits
    address, inside = data + row.to(tl.int64) * stride + column, column < stride
    target, g = tl.load(targets + row) - first, tl.load(upstream + row)
    x = tl.load(address, mask=inside, other=0.0)
    x = tl.where(column < columns, x, float("-inf"))
    p = tl.exp((x - tl.load(largest + row)) - tl.load(log_sum + row))
    y = g * (tl.where(column == target, 1.0, 0.0) - p)
    tl.store(address, y, mask=inside)
