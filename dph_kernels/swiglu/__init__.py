"""The gated activation of the feed-forward network, with the bias of the product before."""

from collections.abc import Callable

import torch
from torch import Tensor

from dph_kernels import autocast, checks, dispatch
from dph_kernels.direct import Operator
from dph_kernels.swiglu import reference


def _forward(projected: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return dispatch.call("forward", "swiglu", projected, backend, projected, bias)


def _backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    arguments = grad, projected, bias, projected_needed, bias_needed
    return dispatch.call("backward", "swiglu", projected, backend, *arguments)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *, backward: Callable
) -> tuple[Tensor | None, ...]:
    projected_needed, bias_needed, _ = ctx.needs_input_grad
    grads = backward(grad, *ctx.saved_tensors, projected_needed, bias_needed, ctx.backend)
    return grads[0] if projected_needed else None, grads[1] if bias_needed else None, None


OPERATOR = Operator("swiglu", forward=_forward, backward=_backward, setup=_setup, gradients=_gradients)


@OPERATOR.operator.register_fake
def _(projected: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 2)


@OPERATOR.backward_operator.register_fake
def _(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return (
        projected.new_empty(projected.shape if projected_needed else 0),
        projected.new_empty(projected.shape[1] if bias_needed else 0),
    )


def swiglu(projected: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """SwiGLU (arXiv 2002.05202) in one pass each way::

        x, gate = (projected + bias).chunk(2, -1)
        x * silu(gate)

    in fp32 (fp64 for fp64 inputs), rounded once. The backward pass computes all of it again, from projected.

    Args:
        projected: [T, 2F], giving [x | gate], fp16, bf16, fp32 or fp64, any strides. T may be 0.
        bias: [2F] of the product before, same dtype and device: there its gradient, the sums over the rows of
            projected's, would cost one more pass over memory. Here they are taken along, before rounding, in an order
            that depends on the sizes alone (and on the GPU).
        backend: "auto" or a backend's name. "auto" is plain PyTorch for few elements, and under ``torch.compile``.

    Returns:
        [T, F] of projected's dtype.

    Under ``torch.autocast`` both are cast to its dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or an odd number of columns.
    """
    projected, bias = autocast.together(projected, bias)
    checks.shape("projected", projected, "T", "2F")
    checks.dtype("projected", projected, checks.FLOATS)
    if projected.shape[1] % 2 or not projected.shape[1]:
        shape = list(projected.shape)
        raise ValueError(f"projected: expected an even, positive number of columns ([x | gate], 2F), got shape {shape}")
    if bias is not None:
        checks.shape("bias", bias, projected.shape[1])
        checks.dtype("bias", bias, projected.dtype)
        checks.device("bias", bias, projected.device)
    if dispatch.left_to_pytorch(projected, backend):
        return reference.forward(projected, bias)
    return OPERATOR(projected, bias, backend)
