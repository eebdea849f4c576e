"""Residual connection and LayerNorm or RMSNorm by csrc/cpu/residual_norm.cpp: fp32, or bf16 with fp32 arithmetic."""

from collections.abc import Sequence

from torch import Tensor

from dph_kernels import native
from dph_kernels.checks import last_contiguous
from dph_kernels.residual_norm.reference import gradients, results


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    outputs = results(x, update, kind)
    x, update = last_contiguous(x), None if update is None else last_contiguous(update)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    native.module().residual_norm_forward_cpu(x, update, weight, bias, eps, *outputs, native.threads())
    return outputs


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.backward``."""
    outputs = gradients(total, weight, needs)
    d_total = None if d_total is None else last_contiguous(d_total)
    inputs = d_total, last_contiguous(d_normed), last_contiguous(total), weight.contiguous(), moments
    native.module().residual_norm_backward_cpu(*inputs, *outputs, native.threads())
    return outputs
