"""The gated activation by csrc/cpu/swiglu.cpp: fp32, or bf16 with fp32 arithmetic."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import native
from dph_kernels.swiglu import OPERATOR
from dph_kernels.torch_private import unwrapped_apply


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Same results as ``reference.forward``."""
    return native.module().swiglu_forward_cpu(projected, None if bias is None else bias.float())


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; rows are summed in chunks, and the chunks by PyTorch."""
    wide = None if bias is None else bias.float()
    inputs = grad, projected, wide, projected_needed, bias_needed
    d_projected, sums = native.module().swiglu_backward_cpu(*inputs)
    if not bias_needed:
        return d_projected, sums
    return d_projected, (sums[0] if len(sums) == 1 else sums.sum(0)).to(projected.dtype)


# Usual calls, see dispatch.usual_calls

usual_call = native.function("swiglu")


class _UsualFunction(torch.autograd.Function):
    """The gradients of a usual call: those of the operator, with a third of the Python."""

    @staticmethod
    def forward(ctx: FunctionCtx, projected: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(projected, bias)
        return native.module().swiglu_forward_cpu(projected, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        projected, bias = ctx.saved_tensors
        projected_needed, bias_needed = ctx.needs_input_grad
        if native.module().is_usual_backward(grad):
            d_projected, d_bias = backward(grad, projected, bias, projected_needed, bias_needed)
        else:
            d_projected, d_bias = OPERATOR.backward(
                grad=grad,
                projected=projected,
                bias=bias,
                projected_needed=projected_needed,
                bias_needed=bias_needed,
                backend="auto",
            )
        return d_projected if projected_needed else None, d_bias if bias_needed else None


usual_call_with_gradients = unwrapped_apply(_UsualFunction)
