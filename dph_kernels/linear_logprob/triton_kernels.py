# ruff: noqa: ANN001, ANN201, ANN202
"""The Triton kernels of log-probabilities.

For half precision, matrix products whose tiles of logits never leave the registers: what follows from them is taken at
once. For single precision, passes over a tile of logits in memory, between products that others compute.

Rows lie so many ``units`` of UNIT elements apart that the compiler knows that they are aligned and moves whole vectors;
row offsets are 64-bit. A row's end in a tile in memory, beyond ``columns``, is memory of ours that holds anything.

Letters: C model, BM x BN a tile of logits (rows x columns), BK the step along C.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-104.0)  # exp of less is 0

# No kernel is compiled anew for a number that is 1 or a multiple of 16, or for slices that begin at odd rows.
NUMBERS = ["units", "hidden_units", "weight_units", "rows", "columns", "first"]
ROWS = ["targets", "largest", "log_sum", "logprobs", "entropy", "best", "upstream"]
ANY = [*NUMBERS, *ROWS]

# Products whose logits stay in registers


@triton.jit
def _place(rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The numbers of a program's block of rows and of its block of columns.

    GROUP blocks of rows go through all columns together: what runs at one time shares states and weights in the cache.
    """
    program, across = tl.program_id(0), tl.cdiv(columns, BN) * GROUP
    first, place = program // across * GROUP, program % across
    size = tl.minimum(tl.cdiv(rows, BM) - first, GROUP)
    return first + place % size, place // size


@triton.jit
def _product(
    hidden, weight, hidden_units, weight_units, row, column, rows, columns, C: tl.constexpr,
    UNIT: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 logits from ``row`` and ``column`` on; beyond the last ones they mean nothing.

    TMA: the operands come as descriptors. Else the last row or column is read again, so that nothing needs a mask.
    """
    x = tl.zeros([BM, BN], tl.float32)
    if TMA:
        for begin in range(0, C, BK):
            x = tl.dot(hidden.load([row, begin]), weight.load([column, begin]).T, x)
    else:
        k = tl.arange(0, BK)
        h_row = tl.minimum(row + tl.arange(0, BM), rows - 1)[:, None].to(tl.int64)
        w_row = tl.minimum(column + tl.arange(0, BN), columns - 1)[:, None].to(tl.int64)
        h_at = hidden + h_row * (hidden_units * UNIT) + k[None, :]
        w_at = weight + w_row * (weight_units * UNIT) + k[None, :]
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
    hidden, weight, targets, logprobs, tops, totals, weighted, indices, shares,
    hidden_units: tl.int64, weight_units: tl.int64, units, rows, columns,
    STATISTICS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr, SHARES_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What each row of a tile has to say, for ``combine``: [blocks of columns, rows]; targets' logits in ``logprobs``.

    The largest logit m and sum exp(x - m); with STATISTICS, sum exp(x - m) (x - m) and the largest's first column.
    With SHARES_UNIT all exp(x - m) are kept too, as ``shares``, for ``gradient_shares``.
    """
    row_block, block = _place(rows, columns, BM, BN, GROUP)
    row, first = row_block * BM + tl.arange(0, BM), block * BN
    column, inside = tl.arange(0, BN), row < rows
    target = _within(targets, row, inside, first, BN)
    x = _product(
        hidden, weight, hidden_units, weight_units, row_block * BM, first, rows, columns, C, UNIT, TMA, BM, BN, BK
    )
    if tl.max(target, 0) >= 0:
        chosen = tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        tl.store(logprobs + row, chosen, mask=target >= 0)
    if first + BN > columns:
        x = tl.where((first + column < columns)[None, :], x, float("-inf"))
    top = tl.max(x, 1)
    at = block.to(tl.int64) * rows + row
    if STATISTICS:
        found = tl.min(tl.where(x == top[:, None], column[None, :], BN - 1), 1)
        tl.store(indices + at, tl.minimum(first + found, columns - 1), mask=inside)
    origin = tl.where(top > float("-inf"), top, 0.0)  # nothing but minus infinity (or NaN)
    shifted = x - origin[:, None]
    e = tl.exp2(shifted * LOG2_E)
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, tl.sum(e, 1), mask=inside)
    if STATISTICS:
        # Clamped: 0 times minus infinity would be NaN, and such logits have no part in the entropy.
        tl.store(weighted + at, tl.sum(e * tl.maximum(shifted, LOWEST), 1), mask=inside)
    if SHARES_UNIT:
        stride = units * SHARES_UNIT
        place = shares + row[:, None].to(tl.int64) * stride + (first + column)[None, :]
        tl.store(place, e.to(shares.dtype.element_ty), mask=inside[:, None] & (first + column < stride)[None, :])


@triton.jit
def _within(targets, row, inside, first, BN: tl.constexpr):
    """Targets by their place among BN columns from ``first`` on; -1 where they are not among them."""
    target = tl.load(targets + row, mask=inside, other=-1)
    here = (target >= first) & (target < first + BN)
    return tl.where(here, target - first, -1).to(tl.int32)


@triton.jit(do_not_specialize=ANY)
def combine(
    tops, totals, weighted, indices, targets, largest, log_sum, logprobs, entropy, best, rows, columns,
    STATISTICS: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The results of BR rows from what ``reduce_tile`` left, BLOCKS blocks at a time, in their order."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    inside, blocks = row < rows, tl.cdiv(columns, BN)
    row = tl.minimum(row, rows - 1)  # what comes of the last one again is not kept
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
            places = tl.load(indices + at, mask=mask, other=0)
            found = tl.min(tl.where(tops_here == top[None, :], places, columns - 1), 0)
            index = tl.where(top > m, found, index)
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
    hidden, weight, changes, targets, largest, log_sum, upstream,
    hidden_units: tl.int64, weight_units: tl.int64, units, rows, columns, first,
    C: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr, CHANGES_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """upstream * (onehot(target) - softmax) of a tile whose columns begin at token ``first``."""
    row_block, block = _place(rows, columns, BM, BN, GROUP)
    row, place = row_block * BM + tl.arange(0, BM), tl.arange(0, BN)
    column, inside, stride = block * BN + place, row < rows, units * CHANGES_UNIT
    target = _within(targets, row, inside, first + block * BN, BN)
    m, log_total = tl.load(largest + row, mask=inside, other=0.0), tl.load(log_sum + row, mask=inside, other=0.0)
    g = tl.load(upstream + row, mask=inside, other=0.0)
    x = _product(
        hidden, weight, hidden_units, weight_units, row_block * BM, block * BN, rows, columns, C, UNIT, TMA, BM, BN, BK
    )
    p = tl.exp2((x - m[:, None]) * LOG2_E - (log_total * LOG2_E)[:, None])
    if tl.max(target, 0) >= 0:
        p -= tl.where(place[None, :] == target[:, None], 1.0, 0.0)
    at = changes + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, (-g[:, None] * p).to(changes.dtype.element_ty), mask=inside[:, None] & (column < stride)[None, :])


# Passes over logits in memory, or over what was made of them


@triton.jit(do_not_specialize=ANY)
def gradient_shares(
    shares, tops, targets, largest, log_sum, units, rows, columns,
    UNIT: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """onehot(target) - softmax in the place of what ``reduce_tile`` kept, BLOCKS blocks of a row."""
    row, stride = tl.program_id(0), units * UNIT  # rows can be more than a grid has in its second dimension
    block, place = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, BN)
    column = block[:, None] * BN + place[None, :]  # [BLOCKS, BN]
    at = shares + row.to(tl.int64) * stride + column
    target = tl.load(targets + row)
    top = tl.load(tops + block.to(tl.int64) * rows + row, mask=block * BN < columns, other=float("-inf"))
    factor = tl.exp((top - tl.load(largest + row)) - tl.load(log_sum + row))
    p = tl.load(at, mask=column < stride, other=0.0).to(tl.float32) * factor[:, None]
    y = tl.where(column == target, 1.0, 0.0) - p
    tl.store(at, y.to(shares.dtype.element_ty), mask=column < stride)


@triton.jit(do_not_specialize=ANY)
def reduce_rows(
    logits, targets, largest, log_sum, logprobs, entropy, best, units, columns, first,
    START: tl.constexpr, LAST: tl.constexpr, STATISTICS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take a tile of logits into its rows' results (tiles.Engine.reduce); one program for each row."""
    row, stride = tl.program_id(0), units * UNIT
    base = logits + row.to(tl.int64) * stride
    if START:
        m, total, weighted, index = float("-inf"), 0.0, 0.0, 0
        chosen = float("nan")  # what is left of a target outside of the vocabulary
    else:
        m, total, chosen = tl.load(largest + row), tl.load(log_sum + row), tl.load(logprobs + row)
        if STATISTICS:
            weighted, index = tl.load(entropy + row), tl.load(best + row).to(tl.int32)
        else:
            weighted, index = 0.0, 0
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        # A row's end, up to its stride, is memory of ours: read in whole vectors, and set to nothing.
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
            found = first + tl.min(tl.where(x == top, column, columns - 1), 0)
            index = tl.where(top > m, found, index)
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
    logits, targets, largest, log_sum, upstream, units, columns, first,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """upstream * (onehot(target) - softmax) of a tile, in its place."""
    row, stride = tl.program_id(1), units * UNIT
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset, inside = row.to(tl.int64) * stride + column, column < stride
    target, g = tl.load(targets + row) - first, tl.load(upstream + row)
    x = tl.load(logits + offset, mask=inside, other=0.0)
    x = tl.where(column < columns, x, float("-inf"))
    p = tl.exp((x - tl.load(largest + row)) - tl.load(log_sum + row))
    y = g * (tl.where(column == target, 1.0, 0.0) - p)
    tl.store(logits + offset, y, mask=inside)
