"""Residual connection and LayerNorm or RMSNorm by csrc/cpu/residual_norm.cpp: fp32, or bf16 with fp32 arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import native
from dph_kernels.residual_norm import OPERATOR
from dph_kernels.torch_private import unwrapped_apply


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
    return native.module().residual_norm_backward_cpu(d_total, d_normed, total, weight, moments, *needs)


# Usual calls, see dispatch.usual_calls

usual_call = native.function("residual_norm")


class _UsualFunction(torch.autograd.Function):
    """The gradients of a usual call: those of the operator, with a third of the Python."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        update: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: str,
    ) -> tuple[Tensor, ...]:
        kernels = native.module()
        total, normed, ctx.moments = kernels.residual_norm_forward_cpu(x, update, weight, bias, eps, kind == "rms")
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        ctx.save_for_backward(total, weight)
        if update is None:
            return (normed,)
        if not (x.requires_grad or update.requires_grad):
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        x_needed, update_needed, weight_needed, bias_needed, _, _ = ctx.needs_input_grad
        d_total, d_normed = grads if len(grads) == 2 else (None, *grads)
        if d_normed is None:
            return d_total if x_needed else None, d_total if update_needed else None, None, None, None, None
        kernels, inputs = native.module(), (d_total, d_normed, total, weight, ctx.moments)
        needs = x_needed or update_needed, weight_needed, bias_needed
        if kernels.is_usual_backward(*grads):
            d_x, d_weight, d_bias = kernels.residual_norm_backward_cpu(*inputs, *needs)
        else:
            names = "d_total", "d_normed", "total", "weight", "moments"
            arguments = dict(zip(names, inputs, strict=True))
            d_x, d_weight, d_bias = OPERATOR.backward(**arguments, needs=list(needs), backend="auto")
        return (
            d_x if x_needed else None,
            d_x if update_needed else None,
            d_weight if weight_needed else None,
            d_bias if bias_needed else None,
            None,
            None,
        )


_apply = unwrapped_apply(_UsualFunction)


def usual_call_with_gradients(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Return (total, normed)."""
    outputs = _apply(x, update, weight, bias, eps, kind)
    return (x, *outputs) if update is None else outputs
