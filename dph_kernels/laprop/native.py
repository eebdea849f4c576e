"""LaProp by csrc/cpu/laprop.cpp and csrc/cuda/laprop.cu: every tensor in one call, each byte touched once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native


def forward(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor],
    copies: Sequence[Tensor],
    grad_scale: Tensor | None,
    **coefficients: float,
) -> None:
    """One step, in place; the coefficients are those of ``reference.forward``."""
    device, kernels = params[0].device, native.module()
    rows, chunks = _table(params, grads, exp_avg, exp_avg_sq, priors, copies, kernels.LAPROP_CHUNK)
    table = torch.tensor(rows, dtype=torch.int64)
    with native.device_guard(device):
        # On CUDA the copy is ordered on the current stream, and so is the memory's reuse: the kernel reads it in time.
        table = table.to(device)
        arguments = kernels.LapropArguments(
            table=table.data_ptr(),
            count=len(params),
            chunks=chunks,
            grad_scale=native.pointer(grad_scale),
            **coefficients,
        )
        if device.type == "cuda":
            kernels.laprop_cuda(arguments, native.stream(device))
        else:
            kernels.laprop_cpu(arguments, native.threads())


def _table(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor],
    copies: Sequence[Tensor],
    chunk: int,
) -> tuple[list[tuple[int, ...]], int]:
    """Rows of ``LapropTensor`` (csrc/laprop.h) and how many chunks they make."""
    nothing = [None] * len(params)
    columns = (params, exp_avg, exp_avg_sq, grads, priors or nothing, copies or nothing)
    rows, chunks = [], 0
    for tensors in zip(*columns, strict=True):
        param, grad = tensors[0], tensors[3]
        addresses = [native.pointer(tensor) for tensor in tensors]
        rows.append((*addresses, param.numel(), chunks, int(grad.dtype == torch.bfloat16)))
        chunks += -(-param.numel() // chunk)
    return rows, chunks
