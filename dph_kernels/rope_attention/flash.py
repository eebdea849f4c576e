"""Rotary attention by the ``flash-attn`` package (FlashAttention-2, arXiv 2307.08691), fp16 and bf16 on CUDA.

Its kernel takes contiguous runs of segments, in queries and in keys alike.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels.rope_attention import contiguous


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return output [T, H, D], a log-sum-exp of zeros, which ``backward`` does not use, and rotated keys [S, K, D]."""
    rotated, out = contiguous.rotate(k, k_cos, k_sin), torch.zeros_like(q, memory_format=torch.contiguous_format)
    if run := _run(segments, len(memory_k), q.device):
        keys, values = (memory_k, memory_v) if run.cached else (rotated, v)
        queries = contiguous.rotate(q, q_cos, q_sin)
        out[run.rows] = _attend(run, scale)(queries[run.rows], keys[run.columns], values[run.columns])
    return out, torch.zeros(q.shape[:2], dtype=q_cos.dtype, device=q.device), rotated


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v by recomputing the forward pass; the memory gets none."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, rotated, v))
    if run := _run(segments, len(memory_k), q.device):
        keys, values = (memory_k, memory_v) if run.cached else (rotated, v)
        queries = contiguous.rotate(q, q_cos, q_sin)
        inputs = queries[run.rows], keys[run.columns], values[run.columns]
        grads = contiguous.gradients(_attend(run, scale), grad[run.rows], inputs, 1 if run.cached else 3)
        for total, rows, value in zip((dq, dk, dv), (run.rows, run.columns, run.columns), grads, strict=False):
            total[rows] = value
    return contiguous.rotate(dq, q_cos, -q_sin), contiguous.rotate(dk, k_cos, -k_sin), dv


class _Run(NamedTuple):
    """A contiguous run of segments: its rows of queries and of keys, and the package's arguments."""

    rows: slice
    columns: slice
    cached: bool
    arguments: dict[str, Any]


def _attend(run: _Run, scale: float) -> partial:
    from flash_attn import flash_attn_varlen_func  # optional: dispatch reports that it is not installed

    return partial(flash_attn_varlen_func, **run.arguments, softmax_scale=scale, causal=True, deterministic=True)


def _run(segments: Tensor, memory: int, device: torch.device) -> _Run | None:
    """Return the segments as one run, or None if no query sees a key."""
    table = contiguous.ranges(segments, memory, "flash")
    numbers, q0, q1, k0, k1 = table.unbind(1)
    seeing = (k1 > k0).nonzero().flatten()
    if not len(seeing):
        return None
    for i in (q0[1:] != q1[:-1]).nonzero().flatten()[:1].tolist():
        reason = f"its queries begin at {q0[i + 1]}, and those of the segment before end at {q1[i]}"
        contiguous.refuse("flash", int(numbers[i + 1]), reason)
    for i in (k0[seeing[1:]] != k1[seeing[:-1]]).nonzero().flatten()[:1].tolist():
        before, this = seeing[i], seeing[i + 1]
        reason = f"its keys begin at {k0[this]}, and those of the segment before end at {k1[before]}"
        contiguous.refuse("flash", int(numbers[this]), reason)
    first, last = int(k0[seeing[0]]), int(k1[seeing[-1]])
    if first < memory < last:
        at = int((k0[seeing] >= memory).nonzero()[0])
        contiguous.refuse("flash", int(numbers[seeing[at]]), "it sees new keys, and the segments before see the memory")
    cached = first < memory
    offset = 0 if cached else memory
    n, m = q1 - q0, k1 - k0
    arguments = {
        "cu_seqlens_q": _ends(n).to(device),
        "cu_seqlens_k": _ends(m).to(device),
        "max_seqlen_q": int(n.max()),
        "max_seqlen_k": int(m.max()),
    }
    return _Run(slice(int(q0[0]), int(q1[-1])), slice(first - offset, last - offset), cached, arguments)


def _ends(lengths: Tensor) -> Tensor:
    """Return the start of each segment and the end of the last one, [N + 1] int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
