# ruff: noqa: ANN001, ANN201
"""The Triton kernels of log-probabilities: the passes over a tile of fp32 logits between the matrix products.

Rows of a tile lie ``units * UNIT`` elements apart, so that the compiler knows that they are aligned and reads whole
vectors; row offsets are 64-bit. A row's end beyond ``columns`` is memory of ours that holds anything.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-104.0)  # exp of less is 0

# No kernel is compiled anew for a number that is 1 or a multiple of 16, or for slices that begin at odd rows.
NUMBERS = ["units", "columns", "first"]
ROWS = ["targets", "largest", "log_sum"]


@triton.jit(do_not_specialize=[*ROWS, "logprobs", "entropy", "best", *NUMBERS])
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


@triton.jit(do_not_specialize=[*ROWS, "upstream", *NUMBERS])
def gradient_rows(
    logits, changes, targets, largest, log_sum, upstream, units, columns, first,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """upstream * (onehot(target) - softmax) of a tile; ``changes`` may be ``logits``."""
    row, stride = tl.program_id(1), units * UNIT
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset, inside = row.to(tl.int64) * stride + column, column < stride
    target, g = tl.load(targets + row) - first, tl.load(upstream + row)
    x = tl.load(logits + offset, mask=inside, other=0.0)
    x = tl.where(column < columns, x, float("-inf"))
    p = tl.exp((x - tl.load(largest + row)) - tl.load(log_sum + row))
    y = g * (tl.where(column == target, 1.0, 0.0) - p)
    tl.store(changes + offset, y.to(changes.dtype.element_ty), mask=inside)
