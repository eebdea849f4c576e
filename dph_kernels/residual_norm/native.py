"""Residual connection and LayerNorm or RMSNorm by csrc/cpu/residual_norm.cpp: fp32, or bf16 with fp32 arithmetic."""

from collections.abc import Sequence

from torch import Tensor

from dph_kernels import native


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    total, normed, moments = native.module().residual_norm_forward_cpu(x, update, weight, bias, eps, kind == "rms")
    return x.new_empty(0) if update is None else total, normed, moments


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.backward``."""
    return native.module().residual_norm_backward_cpu(d_total, d_normed, total, weight, moments, needs)


usual_call = native.function("residual_norm")
"""See dispatch.usual_call."""
