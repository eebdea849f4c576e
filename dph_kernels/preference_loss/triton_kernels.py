# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernel of the joint preference objective: one program computes loss, slopes and all metrics.

For many pairs, many programs store partial sums instead, and one more program adds them in order: there are no atomic
additions. cDPO is the contrastive objective on implicit rewards, so both parts share their code.

Letters: N pairs, K reward heads, B pairs of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that do not lead to another compilation if they are 1 or a multiple of 16: the audit compiles what runs.
NUMBERS = ["N", "K", "group", "programs"]

SUMS = tl.constexpr(5)  # over pairs, in the order of HEAD_METRICS: loss, right answers, margin, chosen, rejected
METRICS = tl.constexpr(12)  # without those of single heads


@triton.jit
def _exp(x):
    """exp of x <= 0 to some units in the last place; that of a GPU rounds x log2(e), which costs |x| of them."""
    x = tl.where(x < -1000.0, -1000.0, x)  # exp of less is 0, and infinity would be subtracted from itself
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - n * 0.693359375 + n * 2.12194440e-4  # n log(2) in two parts, of which the first product is exact
    return tl.exp(rest) * tl.exp2(n)


@triton.jit
def _smoothed(x, epsilon):
    """s(x) = softplus(-x) + epsilon x and its derivative epsilon - sigmoid(-x), for any size of x."""
    size = tl.abs(x)
    e = _exp(-size)
    inverse = 1.0 / (1.0 + e)
    slope = epsilon - tl.where(x < 0.0, inverse, e * inverse)
    # log(1 + e) = 2 artanh(u), u = e / (2 + e) <= 1/3: log itself would lose e if it is small.
    u = e / (2.0 + e)
    square = u * u
    p = square * (1.0 / 15.0) + 1.0 / 13.0
    p = p * square + 1.0 / 11.0
    p = p * square + 1.0 / 9.0
    p = p * square + 1.0 / 7.0
    p = p * square + 1.0 / 5.0
    p = p * square + 1.0 / 3.0
    # softplus(-x) + epsilon x without a difference, which would be NaN for minus infinity, as 0 times infinity is
    weight = tl.where(x < 0.0, 1.0 - epsilon, epsilon)
    return 2.0 * (u + u * square * p) + tl.where(weight == 0.0, 0.0, weight * size), slope


@triton.jit
def _load(x, row, head, inside):
    """Rows of one head of ``x`` = (data, row stride, head stride), whose strides are multiplied by 16."""
    data, row_stride, head_stride = x
    offset = row * (tl.cast(row_stride, tl.int64) // 16) + head * (tl.cast(head_stride, tl.int64) // 16)
    return tl.load(data + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _judge(
    pair, reference, head, beta, chosen_slope, rejected_slope, slope_row, first, last, epsilon, scale,
    IMPLICIT: tl.constexpr, CONTRASTIVE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums over pairs first..last of one head, or of the implicit rewards; stores the pairs' slopes."""
    losses = tl.zeros([B], tl.float32)
    rights = tl.zeros([B], tl.float32)
    margins = tl.zeros([B], tl.float32)
    ones = tl.zeros([B], tl.float32)
    others = tl.zeros([B], tl.float32)
    for start in range(first, last, B):
        row = start + tl.arange(0, B).to(tl.int64)  # [B]; row offsets may pass 2**31
        inside = row < last
        one = _load(pair[0], row, head, inside)
        other = _load(pair[1], row, head, inside)
        if IMPLICIT:
            one = beta * (one - _load(reference[0], row, head, inside))
            other = beta * (other - _load(reference[1], row, head, inside))
        margin = one - other
        if CONTRASTIVE:
            loss, rise = _smoothed(margin, epsilon)
            fall = rise
        else:
            loss, rise = _smoothed(one, epsilon)
            second, fall = _smoothed(-other, epsilon)
            loss += second
        tl.store(chosen_slope + row * slope_row, scale * rise, mask=inside)
        tl.store(rejected_slope + row * slope_row, -(scale * fall), mask=inside)
        right = tl.where(margin != margin, margin, tl.where(margin > 0.0, 1.0, 0.0))  # NaN stays NaN
        losses += tl.where(inside, loss, 0.0)  # the others are 0 outside, as the values are
        rights += right
        margins += margin
        ones += one
        others += other
    return tl.sum(losses, 0), tl.sum(rights, 0), tl.sum(margins, 0), tl.sum(ones, 0), tl.sum(others, 0)


@triton.jit
def _column(sums, step, programs, B: tl.constexpr):
    """Sum of one figure over all programs; ``step`` elements from program to program."""
    total = tl.zeros([B], tl.float32)
    for start in range(0, programs, B):
        program = start + tl.arange(0, B).to(tl.int64)  # [B]
        total += tl.load(sums + program * step, mask=program < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _collect(sums, step, programs, B: tl.constexpr):
    """Sums of one head over the programs of a partial launch."""
    loss = _column(sums, step, programs, B)
    right = _column(sums + 1, step, programs, B)
    margin = _column(sums + 2, step, programs, B)
    chosen = _column(sums + 3, step, programs, B)
    rejected = _column(sums + 4, step, programs, B)
    return loss, right, margin, chosen, rejected


@triton.jit
def _write(loss_at, rest_at, count, loss, right, margin, chosen, rejected):
    """Store the sums divided by ``count``: the loss at one address, the other four at another."""
    tl.store(loss_at, loss / count)
    tl.store(rest_at, right / count)
    tl.store(rest_at + 1, margin / count)
    tl.store(rest_at + 2, chosen / count)
    tl.store(rest_at + 3, rejected / count)


@triton.jit(do_not_specialize=NUMBERS)
def preference_loss(
    rewards, policy, reference, loss, metrics, slopes, sums, N, K, group, programs, weights,
    DPH: tl.constexpr, DPO: tl.constexpr, CONTRASTIVE: tl.constexpr,
    PARTIAL: tl.constexpr, FINAL: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program computes everything. With PARTIAL each of ``programs`` stores ``sums`` [programs, heads, 5] over
    ``group`` pairs, and with FINAL one computes the metrics from these. Heads: the K of rewards, then the implicit one.

    ``rewards``, ``policy`` and ``reference`` are those of the chosen and of the rejected answers, as in ``_load``.
    """
    beta, dpo_epsilon, dph_epsilon, dpo_weight, dph_weight, dpo_scale, dph_scale = weights
    program = tl.program_id(0).to(tl.int64)
    first = program * group
    last = tl.minimum(first + group, N)
    pairs = N.to(tl.float32)
    count = K.to(tl.int64) * N  # number of judgements, and of slopes in one tensor of rewards
    heads = DPO + (K if DPH else 0)
    step = heads * SUMS
    total = 0.0
    if DPH:
        all_loss, all_right, all_margin, all_chosen, all_rejected = 0.0, 0.0, 0.0, 0.0, 0.0
        for head in range(0, K):
            if FINAL:
                judged, right, margin, chosen, rejected = _collect(sums + head * SUMS, step, programs, B)
            else:
                h = tl.cast(head, tl.int64)
                judged, right, margin, chosen, rejected = _judge(
                    rewards, reference, h, beta, slopes + h, slopes + count + h, K, first, last,
                    dph_epsilon, dph_scale, False, CONTRASTIVE, B,
                )  # fmt: skip
            if PARTIAL:
                own = sums + program * step + head * SUMS
                _write(own, own + 1, 1.0, judged, right, margin, chosen, rejected)
            elif K > 1:
                own = metrics + METRICS + head * SUMS
                _write(own, own + 1, pairs, judged, right, margin, chosen, rejected)
            all_loss += judged
            all_right += right
            all_margin += margin
            all_chosen += chosen
            all_rejected += rejected
        if not PARTIAL:
            judgements = count.to(tl.float32)
            _write(metrics + 1, metrics + 3, judgements, all_loss, all_right, all_margin, all_chosen, all_rejected)
            total += dph_weight * (all_loss / judgements)
    if DPO:
        if FINAL:
            judged, right, margin, chosen, rejected = _collect(sums + (heads - 1) * SUMS, step, programs, B)
        else:
            policy_slopes = slopes + (2 * count if DPH else 0)
            judged, right, margin, chosen, rejected = _judge(
                policy, reference, 0, beta, policy_slopes, policy_slopes + N, 1, first, last,
                dpo_epsilon, dpo_scale, True, True, B,
            )  # fmt: skip
        if PARTIAL:
            own = sums + program * step + (heads - 1) * SUMS
            _write(own, own + 1, 1.0, judged, right, margin, chosen, rejected)
        else:
            _write(metrics + 2, metrics + 7, pairs, judged, right, margin, chosen, rejected)
            total += dpo_weight * (judged / pairs)
    if not PARTIAL:
        nan = float("nan")
        if not DPH:
            _write(metrics + 1, metrics + 3, 1.0, nan, nan, nan, nan, nan)
        if not DPO:
            _write(metrics + 2, metrics + 7, 1.0, nan, nan, nan, nan, nan)
        tl.store(loss, total)
        tl.store(metrics, total)
        tl.store(metrics + 11, tl.where(total - total == 0.0, 1.0, 0.0))  # NaN and infinity give NaN
