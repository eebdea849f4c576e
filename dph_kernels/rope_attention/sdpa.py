"""Rotary attention by PyTorch's ``scaled_dot_product_attention``, if each segment's keys are one contiguous range.

Segments of equal shape are one batched call: on views if they are at equal distances, else on gathered copies.
Whether the backward pass is deterministic on CUDA is PyTorch's choice (``torch.use_deterministic_algorithms``).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from dph_kernels.rope_attention import contiguous, reference


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return output [T, H, D], a log-sum-exp of zeros, which ``backward`` does not use, and rotated keys [S, K, D]."""
    queries, rotated = contiguous.rotate(q, q_cos, q_sin), contiguous.rotate(k, k_cos, k_sin)
    out = torch.zeros_like(queries)
    for rows, columns, cached in _groups(segments, len(memory_k)):
        keys, values = (memory_k, memory_v) if cached else (rotated, v)
        q_rows, k_rows, v_rows = rows.take(queries), columns.take(keys), columns.take(values)
        rows.add(out, _function((q_rows, k_rows))(q_rows, k_rows, v_rows, scale))
    return out, torch.zeros(q.shape[:2], dtype=q_cos.dtype, device=q.device), rotated


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v by recomputing the forward pass; the memory gets none."""
    queries = contiguous.rotate(q, q_cos, q_sin)
    dq, dk, dv = (torch.zeros(x.shape, dtype=q_cos.dtype, device=x.device) for x in (q, rotated, v))
    for rows, columns, cached in _groups(segments, len(memory_k)):
        keys, values = (memory_k, memory_v) if cached else (rotated, v)
        inputs = rows.take(queries), columns.take(keys), columns.take(values)
        upstream = rows.take(grad)
        attend = partial(_function(inputs[:2], (upstream, inputs[2])), scale=scale)
        grads = contiguous.gradients(attend, upstream, inputs, 1 if cached else 3)
        for total, ranges, value in zip((dq, dk, dv), (rows, columns, columns), grads, strict=False):
            ranges.add(total, value)
    dq, dk = contiguous.rotate(dq, q_cos, -q_sin), contiguous.rotate(dk, k_cos, -k_sin)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute causal attention, aligned at the end, of q [g, H, n, D] over k and v [g, K, m, D] with n <= m."""
    n, m = q.shape[2], k.shape[2]
    mask = causal_lower_right(n, m) if 1 < n < m else None  # a single query sees all
    grouped = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < n == m, scale=scale, **grouped)


def _attend_unfused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute the same as ``_attend`` in separate operations, for NaN and infinities on the CPU.

    In fp32 at least: oneDNN's bf16 product with AMX pads an odd inner dimension with the next row's first number times
    0, which is NaN if that number is.
    """
    dtype, n, m = q.dtype, q.shape[2], k.shape[2]
    k, v = (reference.repeat(x, q.shape[1]) for x in (k, v))
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    hidden = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).to(dtype)


def _function(*factors: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    """Return ``_attend``, or on the CPU ``_attend_unfused`` if a product of ``factors`` may be NaN or infinite.

    PyTorch's fused kernel for CPUs takes NaN scores (queries times keys) for hidden ones: the result is 0 instead of
    NaN. Its backward pass multiplies infinities (gradients times values) by the zeros of hidden pairs.
    """
    for a, b in factors:
        bound = _largest(a) * _largest(b) * a.shape[-1] if a.device.type == "cpu" else 0.0
        if not bound < torch.finfo(torch.float32).max:
            return _attend_unfused
    return _attend


def _largest(x: Tensor) -> float:
    """Return the largest absolute value, NaN if there is one."""
    return max(map(abs, torch.stack(x.aminmax()).tolist())) if x.numel() else 0.0


class _Ranges(NamedTuple):
    """Ranges of rows of one length."""

    starts: Sequence[int]
    length: int

    def take(self, x: Tensor) -> Tensor:
        """Return the ranges [g, H, length, D] of ``x`` [T, H, D], a view of it if they are at equal distances."""
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
        """Return the distance from each range to the next, 0 if there are several distances or the ranges overlap."""
        steps = {b - a for a, b in zip(self.starts, self.starts[1:], strict=False)} or {self.length}
        step = steps.pop()
        return 0 if steps or step < self.length else step

    def _rows(self, device: torch.device) -> Tensor:
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.length, device=device)


def _groups(segments: Tensor, memory: int) -> Iterator[tuple[_Ranges, _Ranges, bool]]:
    """Yield groups of segments of equal shape: query rows, key rows, and whether the keys are the memory's.

    The first queries of a segment with more queries than keys have no visible keys, and are left out.
    """
    shapes = defaultdict(list)
    for _, q0, q1, k0, k1 in contiguous.ranges(segments, memory, "sdpa").tolist():
        m, cached = k1 - k0, k0 < memory
        n = min(q1 - q0, m)
        if n:
            shapes[n, m, cached].append((q1 - n, k0 if cached else k0 - memory))
    for (n, m, cached), starts in shapes.items():
        rows, columns = zip(*starts, strict=True)
        yield _Ranges(rows, n), _Ranges(columns, m), cached
