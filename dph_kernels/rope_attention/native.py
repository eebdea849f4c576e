"""Rotary attention by csrc/cpu/attention.cpp: fp32, or bf16 with fp32 arithmetic, on the packed layout."""

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
    kernels, content = native.module(), schedule.content_of(segments)
    rotated = rotate(k, k_cos, k_sin)
    q, v = last_contiguous(q), last_contiguous(v)
    memory_k, memory_v = last_contiguous(memory_k), last_contiguous(memory_v)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    sizes = {"rows": _queries(_group(q, v)), "block": kernels.ATTENTION_BLOCK, "device": q.device}
    work = schedule.by_queries(content, len(q), len(memory_k), **sizes, apart=dispatch.is_batch_invariant())
    bounds = schedule.bounds(content, len(q), device=q.device)
    arguments = _arguments(q, rotated, v, memory_k, memory_v, out, lse, q_cos, q_sin, scale)
    arguments.schedule(
        count=len(work.tiles),
        tiles=work.tiles.data_ptr(),
        runs=work.runs.data_ptr(),
        bounds=bounds.data_ptr(),
    )
    kernels.attention_forward_cpu(arguments, native.threads())
    return out, lse, rotated


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.backward``."""
    kernels, content = native.module(), schedule.content_of(segments)
    grad, q, v = last_contiguous(grad), last_contiguous(q), last_contiguous(v)
    memory_k, memory_v = last_contiguous(memory_k), last_contiguous(memory_v)
    group = _group(q, v)
    sizes = {"rows": _queries(group), "block": kernels.ATTENTION_BLOCK, "device": q.device}
    work, tasks = schedule.by_component(content, len(q), len(memory_k), **sizes)
    items = max((len(tasks) - 1) * v.shape[1], 1)
    parts = min(group, -(-MIN_ITEMS // items))
    dq = torch.empty(q.shape, dtype=q.dtype)
    sums = len(v), v.shape[1] * parts, v.shape[2]
    dk = torch.zeros(sums, dtype=torch.float32)  # the kernel adds to dk and dv
    dv = torch.zeros(sums, dtype=torch.float32)
    bounds = schedule.bounds(content, len(q), device=q.device)
    arguments = _arguments(q, rotated, v, memory_k, memory_v, out, lse, q_cos, q_sin, scale)
    arguments.grad, arguments.dq, arguments.dk, arguments.dv = _rows(grad), _rows(dq), _rows(dk), _rows(dv)
    arguments.parts = parts
    arguments.schedule(
        count=len(work.tiles),
        task_count=len(tasks) - 1,
        tiles=work.tiles.data_ptr(),
        runs=work.runs.data_ptr(),
        bounds=bounds.data_ptr(),
        tasks=tasks.data_ptr(),
    )
    kernels.attention_backward_cpu(arguments, native.threads())
    if parts > 1:
        dk, dv = reference.sum_of_groups(dk, v.shape[1]), reference.sum_of_groups(dv, v.shape[1])
    return dq, rotate(dk, k_cos, k_sin, sign=-1.0, dtype=v.dtype), dv.to(v.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the halves of ``x`` [T, H, D] by ``sign`` times the angles of ``cos`` and ``sin`` [T, D/2] fp32.

    ``x`` is fp32 or bf16; the result is contiguous, in ``dtype`` or that of ``x``.
    """
    x = last_contiguous(x)
    rotated = torch.empty(x.shape, dtype=dtype or x.dtype)
    rows, heads, head_dim = x.shape
    kernels = native.module()
    arguments = kernels.RotateArguments(
        source=_rows(x),
        target=_rows(rotated),
        rows=rows,
        heads=heads,
        head_dim=head_dim,
        sign=sign,
        source_bf16=x.dtype == torch.bfloat16,
        target_bf16=rotated.dtype == torch.bfloat16,
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
    )
    kernels.rotate_cpu(arguments, native.threads())
    return rotated


def _group(q: Tensor, v: Tensor) -> int:
    """Return the number of query heads per key head; 1 if there are none."""
    return q.shape[1] // max(v.shape[1], 1) or 1


def _queries(heads: int) -> int:
    """Return the number of queries of a tile that holds ``heads`` heads of each, so that they share its keys."""
    return max(native.module().ATTENTION_ROWS // heads, 1)


def _arguments(
    q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    q_cos: Tensor, q_sin: Tensor, scale: float,
) -> Any:  # fmt: skip
    """Return the kernels' argument, which holds addresses: the tensors have to outlive it."""
    return native.module().AttentionArguments(
        heads=q.shape[1],
        key_heads=v.shape[1],
        head_dim=q.shape[2],
        memory=len(memory_k),
        scale=scale,
        bf16=q.dtype == torch.bfloat16,
        q=_rows(q),
        k=_rows(rotated),
        v=_rows(v),
        memory_k=_rows(memory_k),
        memory_v=_rows(memory_v),
        out=_rows(out),
        q_cos=q_cos.data_ptr(),
        q_sin=q_sin.data_ptr(),
        lse=lse.data_ptr(),
    )


def _rows(x: Tensor) -> Any:
    return native.module().AttentionRows(x.data_ptr(), x.stride(0), x.stride(1))
