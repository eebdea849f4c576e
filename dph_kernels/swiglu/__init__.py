"""Gated activation of the feed-forward network, with the bias of the product before it."""

from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels.operator import Gradient, Inputs, Operator


def _fake(projected: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The activations [T, F]."""
    return projected.new_empty(projected.shape[0], projected.shape[1] // 2)


def _fake_backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of (projected, bias)."""
    return (
        projected.new_empty(projected.shape if projected_needed else 0),
        projected.new_empty(projected.shape[1] if bias_needed else 0),
    )


def _setup(ctx: FunctionCtx, output: Tensor, inputs: Inputs) -> None:
    ctx.save_for_backward(inputs["projected"], inputs["bias"])


def _compute(ctx: FunctionCtx, needs: Inputs, backward: Callable[..., tuple[Tensor, Tensor]], grad: Tensor) -> Inputs:
    projected, bias = ctx.saved_tensors
    d_projected, d_bias = backward(
        grad=grad,
        projected=projected,
        bias=bias,
        projected_needed=needs["projected"],
        bias_needed=needs["bias"],
    )
    grads = {"projected": d_projected, "bias": d_bias}
    return {name: grad for name, grad in grads.items() if needs[name]}


OPERATOR = Operator(
    "swiglu",
    fake=_fake,
    like=itemgetter("projected"),
    gradient=Gradient(setup=_setup, compute=_compute, fake=_fake_backward, like="projected"),
)


def _plain(projected: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(projected.dtype, torch.float32)
    wide = projected.to(dtype)
    x, gate = (wide if bias is None else wide + bias.to(dtype)).chunk(2, -1)
    return (x * torch.nn.functional.silu(gate)).to(projected.dtype)


def swiglu(projected: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """SwiGLU (arXiv 2002.05202) in one pass each way::

        x, gate = (projected + bias).chunk(2, -1)
        x * silu(gate)

    in fp32 (fp64 for fp64 inputs), rounded once. The backward pass recomputes both from projected.

    Args:
        projected: [T, 2F], [x | gate], fp16, bf16, fp32 or fp64, any strides. T may be 0.
        bias: [2F] of the product before, same dtype and device. Its gradient, the sum over the rows of projected's
            gradient, is taken here, before rounding, and saves a pass over memory; the order of the sum depends on the
            sizes alone (and on the GPU).
        backend: "auto" or a backend's name. "auto" is plain PyTorch for few elements on a GPU, and under
            ``torch.compile``.

    Returns:
        [T, F] of projected's dtype.

    Under ``torch.autocast`` both are cast to its dtype.

    Raises:
        ValueError: a wrong shape, dtype or device, or an odd number of columns.
    """
    if backend == "auto" and not torch.compiler.is_compiling():
        usual = dispatch.usual_call("swiglu")
        if usual and (activations := usual(projected, bias)) is not None:
            return activations
    projected, bias = checks.cast_together(projected, bias)
    checks.shape("projected", projected, "T", "2F")
    checks.dtype("projected", projected, checks.FLOATS)
    if projected.shape[1] % 2 or not projected.shape[1]:
        shape = list(projected.shape)
        raise ValueError(f"projected: expected an even, positive number of columns ([x | gate], 2F), got shape {shape}")
    if bias is not None:
        checks.shape("bias", bias, projected.shape[1])
        checks.dtype("bias", bias, projected.dtype)
        checks.device("bias", bias, projected.device)
    if dispatch.prefer_pytorch("swiglu", projected, backend):
        checks.require_memory(projected=projected, bias=bias)
        return _plain(projected, bias)
    return OPERATOR(projected=projected, bias=bias, backend=backend)
