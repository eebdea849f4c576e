"""The gated activation by csrc/cpu/swiglu.cpp: fp32, or bf16 with fp32 arithmetic."""

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.checks import last_contiguous


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Same results as ``reference.forward``."""
    projected, bias = last_contiguous(projected), _wide(bias, projected)
    out = projected.new_empty(len(projected), projected.shape[1] // 2)
    arguments = _arguments(projected, bias, out=out.data_ptr())
    native.module().swiglu_forward_cpu(arguments, native.threads())
    return out


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; rows are summed in chunks, and the chunks by PyTorch."""
    kernels = native.module()
    grad, projected, bias = last_contiguous(grad), last_contiguous(projected), _wide(bias, projected)
    rows, width = projected.shape
    d_projected = projected.new_empty((rows, width) if projected_needed else 0)
    chunks = -(-rows // kernels.SWIGLU_CHUNK)
    sums = projected.new_empty((chunks, width) if bias_needed else 0, dtype=torch.float32)
    arguments = _arguments(
        projected,
        bias,
        grad=grad.data_ptr(),
        grad_row=grad.stride(0),
        d_projected=d_projected.data_ptr(),  # null if it is empty
        sums=sums.data_ptr(),
    )
    kernels.swiglu_backward_cpu(arguments, native.threads())
    return d_projected, sums.sum(0).to(projected.dtype) if bias_needed else projected.new_empty(0)


def _wide(bias: Tensor | None, projected: Tensor) -> Tensor:
    """Return the bias in fp32, zeros if there is none: reading them costs nothing."""
    return projected.new_zeros(projected.shape[1], dtype=torch.float32) if bias is None else bias.float().contiguous()


def _arguments(projected: Tensor, bias: Tensor, **fields: int) -> object:
    """Return the kernels' argument, which holds addresses: the tensors have to outlive it."""
    return native.module().SwigluArguments(
        rows=len(projected),
        columns=projected.shape[1] // 2,
        bf16=projected.dtype == torch.bfloat16,
        projected=projected.data_ptr(),
        projected_row=projected.stride(0),
        bias=bias.data_ptr(),
        **fields,
    )
