"""Rotary attention in plain PyTorch: the specification.

Keys and values are repeated for the query heads of their group, and gradients are summed over it.
Segments of equal shape are computed together, so that thousands of short ones stay affordable.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from dph_kernels.rope_attention.growing import GrowingLayout

SCORES = 1 << 26  # largest number of scores held at once (256 MB in fp32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of ``x`` [T, H, D] by the angles whose cosines and sines are [T, D/2]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return output [T, H, D], log-sum-exp [T, H] in the dtype of the tables, and rotated keys [S, K, D]."""
    rotated = rotate(k, k_cos, k_sin).to(k.dtype)
    queries = rotate(q, q_cos, q_sin)
    keys, values = (torch.cat(pair).to(q_cos.dtype) for pair in ((memory_k, rotated), (memory_v, v)))
    keys, values = (repeat(x, q.shape[1]) for x in (keys, values))
    out = torch.zeros_like(queries)
    lse = queries.new_full(q.shape[:2], float("-inf"))
    for rows, columns, hidden in _groups(segments, q.shape[1], q.device):
        scores = _scores(queries[rows], keys[columns], hidden, scale)
        out[rows] = torch.einsum("ghqk,gkhd->gqhd", _probabilities(scores, hidden), values[columns])
        lse[rows] = scores.logsumexp(-1).transpose(1, 2)
    return out.to(q.dtype), lse, rotated


def forward_growing(
    *, q: Tensor, memory_k: Tensor, memory_v: Tensor, layout: GrowingLayout, q_cos: Tensor, q_sin: Tensor, scale: float
) -> Tensor:
    """Return the output [T, H, D] of queries over a memory of rotated keys, with the bounds of ``layout``."""
    own_start, own_end, start, end = layout.bounds[:, :, None].unbind(1)
    row = torch.arange(len(memory_k), device=q.device)
    hidden = ~(((own_start <= row) & (row < own_end)) | ((start <= row) & (row < end)))  # [T, M]
    unread = hidden.all(0)[:, None, None]  # may be uninitialised: not even zero times such a row is a number
    keys, values = (repeat(x, q.shape[1]).to(q_cos.dtype).masked_fill(unread, 0.0) for x in (memory_k, memory_v))
    scores = torch.einsum("qhd,khd->hqk", rotate(q, q_cos, q_sin), keys) * scale
    probabilities = _probabilities(scores.masked_fill_(hidden, float("-inf")), hidden)
    return torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype)


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v. The memory is detached: its keys and values get none.

    The probabilities are computed again, not from the log-sum-exp: at scores of 1e4 that is rounded to 1e-3. NaN and
    infinities of a query's row reach only the keys that it sees.
    """
    memory, queries = memory_k.shape[0], rotate(q, q_cos, q_sin)
    keys, values = (torch.cat(pair).to(q_cos.dtype) for pair in ((memory_k, rotated), (memory_v, v)))
    keys, values = (repeat(x, q.shape[1]) for x in (keys, values))
    grad = grad.to(q_cos.dtype)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, columns, hidden in _groups(segments, q.shape[1], q.device):
        grads, flat = grad[rows], columns.flatten()
        scores = _scores(queries[rows], keys[columns], hidden, scale)
        p = _probabilities(scores, hidden).masked_fill(hidden, 0.0)
        dp = torch.einsum("gqhd,gkhd->ghqk", grads, values[columns]).masked_fill(hidden, 0.0)
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).masked_fill(hidden, 0.0)
        dq[rows] = torch.einsum("ghqk,gkhd->gqhd", ds, keys[columns])
        dk.index_add_(0, flat, torch.einsum("ghqk,gqhd->gkhd", ds, queries[rows]).flatten(0, 1))
        dv.index_add_(0, flat, torch.einsum("ghqk,gqhd->gkhd", p, grads).flatten(0, 1))
    dk, dv = (sum_of_groups(x[memory:], v.shape[1]) for x in (dk, dv))
    dq, dk = rotate(dq, q_cos, -q_sin), rotate(dk, k_cos, -k_sin)
    dv = dv.to(v.dtype, copy=True)  # not a view, which would keep the memory's rows
    return dq.to(q.dtype), dk.to(q.dtype), dv


def repeat(x: Tensor, heads: int) -> Tensor:
    """Return ``x`` [S, K, D] with each head repeated, [S, heads, D]: the heads of a group are adjacent."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_of_groups(x: Tensor, key_heads: int) -> Tensor:
    """Return the sums [S, K, D] over adjacent heads of ``x`` [S, H, D], in the order of the heads."""
    if x.shape[1] == key_heads:
        return x
    return functools.reduce(torch.add, x.unflatten(1, (key_heads, -1)).unbind(2))


def _groups(segments: Tensor, heads: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield segments of equal shape: query rows [g, n], key columns [g, m], and hidden pairs [n, m]."""
    shapes = defaultdict(list)
    for q0, q1, k0, k1, p0, p1, _ in segments.tolist():
        if q1 > q0 and (k1 > k0 or p1 > p0):
            shapes[q1 - q0, k1 - k0, p1 - p0].append((q0, k0, p0))
    for (n, own, prefix), starts in shapes.items():
        hidden = torch.ones(n, own, dtype=torch.bool, device=device).triu(own - n + 1)
        hidden = torch.cat([hidden.new_zeros(n, prefix), hidden], dim=1)
        for part in torch.tensor(starts, device=device).split(max(SCORES // (max(heads, 1) * n * (own + prefix)), 1)):
            q0, k0, p0 = part[:, :, None].unbind(1)
            rows = q0 + torch.arange(n, device=device)
            columns = [p0 + torch.arange(prefix, device=device), k0 + torch.arange(own, device=device)]
            yield rows, torch.cat(columns, dim=1), hidden


def _scores(queries: Tensor, keys: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Return scaled products [g, H, n, m], minus infinity for pairs in ``hidden`` [n, m]."""
    return (torch.einsum("gqhd,gkhd->ghqk", queries, keys) * scale).masked_fill_(hidden, float("-inf"))


def _probabilities(scores: Tensor, hidden: Tensor) -> Tensor:
    """Return the softmax; zeros for a row without visible keys, NaN if all visible scores are minus infinity."""
    return scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
