# ruff: noqa: ANN001, ANN201, ANN202, SIM108
"""Triton kernels of the pooler and its reward heads (arXiv 2405.20053, section 3.1).

With few answers at a time, reading the weights is the limit: each program streams columns of its own for all answers.
Sums are computed in one order, whichever program finishes first; counters only determine the last one.

Matrices with a row stride are tuples (data, row stride).

Letters: R answers, C model, F width, K heads of reward, BR x BC or BR x BF a tile of results, BK the step along sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16.
NUMBERS = ["R", "counted", "seed_low", "seed_high", "threshold", "kept"]


@triton.jit
def _row_ids(row_ids, row, inside, NUMBERED: tl.constexpr):
    """Low and high words [BR, 1] of the answers' row ids: those of ``row_ids`` if NUMBERED, else row numbers."""
    if NUMBERED:
        ids = tl.load(row_ids + row, mask=inside, other=0)
    else:
        ids = row.to(tl.int64)
    low, high = (ids & 0xFFFFFFFF).to(tl.uint32), ((ids >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return low[:, None], high[:, None]


@triton.jit
def _mask(low, high, column, stream: tl.constexpr, seed_low, seed_high, threshold, kept):
    """[BR, BC] factors of a dropout: 0 or ``kept``, by word 0 of Philox4x32-10 as in dph_kernels/philox.py."""
    columns, low = tl.broadcast(column.to(tl.uint32)[None, :], low)
    key_low, key_high = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)  # interpreted numbers are int32
    words = tl.philox_impl(columns, tl.full(columns.shape, stream, tl.uint32), low, high, key_low, key_high)
    return tl.where(words[0] >= tl.cast(threshold, tl.uint32), kept, 0.0)


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _sigmoid(x):
    e = _exp(-tl.abs(x))  # at most 1
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x):
    """tanh to a unit in the last place, also near 0, at which the quotient would lose digits (Cephes' tanhf)."""
    size = tl.abs(x)
    e = _exp(-2.0 * size)
    large = 1.0 - 2.0 * e / (1.0 + e)
    near = tl.where(size < 0.625, x, 0.0)
    square = near * near
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(size < 0.625, p * square * near + near, tl.where(x < 0.0, -large, large))


@triton.jit
def _last(counter, count):
    """Whether this program is the last of ``count`` to arrive; the earlier writes of the others are then visible."""
    tl.debug_barrier()  # all threads have written
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit(do_not_specialize=NUMBERS)
def drop(
    x, out, row_ids, R,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, kept: tl.float32,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STREAM: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """out [R, C] = x times its dropout."""
    row, column = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < R)[:, None] & (column < C)[None, :]
    low, high = _row_ids(row_ids, row, row < R, NUMBERED)
    value = tl.load(x[0] + row[:, None].to(tl.int64) * x[1] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value *= _mask(low, high, column, STREAM, seed_low, seed_high, threshold, kept)
    tl.store(out + row[:, None].to(tl.int64) * C + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    left, right, row, feature, R, begin,
    FEATURES: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BR, BN] sums of left[row, k] right[feature, k] over STEPS steps of BK from ``begin`` on.

    Elements beyond R, FEATURES or DEPTH count as 0. The constant number of steps lets wgmma instructions overlap.
    """
    sums = tl.zeros([BR, BN], tl.float32)
    lefts = left[0] + row[:, None].to(tl.int64) * left[1]
    rights = right[0] + feature[:, None].to(tl.int64) * right[1]
    for step in range(STEPS):
        k = begin + step * BK + tl.arange(0, BK)
        # [BR, BK]
        a = tl.load(lefts + k[None, :], mask=(row < R)[:, None] & (k < DEPTH)[None, :], other=0.0)
        # [BN, BK]
        b = tl.load(
            rights + k[None, :].to(tl.int64),
            mask=(feature < FEATURES)[:, None] & (k < DEPTH)[None, :],
            other=0.0,
        )
        sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=NUMBERS)
def gate(
    hidden, w1, b1, gated, projected, counters, R, counted,
    C: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gated [R, F] = x silu(g) with [x | g] = hidden @ w1.T + b1, stored as projected [R, 2F] if SAVE.

    Rows of w1 for x and for g alternate, so that one product computes both in neighbouring columns. Also sets the
    ``counted`` counters of the next launch to 0.
    """
    row, first = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BF
    pair = tl.arange(0, 2 * BF)
    gate_column = first + pair // 2
    feature = tl.where(gate_column < F, gate_column + pair % 2 * F, 2 * F)  # none beyond F
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for start in range(0, counted, 1024):
            counter = start + tl.arange(0, 1024)
            tl.store(counters + counter, tl.zeros([1024], tl.int32), mask=counter < counted)
    STEPS: tl.constexpr = (C + BK - 1) // BK
    sums = _product(hidden, w1, row, feature, R, 0, 2 * F, C, STEPS, PRECISION, BR, 2 * BF, BK)
    if BIAS:
        sums += tl.load(b1 + feature, mask=feature < 2 * F, other=0.0).to(tl.float32)[None, :]
    x, g = tl.split(sums.reshape(BR, BF, 2))
    column = first + tl.arange(0, BF)
    inside = (row < R)[:, None] & (column < F)[None, :]
    at = row[:, None].to(tl.int64) * F + column[None, :]
    tl.store(gated + at, (x * (g * _sigmoid(g))).to(gated.dtype.element_ty), mask=inside)
    if SAVE:
        at = row[:, None].to(tl.int64) * (2 * F) + column[None, :]
        tl.store(projected + at, x, mask=inside)
        tl.store(projected + at + F, g, mask=inside)


@triton.jit
def _heads(
    state, reward, scores, rewards, counter, row, column, block, blocks, R, CP: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Rewards [R, K] of dropped states [BR, CP].

    Each block of columns stores its dot products in scores [blocks, R, K]; the last one to arrive adds those of all.
    """
    for head in range(K):
        weight = tl.load(reward + head * C + column, mask=column < C, other=0.0).to(tl.float32)
        score = tl.sum(state * weight[None, :], 1)
        tl.store(scores + (block.to(tl.int64) * R + row) * K + head, score, mask=row < R)
    if _last(counter, blocks):
        part = tl.arange(0, BP)
        for head in range(K):
            at = scores + (part[None, :].to(tl.int64) * R + row[:, None]) * K + head
            inside = (row < R)[:, None] & (part < blocks)[None, :]
            score = tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), 1)
            tl.store(rewards + row.to(tl.int64) * K + head, score, mask=row < R)


@triton.jit(do_not_specialize=NUMBERS)
def pool(
    state, w2, b2, reward, row_ids, workspace, pooled, rewards, R,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, kept: tl.float32,
    C: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    BP: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, NUMBERED: tl.constexpr,
    SAVE: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rewards [R, K] = drop(tanh(state @ w2.T + b2)) @ reward.T; the pooled state [R, C] is stored if SAVE.

    Program (row tile, block of columns, split) sums its part of the depth into parts [SPLITS, R, C]; the last one of a
    tile adds the splits and continues. ``workspace`` is (parts, scores [blocks, R, K], counters).
    """
    parts, scores, counters = workspace
    tile, block, split, blocks = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    row, column = tile * BR + tl.arange(0, BR), block * BC + tl.arange(0, BC)
    inside = (row < R)[:, None] & (column < C)[None, :]
    at = row[:, None].to(tl.int64) * C + column[None, :]
    STEPS: tl.constexpr = (DEPTH + BK * SPLITS - 1) // (BK * SPLITS)
    begin = split * (STEPS * BK)
    sums = _product(state, w2, row, column, R, begin, C, DEPTH, STEPS, PRECISION, BR, BC, BK)
    done = True
    if SPLITS > 1:
        tl.store(parts + split.to(tl.int64) * R * C + at, sums, mask=inside)
        done = _last(counters + tl.num_programs(0) + tile * blocks + block, SPLITS)
    if done:
        if SPLITS > 1:
            sums = tl.zeros([BR, BC], tl.float32)
            for other in range(SPLITS):
                part = parts + tl.cast(other, tl.int64) * R * C + at
                sums += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
        if BIAS:
            sums += tl.load(b2 + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        values = tl.where(inside, _tanh(sums), 0.0)  # an infinite state times the zeros beyond C is NaN
        if SAVE:
            tl.store(pooled + at, values, mask=inside)
        if DROP:
            low, high = _row_ids(row_ids, row, row < R, NUMBERED)
            values *= _mask(low, high, column, STREAM, seed_low, seed_high, threshold, kept)
        _heads(
            values, reward, scores, rewards, counters + tile, row, column, block, blocks, R,
            BC, C, K, BR, BP,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def score(
    state, reward, row_ids, rewards, R,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, kept: tl.float32,
    C: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    DROP: tl.constexpr, NUMBERED: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Rewards [R, K] = drop(state) @ reward.T without a pooler; program (row tile, head)."""
    row, head = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1)
    low, high = _row_ids(row_ids, row, row < R, NUMBERED)
    sums = tl.zeros([BR, BC], tl.float32)
    for start in range(0, C, BC):
        column = start + tl.arange(0, BC)
        inside = (row < R)[:, None] & (column < C)[None, :]
        values = tl.load(state[0] + row[:, None].to(tl.int64) * state[1] + column[None, :], mask=inside, other=0.0)
        weight = tl.load(reward + head.to(tl.int64) * C + column, mask=column < C, other=0.0).to(tl.float32)
        values = values.to(tl.float32)
        if DROP:
            values *= _mask(low, high, column, STREAM, seed_low, seed_high, threshold, kept)
        sums += values * weight[None, :]
    tl.store(rewards + row.to(tl.int64) * K + head, tl.sum(sums, 1), mask=row < R)


@triton.jit(do_not_specialize=NUMBERS)
def pool_backward(
    grad, state, reward, row_ids, d_state, d_reward, d_bias, R,
    seed_low: tl.uint32, seed_high: tl.uint32, threshold: tl.uint32, kept: tl.float32,
    C: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    DROP: tl.constexpr, NUMBERED: tl.constexpr, POOLED: tl.constexpr,
    NEED_REWARD: tl.constexpr, NEED_BIAS: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of columns: of the reward vectors, and of the state, before tanh if POOLED.

    The sum of the latter over the answers is the gradient of b2. ``state`` is the input of the dropout, ``grad`` is
    (data, row stride, head stride), with strides times 16.
    """
    column, heads = tl.program_id(0) * BC + tl.arange(0, BC), tl.arange(0, BH)
    grad_row, grad_head = tl.cast(grad[1], tl.int64) // 16, tl.cast(grad[2], tl.int64) // 16
    to_reward = tl.zeros([BH, BC], tl.float32)
    to_bias = tl.zeros([BC], tl.float32)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        inside = (row < R)[:, None] & (column < C)[None, :]
        values = tl.load(state[0] + row[:, None].to(tl.int64) * state[1] + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        dropped, upstream = values, tl.zeros([BR, BC], tl.float32)
        if DROP:
            low, high = _row_ids(row_ids, row, row < R, NUMBERED)
            mask = _mask(low, high, column, STREAM, seed_low, seed_high, threshold, kept)
            dropped = values * mask
        for head in range(K):
            at = grad[0] + row.to(tl.int64) * grad_row + head * grad_head
            per_row = tl.load(at, mask=row < R, other=0.0).to(tl.float32)
            weight = tl.load(reward + head * C + column, mask=column < C, other=0.0).to(tl.float32)
            upstream += per_row[:, None] * weight[None, :]
            if NEED_REWARD:
                of_head = tl.sum(per_row[:, None] * dropped, 0)
                to_reward += tl.where((heads == head)[:, None], of_head[None, :], 0.0)
        if DROP:
            upstream *= mask
        if POOLED:
            upstream *= 1.0 - values * values
        if NEED_BIAS:
            to_bias += tl.sum(tl.where(inside, upstream, 0.0), 0)
        at = d_state + row[:, None].to(tl.int64) * C + column[None, :]
        tl.store(at, upstream.to(d_state.dtype.element_ty), mask=inside)
    if NEED_REWARD:
        at = d_reward + heads[:, None].to(tl.int64) * C + column[None, :]
        tl.store(at, to_reward.to(d_reward.dtype.element_ty), mask=(heads < K)[:, None] & (column < C)[None, :])
    if NEED_BIAS:
        tl.store(d_bias + column, to_bias.to(d_bias.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=NUMBERS)
def gate_backward(
    grad, w2, projected, d_projected, gated, d_bias, R,
    C: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    MULTIPLY: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of [x | g] [R, 2F] from that before tanh [R, C], its sums over each row tile [tiles, 2F], and
    x silu(g) [R, F] again, for the gradient of w2. Unless MULTIPLY ``grad`` is that of x silu(g) [R, F] already.
    """
    tile, first = tl.program_id(0), tl.program_id(1) * BF
    row, within = tile * BR + tl.arange(0, BR), tl.arange(0, BF)
    column = first + within
    inside = (row < R)[:, None] & (column < F)[None, :]
    narrow = row[:, None].to(tl.int64) * F + within[None, :]  # from the tile's first column on
    wide = row[:, None].to(tl.int64) * (2 * F) + within[None, :]
    if NEED_INPUT and MULTIPLY:
        d = tl.zeros([BR, BF], tl.float32)
        for start in range(0, C, BK):
            k = start + tl.arange(0, BK)
            # [BR, BK]
            a = tl.load(
                grad + row[:, None].to(tl.int64) * C + k[None, :], mask=(row < R)[:, None] & (k < C)[None, :], other=0.0
            )
            # [BK, BF]
            b = tl.load(
                w2[0] + k[:, None].to(tl.int64) * w2[1] + column[None, :],
                mask=(k < C)[:, None] & (column < F)[None, :],
                other=0.0,
            )
            d = tl.dot(a, b, d, input_precision=PRECISION)
    x = tl.load(projected + first + wide, mask=inside, other=0.0)
    g = tl.load(projected + first + F + wide, mask=inside, other=0.0)
    sigmoid = _sigmoid(g)
    if NEED_GATED:
        tl.store(gated + first + narrow, (x * (g * sigmoid)).to(gated.dtype.element_ty), mask=inside)
    if NEED_INPUT:
        if not MULTIPLY:
            d = tl.load(grad + first + narrow, mask=inside, other=0.0).to(tl.float32)
        dx = tl.where(inside, d * (g * sigmoid), 0.0)
        dg = tl.where(inside, d * x * sigmoid * (1.0 + g * (1.0 - sigmoid)), 0.0)
        tl.store(d_projected + first + wide, dx.to(d_projected.dtype.element_ty), mask=inside)
        tl.store(d_projected + first + F + wide, dg.to(d_projected.dtype.element_ty), mask=inside)
        sums = d_bias + tile.to(tl.int64) * (2 * F) + column
        tl.store(sums, tl.sum(dx, 0), mask=column < F)
        tl.store(sums + F, tl.sum(dg, 0), mask=column < F)
