# ruff: noqa: ANN001, ANN201, ANN202, SIM108
"""The Triton kernels of rotary attention, forward and backward, over the schedule of the packed layout.

Each program takes one item of the schedule (a tile of rows of one head) and walks through its runs: the full ones
without any mask, then the masked ones. Keys are rotated once, by a kernel of their own; queries as they are loaded;
gradients are rotated back before they are stored. The softmax is online and in base 2 (FlashAttention-2,
arXiv 2307.08691, algorithms 1 and 2). Nothing is added atomically: one program writes each result, in one order.

Letters: T queries, S new keys, M rows of memory, H heads, D head dimension, BD = D padded to a power of two, N items,
BM x BN a block of scores (queries x keys).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# No kernel is compiled anew for a number that is 1 or a multiple of 16: the audit then sees what runs.
NUMBERS = [
    "T", "H", "rows", "memory", "x_row", "x_head", "q_row", "q_head", "g_row", "g_head", "o_row", "o_head",
    "v_row", "v_head", "d_row", "d_head", "mk_row", "mk_head", "mv_row", "mv_head",
]  # fmt: skip

# Addresses. A tile of a tensor [rows, H, D] is read at pointer + row * row stride + column. Row offsets are 64-bit:
# tokens x heads x head dimension passes 2**31. Strides come in units of UNIT elements, so that the compiler knows that
# they are multiples of it and moves as many elements at once.


@triton.jit
def _stride(units, UNIT: tl.constexpr):
    return tl.cast(units, tl.int64) * UNIT


@triton.jit
def _columns(D: tl.constexpr, BD: tl.constexpr):
    """The first D of BD columns."""
    column = tl.arange(0, BD)
    return column, column < D


@triton.jit
def _halves(D: tl.constexpr, BD: tl.constexpr):
    """The same with each half of D at the beginning of a half of BD, so that gradients can be rotated in registers."""
    place = tl.arange(0, BD)
    if D == BD:
        column = place
    else:
        column = place // (BD // 2) * (D // 2) + place % (BD // 2)
    return column, place % (BD // 2) < D // 2


@triton.jit
def _load(at, row_inside, column_inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, zero outside; ROWS and COLUMNS tell which of the two conditions have to be looked at."""
    if ROWS and COLUMNS:
        tile = tl.load(at, mask=row_inside[:, None] & column_inside[None, :], other=0.0)
    elif ROWS:
        tile = tl.load(at, mask=row_inside[:, None], other=0.0)
    elif COLUMNS:
        tile = tl.load(at, mask=column_inside[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _rotate_into(at, base, stride, cos, sin, row, inside, D: tl.constexpr, BD: tl.constexpr):
    """Write rows of ``base``, rotated, to ``at`` [rows, 1]: memory of this program alone, which it then reads again.

    In registers the halves would have to be joined; and Hopper's matrix instructions get their left operand from shared
    memory only where it comes from a load, else anew from registers for each block of keys.
    """
    half: tl.constexpr = D // 2
    index = tl.arange(0, BD // 2)
    mask = inside[:, None] & (index < half)[None, :]
    a = tl.load(base + row[:, None].to(tl.int64) * stride + index[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + row[:, None].to(tl.int64) * stride + half + index[None, :], mask=mask, other=0.0).to(tl.float32)
    angle = row[:, None].to(tl.int64) * half + index[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    tl.store(at + index[None, :], (a * c - b * s).to(base.dtype.element_ty), mask=mask)
    tl.store(at + half + index[None, :], (b * c + a * s).to(base.dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def _store_rotated_back(base, x, cos, sin, row, inside, stride, D: tl.constexpr, BD: tl.constexpr):
    """Rotate ``x`` [rows, BD] fp32, whose columns ``_halves`` placed, by the negated angles and store it."""
    half: tl.constexpr = D // 2
    a, b = x.reshape(x.shape[0], 2, BD // 2).permute(0, 2, 1).split()
    index = tl.arange(0, BD // 2)
    mask = inside[:, None] & (index < half)[None, :]
    angle = row[:, None].to(tl.int64) * half + index[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    at = base + row[:, None].to(tl.int64) * stride + index[None, :]
    tl.store(at, (a * c + b * s).to(base.dtype.element_ty), mask=mask)
    tl.store(at + half, (b * c - a * s).to(base.dtype.element_ty), mask=mask)


# Rotation


@triton.jit(do_not_specialize=NUMBERS)
def rotate(
    x, cos, sin, rotated,
    x_row: tl.int64, x_head: tl.int64, rows: tl.int64, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``x`` [T, H, D] rotated into ``rotated``, contiguous; a row here is one head of one token."""
    half: tl.constexpr = D // 2
    number = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    token, head = number // H, number % H
    index = tl.arange(0, BD // 2)
    mask = (number < rows)[:, None] & (index < half)[None, :]
    c = tl.load(cos + token[:, None] * half + index[None, :], mask=mask, other=0.0)
    s = tl.load(sin + token[:, None] * half + index[None, :], mask=mask, other=0.0)
    at = x + (token * _stride(x_row, UNIT) + head * _stride(x_head, UNIT))[:, None] + index[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=mask, other=0.0).to(tl.float32)
    at = rotated + number[:, None] * D + index[None, :]
    tl.store(at, (a * c - b * s).to(rotated.dtype.element_ty), mask=mask)
    tl.store(at + half, (b * c + a * s).to(rotated.dtype.element_ty), mask=mask)


# What a run's keys and values are


@triton.jit
def _source(
    low, k, v, memory_k, memory_v, v_row, v_head, mk_row, mk_head, mv_row, mv_head,
    memory, head, H, D: tl.constexpr, UNIT: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """Where the run that begins at key ``low`` lies: keys, values, their row strides, and the number of row 0.

    A run lies in the memory or among the new keys, never in both.
    """
    key_row = tl.cast(H, tl.int64) * D
    keys = k + tl.cast(head, tl.int64) * D
    values = v + head * _stride(v_head, UNIT)
    value_row = _stride(v_row, UNIT)
    first = memory
    if MEMORY:
        cached = low < memory
        keys = tl.where(cached, memory_k + head * _stride(mk_head, UNIT), keys)
        values = tl.where(cached, memory_v + head * _stride(mv_head, UNIT), values)
        key_row = tl.where(cached, _stride(mk_row, UNIT), key_row)
        value_row = tl.where(cached, _stride(mv_row, UNIT), value_row)
        first = tl.where(cached, 0, memory)
    return keys, values, key_row, value_row, first


@triton.jit
def _rows(tile, SIZE: tl.constexpr, AGAIN: tl.constexpr):
    """The rows of a tile, and which of them exist; AGAIN reads them anew, so that no registers keep them meanwhile."""
    row = tl.load(tile, volatile=AGAIN) + tl.arange(0, SIZE)
    return row, row < tl.load(tile + 1, volatile=AGAIN)


@triton.jit
def _four(base, row, inside, MASKED: tl.constexpr):
    """The columns of rows of ``base`` [T, 4]; zero outside.

    They are read as one tile, not as four vectors: Triton 3.6 copies short vectors once for each thread that asks.
    """
    at = base + row[:, None].to(tl.int64) * 4 + tl.arange(0, 4)[None, :]
    four = _load(at, inside, inside, MASKED, False)
    even, odd = tl.split(four.reshape(row.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _sees(own_low, own_high, prefix_low, prefix_high, key):
    return ((own_low <= key) & (key < own_high)) | ((prefix_low <= key) & (key < prefix_high))


# Forward


@triton.jit
def _attend(
    q, acc, peak, total, own_low, own_high, prefix_low, prefix_high,
    keys, values, key_row, value_row, low, high, first, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over keys ``low`` to ``high``: row maxima, row sums and outputs, all in fp32.

    Scores are in base 2: ``scale`` holds log2(e).
    """
    key = tl.arange(0, BN)
    column, column_inside = _columns(D, BD)
    keys += key[:, None].to(tl.int64) * key_row + column[None, :]
    values += key[:, None].to(tl.int64) * value_row + column[None, :]
    for start in range(low, high, BN):
        row, inside = tl.cast(start - first, tl.int64), key < high - start
        k = _load(keys + row * key_row, inside, column_inside, MASKED, D != BD)  # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        if MASKED:
            j = start + key[None, :]
            seen = _sees(own_low[:, None], own_high[:, None], prefix_low[:, None], prefix_high[:, None], j)
            s = tl.where(seen & inside[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0), not exp2(-inf + inf)
            level = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            level = higher
        p = tl.exp2(s * scale - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _load(values + row * value_row, inside, column_inside, MASKED, D != BD)  # [BN, BD]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # [BM, BD]
        peak = higher
    return acc, peak, total


@triton.jit
def _finish(acc, peak, total):
    """Normalised output and log-sum-exp in base 2; rows that saw nothing: zeros, and minus infinity."""
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    return acc / total[:, None], tl.where(blind, float("-inf"), peak + tl.log2(total))


@triton.jit
def _places(out, row, item, head, H, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr):
    """Where the rows of an item lie in the log-sum-exp [T, H] and the output [T, H, D].

    With SPLIT in this item's own part of them, [N, H, BM] and [N, H, BM, BD].
    """
    if SPLIT:
        place = (item.to(tl.int64) * H + head) * BM + tl.arange(0, BM)
        at = out + place[:, None] * BD
    else:
        place = row.to(tl.int64) * H + head
        at = out + place[:, None] * D
    return place, at


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    q, k, v, memory_k, memory_v, q_cos, q_sin, out, lse, tiles, runs, bounds,
    q_row: tl.int64, q_head: tl.int64, v_row: tl.int64, v_head: tl.int64,
    mk_row: tl.int64, mk_head: tl.int64, mv_row: tl.int64, mv_head: tl.int64,
    scale, memory, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, MEMORY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One item: its rows of the output and log-sum-exp [T, H]; with SPLIT its own part of them, for ``combine``.

    ``k`` [S, H, D] is rotated already and contiguous. Masked runs are walked through in steps of STEP keys.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    tile = tiles + item * 6
    row, inside = _rows(tile, BM, False)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)

    place, at = _places(out, row, item, head, H, D, BD, BM, SPLIT)
    own = at.to(tl.pointer_type(q.dtype.element_ty))  # the queries go where the output will be
    _rotate_into(own, q + head * _stride(q_head, UNIT), _stride(q_row, UNIT), q_cos, q_sin, row, inside, D, BD)
    column, column_inside = _columns(D, BD)
    x = _load(own + column[None, :], inside, column_inside, True, D != BD)  # [BM, BD]
    acc = tl.zeros((BM, BD), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for run in range(first_run, first_masked):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        keys, values, key_row, value_row, first = _source(
            low, k, v, memory_k, memory_v, v_row, v_head, mk_row, mk_head, mv_row, mv_head, memory, head, H,
            D, UNIT, MEMORY,
        )  # fmt: skip
        acc, peak, total = _attend(
            x, acc, peak, total, 0, 0, 0, 0,
            keys, values, key_row, value_row, low, high, first, scale, D, BD, BN, False,
        )  # fmt: skip
    row, inside = _rows(tile, BM, True)
    own_low, own_high, prefix_low, prefix_high = _four(bounds, row, inside, True)
    for run in range(first_masked, last_run):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        keys, values, key_row, value_row, first = _source(
            low, k, v, memory_k, memory_v, v_row, v_head, mk_row, mk_head, mv_row, mv_head, memory, head, H,
            D, UNIT, MEMORY,
        )  # fmt: skip
        acc, peak, total = _attend(
            x, acc, peak, total, own_low, own_high, prefix_low, prefix_high,
            keys, values, key_row, value_row, low, high, first, scale, D, BD, STEP, True,
        )  # fmt: skip

    acc, logarithm = _finish(acc, peak, total)
    row, inside = _rows(tile, BM, True)
    place, at = _places(out, row, item, head, H, D, BD, BM, SPLIT)
    if not SPLIT:
        logarithm /= LOG2_E
    tl.store(at + column[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    tl.store(lse + place, logarithm, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def combine(
    parts, parts_lse, out, lse, tiles, pieces, order, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows of one tile from the parts that its items computed, in the order of their keys."""
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(pieces + tile), tl.load(pieces + tile + 1)
    row, inside = _rows(tiles + tl.load(order + begin) * 6, BM, False)
    column, column_inside = _columns(D, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for piece in range(begin, end):
        place = (tl.load(order + piece).to(tl.int64) * H + head) * BM + tl.arange(0, BM)
        x = _load(parts + place[:, None] * BD + column[None, :], inside, column_inside, True, D != BD)  # [BM, BD]
        weight = tl.load(parts_lse + place, mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, weight)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(weight - level), tl.exp2(peak - level)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        peak = higher
    acc, logarithm = _finish(acc, peak, total)
    place = row.to(tl.int64) * H + head
    at = out + place[:, None] * D + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    tl.store(lse + place, logarithm / LOG2_E, mask=inside)


@triton.jit
def _pull_queries(
    q, g, acc, level, delta, own_low, own_high, prefix_low, prefix_high,
    keys, values, key_row, value_row, low, high, first, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to ``acc`` [BM, BD] what keys ``low`` to ``high`` give to the gradient of the rotated queries."""
    key = tl.arange(0, BN)
    key_column, key_column_inside = _halves(D, BD)
    value_column, value_column_inside = _columns(D, BD)
    keys += key[:, None].to(tl.int64) * key_row + key_column[None, :]
    values += key[:, None].to(tl.int64) * value_row + value_column[None, :]
    for start in range(low, high, BN):
        row, inside = tl.cast(start - first, tl.int64), key < high - start
        k = _load(keys + row * key_row, inside, key_column_inside, MASKED, D != BD)  # [BN, BD]
        v = _load(values + row * value_row, inside, value_column_inside, MASKED, D != BD)  # [BN, BD]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
        p = tl.exp2(s * scale - level[:, None])
        if MASKED:
            j = start + key[None, :]
            seen = _sees(own_low[:, None], own_high[:, None], prefix_low[:, None], prefix_high[:, None], j)
            p = tl.where(seen & inside[None, :], p, 0.0)
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")  # [BM, BN]
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=NUMBERS)
def backward_queries(
    grad, q, k, v, memory_k, memory_v, out, lse, q_cos, q_sin, dq, rotated, sums, tiles, runs, bounds,
    g_row: tl.int64, g_head: tl.int64, q_row: tl.int64, q_head: tl.int64, o_row: tl.int64, o_head: tl.int64,
    v_row: tl.int64, v_head: tl.int64, d_row: tl.int64, d_head: tl.int64,
    mk_row: tl.int64, mk_head: tl.int64, mv_row: tl.int64, mv_head: tl.int64,
    scale, factor, memory, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D] of one item, and what ``backward_keys`` reads: the rotated queries [T, H, D] and ``sums`` [H, T, 4].

    Of these the first column is the log-sum-exp in base 2, infinite where a row sees nothing (its probabilities are
    then exp2(-inf)), the second the sum of grad * out. ``scale`` holds log2(e), ``factor`` does not.
    """
    item, head = tl.program_id(0), tl.program_id(1)
    tile = tiles + item * 6
    row, inside = _rows(tile, BM, False)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    wide = row.to(tl.int64)
    line = tl.cast(H, tl.int64) * D  # from token to token where a tensor is contiguous

    column, column_inside = _columns(D, BD)
    g = _load(
        grad + head * _stride(g_head, UNIT) + wide[:, None] * _stride(g_row, UNIT) + column[None, :],
        inside, column_inside, True, D != BD,
    )  # fmt: skip
    o = _load(
        out + head * _stride(o_head, UNIT) + wide[:, None] * _stride(o_row, UNIT) + column[None, :],
        inside, column_inside, True, D != BD,
    )  # fmt: skip
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    level = tl.load(lse + wide * H + head, mask=inside, other=float("-inf")) * LOG2_E
    level = tl.where(level == float("-inf"), float("inf"), level)
    at = sums + (tl.cast(head, tl.int64) * T + wide) * 4
    tl.store(at, level, mask=inside)
    tl.store(at + 1, delta, mask=inside)

    at = rotated + tl.cast(head, tl.int64) * D + wide[:, None] * line
    _rotate_into(at, q + head * _stride(q_head, UNIT), _stride(q_row, UNIT), q_cos, q_sin, row, inside, D, BD)
    key_column, key_column_inside = _halves(D, BD)
    x = _load(at + key_column[None, :], inside, key_column_inside, True, D != BD)  # [BM, BD]

    acc = tl.zeros((BM, BD), tl.float32)
    for run in range(first_run, first_masked):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        keys, values, key_row, value_row, first = _source(
            low, k, v, memory_k, memory_v, v_row, v_head, mk_row, mk_head, mv_row, mv_head, memory, head, H,
            D, UNIT, MEMORY,
        )  # fmt: skip
        acc = _pull_queries(
            x, g, acc, level, delta, 0, 0, 0, 0,
            keys, values, key_row, value_row, low, high, first, scale, D, BD, BN, False,
        )  # fmt: skip
    row, inside = _rows(tile, BM, True)
    own_low, own_high, prefix_low, prefix_high = _four(bounds, row, inside, True)
    for run in range(first_masked, last_run):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        keys, values, key_row, value_row, first = _source(
            low, k, v, memory_k, memory_v, v_row, v_head, mk_row, mk_head, mv_row, mv_head, memory, head, H,
            D, UNIT, MEMORY,
        )  # fmt: skip
        acc = _pull_queries(
            x, g, acc, level, delta, own_low, own_high, prefix_low, prefix_high,
            keys, values, key_row, value_row, low, high, first, scale, D, BD, STEP, True,
        )  # fmt: skip
    row, inside = _rows(tile, BM, True)
    at = dq + head * _stride(d_head, UNIT)
    _store_rotated_back(at, acc * factor, q_cos, q_sin, row, inside, _stride(d_row, UNIT), D, BD)


# Backward, keys


@triton.jit
def _pull_keys(
    k, v, dk, dv, key, queries, grads, sums, bounds, q_row, g_row, low, high, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to ``dk`` and ``dv`` [BN, BD] what queries ``low`` to ``high`` give; scores are transposed, [BN, BM]."""
    query = tl.arange(0, BM)
    key_column, key_column_inside = _halves(D, BD)
    value_column, value_column_inside = _columns(D, BD)
    queries += query[:, None].to(tl.int64) * q_row + key_column[None, :]
    grads += query[:, None].to(tl.int64) * g_row + value_column[None, :]
    for start in range(low, high, BM):
        row, inside = tl.cast(start, tl.int64), query < high - start
        q = _load(queries + row * q_row, inside, key_column_inside, MASKED, D != BD)  # [BM, BD]
        g = _load(grads + row * g_row, inside, value_column_inside, MASKED, D != BD)  # [BM, BD]
        level, delta, _, _ = _four(sums, start + query, inside, MASKED)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BN, BM]
        p = tl.exp2(s * scale - level[None, :])
        if MASKED:
            own_low, own_high, prefix_low, prefix_high = _four(bounds, start + query, inside, True)
            seen = _sees(own_low[None, :], own_high[None, :], prefix_low[None, :], prefix_high[None, :], key[:, None])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")  # [BN, BM]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def backward_keys(
    grad, rotated, k, v, sums, k_cos, k_sin, dk, dv, tiles, runs, bounds,
    g_row: tl.int64, g_head: tl.int64, v_row: tl.int64, v_head: tl.int64, d_row: tl.int64, d_head: tl.int64,
    scale, factor, memory, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """dk and dv [S, H, D] of one tile of new keys, from the queries that see them."""
    item, head = tl.program_id(0), tl.program_id(1)
    tile = tiles + item * 6
    row, inside = _rows(tile, BN, False)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    wide = row.to(tl.int64)
    line = tl.cast(H, tl.int64) * D
    start = tl.cast(head, tl.int64) * D

    key_column, key_column_inside = _halves(D, BD)
    column, column_inside = _columns(D, BD)
    x = _load(k + start + wide[:, None] * line + key_column[None, :], inside, key_column_inside, True, D != BD)
    y = _load(
        v + head * _stride(v_head, UNIT) + wide[:, None] * _stride(v_row, UNIT) + column[None, :],
        inside, column_inside, True, D != BD,
    )  # fmt: skip
    queries, grads, g_line = rotated + start, grad + head * _stride(g_head, UNIT), _stride(g_row, UNIT)
    sums += tl.cast(head, tl.int64) * T * 4
    key = memory + row  # its number in the bounds

    key_acc = tl.zeros((BN, BD), tl.float32)
    value_acc = tl.zeros((BN, BD), tl.float32)
    for run in range(first_run, first_masked):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        key_acc, value_acc = _pull_keys(
            x, y, key_acc, value_acc, key, queries, grads, sums, bounds, line, g_line, low, high, scale,
            D, BD, BM, False,
        )  # fmt: skip
    for run in range(first_masked, last_run):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        key_acc, value_acc = _pull_keys(
            x, y, key_acc, value_acc, key, queries, grads, sums, bounds, line, g_line, low, high, scale,
            D, BD, STEP, True,
        )  # fmt: skip
    row, inside = _rows(tile, BN, True)
    start, line = head * _stride(d_head, UNIT), _stride(d_row, UNIT)
    at = dv + start + row[:, None].to(tl.int64) * line + column[None, :]
    tl.store(at, value_acc.to(dv.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    _store_rotated_back(dk + start, key_acc * factor, k_cos, k_sin, row, inside, line, D, BD)
