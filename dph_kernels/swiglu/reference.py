"""The gated activation in plain PyTorch: the specification of `swiglu`."""

import torch
from torch import Tensor


def halves(projected: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return x and gate [T, F] in fp32, or in fp64 if projected is."""
    dtype = torch.promote_types(projected.dtype, torch.float32)
    projected = projected.to(dtype)
    return (projected if bias is None else projected + bias.to(dtype)).chunk(2, -1)


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x * silu(gate)`` [T, F], rounded once."""
    x, gate = halves(projected, bias)
    return (x * torch.nn.functional.silu(gate)).to(projected.dtype)


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of projected [T, 2F] and bias [2F], empty if not needed; sums are taken before rounding."""
    x, gate = halves(projected, bias)
    grad, sigmoid = grad.to(x.dtype), gate.sigmoid()
    dx, dgate = grad * (gate * sigmoid), grad * x * (sigmoid * (1 + gate * (1 - sigmoid)))
    wide = torch.cat([dx, dgate], -1)
    return (
        wide.to(projected.dtype) if projected_needed else projected.new_empty(0),
        wide.sum(0).to(projected.dtype) if bias_needed else projected.new_empty(0),
    )
