# ruff: noqa: ANN001, ANN201, ANN202, SIM108
"""Triton kernels of rotary attention, forward and backward, over the schedule of a packed layout.

Each program computes one item of the schedule (a tile of rows of one head) and loops over its runs: the full runs
without a mask, then the masked ones. Keys are rotated once, by a kernel of their own; queries when they are loaded;
gradients are rotated back before they are stored. The softmax is online and in base 2 (FlashAttention-2,
arXiv 2307.08691, algorithms 1 and 2). There are no atomic additions: one program writes each result, in one order.

If GROUP query heads share a key head, a tile of queries contains a pack of PACK of these heads, each query in PACK
adjacent rows, so that a key is read once for all of them. SHARE = GROUP / PACK packs have the same key head. A program
for a tile of keys loops over the heads of the group.

Letters: T queries, S new keys, M rows of memory, H query heads, K key heads, D head dimension, BD = D padded to a power
of two, N items, BM x BN a block of scores (rows of queries x keys).

Tuples among the arguments: a tensor [rows, H, D] of any strides is (data, row stride, head stride); ``memory`` is such
a tuple of keys and one of values; ``tables`` are cosines and sines [rows, D/2]; ``schedule`` are tiles [N, 6],
runs [R, 2] and the bounds of all queries [T, 4].
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MINUS_ZERO = tl.constexpr(-(2**31))  # the bits of -0.0 as an integer

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16: the audit compiles what runs.
NUMBERS = ["rows", "T", "M", "H"]

# Addresses. A tile of a tensor [rows, H, D] is read at pointer + row * row stride + column. Row offsets are 64-bit:
# tokens x heads x head dimension can exceed 2**31. Strides are stored in units of UNIT elements, so that the compiler
# can prove that they are multiples of UNIT and moves as many elements at once, and times 16, as all strides in tuples.


@triton.jit
def _stride(units, UNIT: tl.constexpr):
    return tl.cast(units, tl.int64) // 16 * UNIT


@triton.jit
def _head(x, head, UNIT: tl.constexpr):
    """Address of the first row of a head."""
    return x[0] + head * _stride(x[2], UNIT)


@triton.jit
def _tile(x, head, row, column, UNIT: tl.constexpr, PACK: tl.constexpr = 1):
    """Addresses [rows, columns] of a tile; ``row`` is 64-bit, ``head`` is one, or with PACK > 1 that of each row."""
    start = _head(x, head, UNIT)
    if PACK > 1:
        start = start[:, None]
    return start + row[:, None] * _stride(x[1], UNIT) + column[None, :]


@triton.jit
def _columns(D: tl.constexpr, BD: tl.constexpr):
    """Columns [BD], and whether each is one of the D columns of the tensor."""
    column = tl.arange(0, BD)
    return column, column < D


@triton.jit
def _halves(D: tl.constexpr, BD: tl.constexpr):
    """The same with each half of D at the beginning of a half of BD, so that gradients can be rotated in registers."""
    padded = tl.arange(0, BD)
    if D == BD:
        column = padded
    else:
        column = padded // (BD // 2) * (D // 2) + padded % (BD // 2)
    return column, padded % (BD // 2) < D // 2


@triton.jit
def _load(address, row_inside, column_inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile, zero outside; ROWS and COLUMNS are the conditions that are not always true."""
    if ROWS and COLUMNS:
        tile = tl.load(address, mask=row_inside[:, None] & column_inside[None, :], other=0.0)
    elif ROWS:
        tile = tl.load(address, mask=row_inside[:, None], other=0.0)
    elif COLUMNS:
        tile = tl.load(address, mask=column_inside[None, :], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def _angles(tables, row, mask, index, HALF: tl.constexpr):
    """Cosines and sines [rows, BD / 2] of rows; ``row`` [rows, 1] is 64-bit."""
    cos, sin = tables
    angle = row * HALF + index[None, :]
    return tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)


@triton.jit
def _rotate_into(
    address, x, head, tables, row, inside, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """Write a tile of ``x``, rotated, to ``address`` [rows, 1]: memory that only this program then reads.

    In registers the halves would have to be joined; and Hopper's matrix instructions read their left operand from
    shared memory only if it comes from a load, else from registers again for each block of keys.
    """
    half: tl.constexpr = D // 2
    index, wide = tl.arange(0, BD // 2), row[:, None].to(tl.int64)
    mask = inside[:, None] & (index < half)[None, :]
    source = _tile(x, head, row.to(tl.int64), index, UNIT, PACK)
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    c, s = _angles(tables, wide, mask, index, half)
    tl.store(address + index[None, :], (a * c - b * s).to(x[0].dtype.element_ty), mask=mask)
    tl.store(address + half + index[None, :], (b * c + a * s).to(x[0].dtype.element_ty), mask=mask)
    tl.debug_barrier()


@triton.jit
def _store_rotated_back(
    x, head, value, tables, row, inside, D: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr,
    PACK: tl.constexpr = 1,
):  # fmt: skip
    """Store ``value`` [rows, BD] fp32, in the columns of ``_halves`` and rotated by the negated angles, in ``x``."""
    half: tl.constexpr = D // 2
    a, b = value.reshape(value.shape[0], 2, BD // 2).permute(0, 2, 1).split()
    index, wide = tl.arange(0, BD // 2), row[:, None].to(tl.int64)
    mask = inside[:, None] & (index < half)[None, :]
    c, s = _angles(tables, wide, mask, index, half)
    address = _tile(x, head, row.to(tl.int64), index, UNIT, PACK)
    tl.store(address, (a * c + b * s).to(x[0].dtype.element_ty), mask=mask)
    tl.store(address + half, (b * c - a * s).to(x[0].dtype.element_ty), mask=mask)


# Rotation


@triton.jit(do_not_specialize=NUMBERS)
def rotate(
    x, tables, rotated, rows: tl.int64, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``x`` [T, H, D] rotated into ``rotated``, contiguous; ``rows`` = T * H, a row is one head of one token."""
    half: tl.constexpr = D // 2
    number = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    token, head = number // H, number % H
    index = tl.arange(0, BD // 2)
    mask = (number < rows)[:, None] & (index < half)[None, :]
    c, s = _angles(tables, token[:, None], mask, index, half)
    source = x[0] + (token * _stride(x[1], UNIT) + head * _stride(x[2], UNIT))[:, None] + index[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    address = rotated + number[:, None] * D + index[None, :]
    tl.store(address, (a * c - b * s).to(rotated.dtype.element_ty), mask=mask)
    tl.store(address + half, (b * c + a * s).to(rotated.dtype.element_ty), mask=mask)


# Tiles and runs of the schedule


@triton.jit
def _source(
    low, k, v, memory, M, head, K, D: tl.constexpr, UNIT: tl.constexpr, MEMORY: tl.constexpr
):  # fmt: skip
    """Source of the run that begins at key ``low``: keys, values, their row strides, and the number of row 0.

    A run is either in the memory or among the new keys.
    """
    key_row = tl.cast(K, tl.int64) * D
    keys = k + tl.cast(head, tl.int64) * D
    values = _head(v, head, UNIT)
    value_row = _stride(v[1], UNIT)
    first = M
    if MEMORY:
        cached = low < M
        keys = tl.where(cached, _head(memory[0], head, UNIT), keys)
        values = tl.where(cached, _head(memory[1], head, UNIT), values)
        key_row = tl.where(cached, _stride(memory[0][1], UNIT), key_row)
        value_row = tl.where(cached, _stride(memory[1][1], UNIT), value_row)
        first = tl.where(cached, 0, M)
    return keys, values, key_row, value_row, first


@triton.jit
def _rows(tile, SIZE: tl.constexpr, AGAIN: tl.constexpr, PACK: tl.constexpr = 1):
    """Queries or keys [SIZE] of a tile's rows, PACK rows each, and whether they exist.

    AGAIN reloads them, so that they occupy no registers meanwhile.
    """
    index = tl.arange(0, SIZE)
    if PACK > 1:
        index = index // PACK
    row = tl.load(tile, volatile=AGAIN) + index
    return row, row < tl.load(tile + 1, volatile=AGAIN)


@triton.jit
def _query_heads(pack, SIZE: tl.constexpr, PACK: tl.constexpr):
    """Query head of the pack, or with PACK > 1 that of each row [SIZE]."""
    head = pack
    if PACK > 1:
        head = pack * PACK + tl.arange(0, SIZE) % PACK
    return head


@triton.jit
def _four(base, row, inside, MASKED: tl.constexpr):
    """The four columns of rows of ``base`` [T, 4]; zero outside.

    They are loaded as one tile, not as four vectors: Triton 3.6 copies short vectors once per thread that reads them.
    """
    address = base + row[:, None].to(tl.int64) * 4 + tl.arange(0, 4)[None, :]
    four = _load(address, inside, inside, MASKED, False)
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
    q, acc, peak, total, bounds, source, low, high, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Continue the softmax over keys ``low`` to ``high``: outputs, row maxima and row sums, all in fp32.

    Scores are in base 2: ``scale`` contains log2(e). ``bounds`` are read only if MASKED.
    """
    own_low, own_high, prefix_low, prefix_high = bounds
    keys, values, key_row, value_row, first = source
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
        level = tl.where(higher == float("-inf"), 0.0, higher)  # exp2(-inf - 0) without a score, not exp2(-inf + inf)
        p = tl.exp2(s * scale - level[:, None])
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _load(values + row * value_row, inside, column_inside, MASKED, D != BD)  # [BN, BD]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")  # [BM, BD]
        peak = higher
    return acc, peak, total


@triton.jit
def _finish(acc, peak, total, blind):
    """Normalised output and log-sum-exp in base 2; of ``blind`` rows, zeros and minus infinity.

    Both are NaN for a row of which all visible scores are minus infinity: its total is 0.
    """
    total = tl.where(blind, 1.0, total)
    logarithm = tl.where(total == 0.0, float("nan"), peak + tl.log2(total))
    return tl.where(blind[:, None], 0.0, acc / total[:, None]), tl.where(blind, float("-inf"), logarithm)


@triton.jit
def _blind(bounds, row, inside):
    """Whether each row sees no key."""
    own_low, own_high, prefix_low, prefix_high = _four(bounds, row, inside, True)
    return (own_low >= own_high) & (prefix_low >= prefix_high)


@triton.jit
def _destination(
    out, row, item, pack, H, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PACK: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Offsets [BM] into the log-sum-exp [T, H], and addresses [BM, 1] in the output [T, H, D], of an item's rows.

    With SPLIT in the item's own partial results [N, H / PACK, BM] and [N, H / PACK, BM, BD].
    """
    if SPLIT:
        offset = (item.to(tl.int64) * (H // PACK) + pack) * BM + tl.arange(0, BM)
        address = out + offset[:, None] * BD
    else:
        offset = row.to(tl.int64) * H + _query_heads(pack, BM, PACK)
        address = out + offset[:, None] * D
    return offset, address


@triton.jit(do_not_specialize=NUMBERS)
def forward(
    q, k, v, memory, tables, out, lse, schedule, scale, M, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, PACK: tl.constexpr, SHARE: tl.constexpr, MEMORY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One item: its rows of the output and log-sum-exp [T, H]; with SPLIT partial results for ``combine``.

    ``k`` [S, K, D] is rotated already and contiguous. Masked runs are computed in steps of STEP keys.
    """
    item, pack = tl.program_id(0), tl.program_id(1)
    head, K = pack // SHARE, H // (PACK * SHARE)  # of the keys
    tiles, runs, bounds = schedule
    tile = tiles + item * 6
    row, inside = _rows(tile, BM, False, PACK)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)

    offset, address = _destination(out, row, item, pack, H, D, BD, BM, PACK, SPLIT)
    rotated = address.to(tl.pointer_type(q[0].dtype.element_ty))  # the output's memory holds the queries until then
    _rotate_into(rotated, q, _query_heads(pack, BM, PACK), tables, row, inside, D, BD, UNIT, PACK)
    column, column_inside = _columns(D, BD)
    x = _load(rotated + column[None, :], inside, column_inside, True, D != BD)  # [BM, BD]
    acc = tl.zeros((BM, BD), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for run in range(first_run, first_masked):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        source = _source(low, k, v, memory, M, head, K, D, UNIT, MEMORY)
        acc, peak, total = _attend(x, acc, peak, total, (0, 0, 0, 0), source, low, high, scale, D, BD, BN, False)
    row, inside = _rows(tile, BM, True, PACK)
    own_bounds = _four(bounds, row, inside, True)
    for run in range(first_masked, last_run):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        source = _source(low, k, v, memory, M, head, K, D, UNIT, MEMORY)
        acc, peak, total = _attend(x, acc, peak, total, own_bounds, source, low, high, scale, D, BD, STEP, True)

    row, inside = _rows(tile, BM, True, PACK)
    if SPLIT:
        blind = total == 0.0  # nothing to add; ``combine`` decides
    else:
        blind = _blind(bounds, row, inside)
    acc, logarithm = _finish(acc, peak, total, blind)
    offset, address = _destination(out, row, item, pack, H, D, BD, BM, PACK, SPLIT)
    tl.store(address + column[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    tl.store(lse + offset, logarithm, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def combine(
    parts, parts_lse, out, lse, schedule, pieces, order, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Rows of one tile from the partial results of its items, in the order of their keys."""
    tile, pack = tl.program_id(0), tl.program_id(1)
    tiles, _, bounds = schedule
    begin, end = tl.load(pieces + tile), tl.load(pieces + tile + 1)
    row, inside = _rows(tiles + tl.load(order + begin) * 6, BM, False, PACK)
    column, column_inside = _columns(D, BD)
    acc = tl.zeros((BM, BD), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for piece in range(begin, end):
        offset = (tl.load(order + piece).to(tl.int64) * (H // PACK) + pack) * BM + tl.arange(0, BM)
        x = _load(parts + offset[:, None] * BD + column[None, :], inside, column_inside, True, D != BD)  # [BM, BD]
        weight = tl.load(parts_lse + offset, mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, weight)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(weight - level), tl.exp2(peak - level)
        acc = acc * shrink[:, None] + x * weight[:, None]
        total = total * shrink + weight
        peak = higher
    acc, logarithm = _finish(acc, peak, total, _blind(bounds, row, inside))
    offset = row.to(tl.int64) * H + _query_heads(pack, BM, PACK)
    address = out + offset[:, None] * D + column[None, :]
    tl.store(address, acc.to(out.dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    tl.store(lse + offset, logarithm, mask=inside)


# Backward, queries


@triton.jit
def _pull_queries(
    q, g, acc, level, delta, bounds, source, low, high, scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to ``acc`` [BM, BD] the part of the rotated queries' gradient that keys ``low`` to ``high`` contribute."""
    own_low, own_high, prefix_low, prefix_high = bounds
    keys, values, key_row, value_row, first = source
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
        if MASKED:  # NaN and infinities of dp and delta are only for the keys that the query sees
            ds = tl.where(seen & inside[None, :], ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=NUMBERS)
def backward_queries(
    grad, q, k, v, memory, out, lse, tables, dq, rotated, sums, schedule, scales, M, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, PACK: tl.constexpr, SHARE: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D] of one item, and what ``backward_keys`` reads: the rotated queries [T, H, D] and ``sums`` [H, T, 4].

    The first column of ``sums`` is the log-sum-exp in base 2, infinite for rows without a visible key (their
    probabilities are then exp2(-inf)), the second the sum of grad * out. ``scales`` are the scale of the scores with
    and without log2(e).
    """
    item, pack = tl.program_id(0), tl.program_id(1)
    head, K = pack // SHARE, H // (PACK * SHARE)  # of the keys
    query_head = _query_heads(pack, BM, PACK)
    tiles, runs, bounds = schedule
    tile = tiles + item * 6
    scale, factor = scales
    row, inside = _rows(tile, BM, False, PACK)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    wide = row.to(tl.int64)
    offset = wide * H + query_head

    column, column_inside = _columns(D, BD)
    g = _load(_tile(grad, query_head, wide, column, UNIT, PACK), inside, column_inside, True, D != BD)  # [BM, BD]
    o = _load(_tile(out, query_head, wide, column, UNIT, PACK), inside, column_inside, True, D != BD)  # [BM, BD]
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    level = tl.load(lse + offset, mask=inside, other=float("-inf"))
    level = tl.where(level == float("-inf"), float("inf"), level)
    own_sums = sums + (tl.cast(query_head, tl.int64) * T + wide) * 4
    tl.store(own_sums, level, mask=inside)
    tl.store(own_sums + 1, delta, mask=inside)

    address = rotated + offset[:, None] * D
    _rotate_into(address, q, query_head, tables, row, inside, D, BD, UNIT, PACK)
    key_column, key_column_inside = _halves(D, BD)
    x = _load(address + key_column[None, :], inside, key_column_inside, True, D != BD)  # [BM, BD]

    acc = tl.zeros((BM, BD), tl.float32)
    for run in range(first_run, first_masked):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        source = _source(low, k, v, memory, M, head, K, D, UNIT, MEMORY)
        acc = _pull_queries(x, g, acc, level, delta, (0, 0, 0, 0), source, low, high, scale, D, BD, BN, False)
    row, inside = _rows(tile, BM, True, PACK)
    own_bounds = _four(bounds, row, inside, True)
    for run in range(first_masked, last_run):
        low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
        source = _source(low, k, v, memory, M, head, K, D, UNIT, MEMORY)
        acc = _pull_queries(x, g, acc, level, delta, own_bounds, source, low, high, scale, D, BD, STEP, True)
    row, inside = _rows(tile, BM, True, PACK)
    query_head = _query_heads(pack, BM, PACK)
    _store_rotated_back(dq, query_head, acc * factor, tables, row, inside, D, BD, UNIT, PACK)


# Backward, keys


@triton.jit
def _pull_keys(
    k, v, dk, dv, key, queries, grads, sums, bounds, q_row, g_row, low, high, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to ``dk`` and ``dv`` [BN, BD] the parts of queries ``low`` to ``high``; scores are transposed, [BN, BM]."""
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
            p = tl.where(seen, p, -0.0)  # exp2 never gives -0, which marks hidden pairs: ``seen`` would need registers
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(g), input_precision="ieee")  # [BN, BM]
        ds = p * (dp - delta[None, :])
        if MASKED:
            ds = tl.where(p.to(tl.int32, bitcast=True) == MINUS_ZERO, 0.0, ds)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def backward_keys(
    grad, rotated, k, v, sums, tables, dk, dv, schedule, scales, M, T, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dk and dv [S, K, D] of one tile of new keys, from the queries that see them, head by head of the group."""
    item, head = tl.program_id(0), tl.program_id(1)
    tiles, runs, bounds = schedule
    tile = tiles + item * 6
    scale, factor = scales
    row, inside = _rows(tile, BN, False)
    first_run, first_masked, last_run = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    wide = row.to(tl.int64)
    key_line = tl.cast(H // GROUP, tl.int64) * D  # strides between the tokens of contiguous tensors
    query_line = tl.cast(H, tl.int64) * D

    key_column, key_column_inside = _halves(D, BD)
    column, column_inside = _columns(D, BD)
    # [BN, BD]
    keys = k + tl.cast(head, tl.int64) * D + wide[:, None] * key_line + key_column[None, :]
    x = _load(keys, inside, key_column_inside, True, D != BD)
    y = _load(_tile(v, head, wide, column, UNIT), inside, column_inside, True, D != BD)
    grad_line = _stride(grad[1], UNIT)
    key = M + row  # its number in the bounds

    key_acc = tl.zeros((BN, BD), tl.float32)
    value_acc = tl.zeros((BN, BD), tl.float32)
    for member in range(GROUP):
        query_head = head * GROUP + member
        queries, grads = rotated + tl.cast(query_head, tl.int64) * D, _head(grad, query_head, UNIT)
        own_sums = sums + tl.cast(query_head, tl.int64) * T * 4
        for run in range(first_run, first_masked):
            low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
            key_acc, value_acc = _pull_keys(
                x, y, key_acc, value_acc, key, queries, grads, own_sums, bounds, query_line, grad_line, low, high,
                scale, D, BD, BM, False,
            )  # fmt: skip
        for run in range(first_masked, last_run):
            low, high = tl.load(runs + run * 2), tl.load(runs + run * 2 + 1)
            key_acc, value_acc = _pull_keys(
                x, y, key_acc, value_acc, key, queries, grads, own_sums, bounds, query_line, grad_line, low, high,
                scale, D, BD, STEP, True,
            )  # fmt: skip
    row, inside = _rows(tile, BN, True)
    address = _tile(dv, head, row.to(tl.int64), column, UNIT)
    tl.store(address, value_acc.to(dv[0].dtype.element_ty), mask=inside[:, None] & column_inside[None, :])
    _store_rotated_back(dk, head, key_acc * factor, tables, row, inside, D, BD, UNIT)
