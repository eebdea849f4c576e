"""Rotary attention by csrc/cpu/attention.cpp: fp32, or bf16 with fp32 arithmetic, on the packed layout."""

from typing import Any

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.rope_attention import schedule
from dph_kernels.strides import last_contiguous


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.forward``."""
    kernels = native.module()
    rotated = rotate(k, k_cos, k_sin)
    q, v, memory_k, memory_v = (last_contiguous(x) for x in (q, v, memory_k, memory_v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    work = schedule.by_queries(segments, len(q), len(memory_k), **_sizes(kernels))
    bounds = schedule.bounds(segments, len(q), device=q.device)
    arguments = _arguments(q, rotated, v, memory_k, memory_v, out, lse, q_cos, q_sin, scale)
    arguments.schedule(count=len(work.tiles), **_addresses(tiles=work.tiles, runs=work.runs, bounds=bounds))
    kernels.attention_forward_cpu(arguments, native.threads())
    return out, lse, rotated


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.backward``."""
    kernels = native.module()
    grad, q, v, memory_k, memory_v = (last_contiguous(x) for x in (grad, q, v, memory_k, memory_v))
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = (torch.zeros(v.shape, dtype=torch.float32) for _ in range(2))  # the kernel adds to them
    work, tasks = schedule.by_component(segments, len(q), len(memory_k), **_sizes(kernels))
    bounds = schedule.bounds(segments, len(q), device=q.device)
    arguments = _arguments(q, rotated, v, memory_k, memory_v, out, lse, q_cos, q_sin, scale)
    for name, tensor in {"grad": grad, "dq": dq, "dk": dk, "dv": dv}.items():
        setattr(arguments, name, _rows(tensor))
    arguments.schedule(
        count=len(work.tiles),
        task_count=len(tasks) - 1,
        **_addresses(tiles=work.tiles, runs=work.runs, bounds=bounds, tasks=tasks),
    )
    kernels.attention_backward_cpu(arguments, native.threads())
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
        **_addresses(cos=cos, sin=sin),
    )
    kernels.rotate_cpu(arguments, native.threads())
    return rotated


def _arguments(
    q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    q_cos: Tensor, q_sin: Tensor, scale: float,
) -> Any:  # fmt: skip
    """Return the kernels' argument, which holds addresses: the tensors have to outlive it."""
    tensors = {"q": q, "k": rotated, "v": v, "memory_k": memory_k, "memory_v": memory_v, "out": out}
    return native.module().AttentionArguments(
        heads=q.shape[1],
        head_dim=q.shape[2],
        memory=len(memory_k),
        scale=scale,
        bf16=q.dtype == torch.bfloat16,
        **{name: _rows(tensor) for name, tensor in tensors.items()},
        **_addresses(q_cos=q_cos, q_sin=q_sin, lse=lse),
    )


def _sizes(kernels: Any) -> dict[str, Any]:
    return {"rows": kernels.ATTENTION_ROWS, "block": kernels.ATTENTION_BLOCK, "device": torch.device("cpu")}


def _rows(x: Tensor) -> Any:
    return native.module().AttentionRows(x.data_ptr(), x.stride(0), x.stride(1))


def _addresses(**tensors: Tensor) -> dict[str, int]:
    """Return the addresses of contiguous tensors: tables, schedules and the log-sum-exp are."""
    return {name: native.pointer(tensor) for name, tensor in tensors.items()}
