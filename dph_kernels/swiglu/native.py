"""The gated activation by csrc/cpu/swiglu.cpp: fp32, or bf16 with fp32 arithmetic."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import native
from dph_kernels.swiglu import OPERATOR


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Same results as ``reference.forward``."""
    return native.module().swiglu_forward_cpu(projected, None if bias is None else bias.float())


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; rows are summed in chunks, and the chunks by PyTorch."""
    if bias is None and bias_needed:
        bias = projected.new_zeros(projected.shape[1])  # without one, the kernel takes no sums
    wide = None if bias is None else bias.float()
    inputs = grad, projected, wide, projected_needed, bias_needed
    d_projected, sums = native.module().swiglu_backward_cpu(*inputs)
    d_bias = projected.new_empty(0) if sums is None else _sum(sums).to(projected.dtype)
    return projected.new_empty(0) if d_projected is None else d_projected, d_bias


def _sum(chunks: Tensor) -> Tensor:
    """Return the sum of the rows."""
    return chunks[0] if len(chunks) == 1 else chunks.sum(0)


class _UsualFunction(torch.autograd.Function):
    """The gradients of a usual call: those of the operator, with a third of the Python."""

    @staticmethod
    def forward(ctx: FunctionCtx, projected: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(projected, bias)
        return native.module().swiglu_forward_cpu(projected, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        projected, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if native.module().is_usual_gradient(grad):
            d_projected, sums = native.module().swiglu_backward_cpu(grad, projected, bias, *needs)
            return d_projected, None if sums is None else _sum(sums)
        arguments = {"projected": projected, "bias": bias, "projected_needed": needs[0], "bias_needed": needs[1]}
        grads = OPERATOR.backward(grad=grad, **arguments, backend="auto")
        return tuple(value if need else None for value, need in zip(grads, needs, strict=True))


_usual_call = native.function("swiglu")


def usual_call(projected: Tensor, bias: Tensor | None) -> Tensor | None:
    """See dispatch.usual_call."""
    activations = _usual_call(projected, bias)
    return _UsualFunction.apply(projected, bias) if activations is True else activations
