"""Rotary attention by PyTorch's ``scaled_dot_product_attention``, where each segment's keys are one contiguous range.

Segments of equal shape are one batched call: on views where they lie at equal distances, else on gathered copies.
Whether the backward pass is deterministic on CUDA is PyTorch's choice (``torch.use_deterministic_algorithms``).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from dph_kernels.rope_attention import contiguous


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [T, H, D] and rotated keys [S, H, D]. The log-sum-exp is all zeros: ``backward`` makes no use of it."""
    queries, rotated = contiguous.rotate(q, q_cos, q_sin), contiguous.rotate(k, k_cos, k_sin)
    out = torch.zeros_like(queries)
    for rows, columns, cached in _groups(segments, len(memory_k)):
        keys, values = (memory_k, memory_v) if cached else (rotated, v)
        rows.add(out, _attend(rows.take(queries), columns.take(keys), columns.take(values), scale))
    return out, torch.zeros(q.shape[:2], dtype=q_cos.dtype, device=q.device), rotated


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, by computing the forward pass once more; none is formed for the memory."""
    queries = contiguous.rotate(q, q_cos, q_sin)
    dq, dk, dv = (torch.zeros(x.shape, dtype=q_cos.dtype, device=x.device) for x in (q, rotated, v))
    for rows, columns, cached in _groups(segments, len(memory_k)):
        keys, values = (memory_k, memory_v) if cached else (rotated, v)
        given = rows.take(queries), columns.take(keys), columns.take(values)
        parts = contiguous.gradients(partial(_attend, scale=scale), rows.take(grad), given, 1 if cached else 3)
        for total, places, part in zip((dq, dk, dv), (rows, columns, columns), parts, strict=False):
            places.add(total, part)
    dq, dk = contiguous.rotate(dq, q_cos, -q_sin), contiguous.rotate(dk, k_cos, -k_sin)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention, aligned at the end, of q [g, H, n, D] over k and v [g, H, m, D] with n <= m."""
    n, m = q.shape[2], k.shape[2]
    mask = causal_lower_right(n, m) if 1 < n < m else None  # a single query sees all
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < n == m, scale=scale)


class _Places(NamedTuple):
    """Ranges of rows of one length."""

    starts: Sequence[int]
    length: int

    def take(self, x: Tensor) -> Tensor:
        """The ranges [g, H, length, D] of ``x`` [T, H, D]: a view of it where they lie at equal distances."""
        if step := self._step():
            windows = x[self.starts[0] : self.starts[-1] + self.length].unfold(0, self.length, step)
            return windows.transpose(2, 3)
        return x[self._rows(x.device)].transpose(1, 2)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add ``values`` [g, H, length, D] to the ranges of ``x`` [T, H, D], in its dtype."""
        if self._step():
            self.take(x).add_(values)
        else:  # not index_add_: on CUDA only this has an order
            x.index_put_((self._rows(x.device),), values.transpose(1, 2).to(x.dtype), accumulate=True)

    def _step(self) -> int:
        """The distance from each range to the next, 0 where it is not one distance or they overlap."""
        steps = {b - a for a, b in zip(self.starts, self.starts[1:], strict=False)} or {self.length}
        step = steps.pop()
        return 0 if steps or step < self.length else step

    def _rows(self, device: torch.device) -> Tensor:
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.length, device=device)


def _groups(segments: Tensor, memory: int) -> Iterator[tuple[_Places, _Places, bool]]:
    """Segments of equal shape: their query rows, their key rows, and whether these are the memory's.

    The first queries of a segment that has more of them than keys see nothing, and are left out.
    """
    shapes = defaultdict(list)
    for _, q0, q1, k0, k1 in contiguous.ranges(segments, memory, "sdpa").tolist():
        m, cached = k1 - k0, k0 < memory
        n = min(q1 - q0, m)
        if n:
            shapes[n, m, cached].append((q1 - n, k0 if cached else k0 - memory))
    for (n, m, cached), starts in shapes.items():
        rows, columns = zip(*starts, strict=True)
        yield _Places(rows, n), _Places(columns, m), cached
