"""Rotary attention by csrc/cpu/attention.cpp: fp32, or bf16 with fp32 arithmetic, on the packed layout."""

import functools
from typing import Any

import torch
from torch import Tensor

from dph_kernels import dispatch, native
from dph_kernels.checks import last_contiguous
from dph_kernels.rope_attention import reference, schedule

# Work items of the backward pass; with fewer, tasks are divided into parts, at most as many as a group has heads. The
# number of threads does not matter, so that it changes no order of sums.
MIN_ITEMS = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.forward``."""
    content, apart = schedule.content_of(segments), dispatch.is_batch_invariant()
    work = _forward_work(content, q.shape[0], memory_k.shape[0], _group(q, v), apart)
    inputs, tables = (q, k, v, memory_k, memory_v), (q_cos, q_sin, k_cos, k_sin)
    return native.module().attention_forward_cpu(*inputs, *tables, work, scale)


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.backward``."""
    group = _group(q, v)
    work, tasks = _backward_work(schedule.content_of(segments), q.shape[0], memory_k.shape[0], group)
    items = max((tasks.shape[0] - 1) * v.shape[1], 1)
    parts = min(group, -(-MIN_ITEMS // items))
    sums = v.shape[0], v.shape[1] * parts, v.shape[2]
    dk, dv = torch.zeros(sums, dtype=torch.float32), torch.zeros(sums, dtype=torch.float32)
    inputs = grad, q, rotated, v, memory_k, memory_v, out, lse
    dq = native.module().attention_backward_cpu(*inputs, dk, dv, q_cos, q_sin, work, tasks, parts, scale)
    if parts > 1:
        dk, dv = reference.sum_of_groups(dk, v.shape[1]), reference.sum_of_groups(dv, v.shape[1])
    return dq, rotate(dk, k_cos, k_sin, sign=-1.0, dtype=v.dtype), dv.to(v.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the halves of ``x`` [T, H, D] by ``sign`` times the angles of ``cos`` and ``sin`` [T, D/2] fp32.

    ``x`` is fp32 or bf16; the result is contiguous, in ``dtype`` or that of ``x``.
    """
    x = last_contiguous(x)
    rotated = torch.empty(x.shape, dtype=dtype or x.dtype)
    return native.module().rotate_cpu(x, rotated, cos, sin, sign)


def _group(q: Tensor, v: Tensor) -> int:
    """Return the number of query heads per key head; 1 if there are none."""
    return q.shape[1] // max(v.shape[1], 1) or 1


@functools.lru_cache(maxsize=256)
def _forward_work(content: bytes, queries: int, memory: int, group: int, apart: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return tiles, runs and bounds of the forward pass. ``apart``: no tile has queries of two segments."""
    work = schedule.by_queries(content, queries, memory, **_sizes(group), apart=apart)
    return work.tiles, work.runs, schedule.bounds(content, queries, device=schedule.CPU)


@functools.lru_cache(maxsize=256)
def _backward_work(
    content: bytes, queries: int, memory: int, group: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return (tiles, runs, bounds) of the backward pass, and the first tile of each task."""
    work, tasks = schedule.by_component(content, queries, memory, **_sizes(group))
    return (work.tiles, work.runs, schedule.bounds(content, queries, device=schedule.CPU)), tasks


def _sizes(group: int) -> dict[str, Any]:
    """Return the sizes of a tile of queries, in which the heads of a group share keys, and of a block of keys."""
    kernels = native.module()
    rows = max(kernels.ATTENTION_ROWS // group, 1)
    return {"rows": rows, "block": kernels.ATTENTION_BLOCK, "device": schedule.CPU}
