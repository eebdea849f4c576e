"""The residual connection and the LayerNorm behind it, in one pass each way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dph_kernels import autocast, checks, dispatch
from dph_kernels.direct import Operator
from dph_kernels.residual_norm import reference

WIDEST = 16384  # elements of a row that a program of the GPU's kernels holds in registers


def _forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.call("forward", "residual_norm", x, backend, x, update, weight, bias, eps)


def _backward(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = d_total, d_normed, total, weight, moments, needs
    return dispatch.call("backward", "residual_norm", total, backend, *arguments)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, update, weight, _, _, ctx.backend = inputs
    total, _, moments = output
    ctx.set_materialize_grads(False)  # an output that nobody uses costs nothing
    summed = update is not None and any(ctx.needs_input_grad[:2])
    ctx.mark_non_differentiable(moments, *(() if summed else (total,)))
    ctx.save_for_backward(x if update is None else total, weight, moments)


def _gradients(
    ctx: torch.autograd.function.FunctionCtx,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    *_: None,
    backward: Callable,
) -> tuple[Tensor | None, ...]:
    to_x, to_update, *to_weights = ctx.needs_input_grad[:4]
    needs, grads = [to_x or to_update, *to_weights], [d_total, None, None]
    if d_normed is not None:
        found = backward(d_total, d_normed, *ctx.saved_tensors, needs, ctx.backend)
        grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    d_x, d_weight, d_bias = grads
    return d_x if to_x else None, d_x if to_update else None, d_weight, d_bias, None, None


OPERATOR = Operator("residual_norm", forward=_forward, backward=_backward, setup=_setup, gradients=_gradients)


@OPERATOR.operator.register_fake
def _(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.results(x, update)


@OPERATOR.backward_operator.register_fake
def _(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gradients(total, weight, needs)


def _plain(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x if update is None else x + update
    return total, torch.nn.functional.layer_norm(total, total.shape[1:], weight, bias, eps)


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A residual connection and the LayerNorm of what it comes to::

        total = x if update is None else x + update
        normed = layer_norm(total, [C], weight, bias, eps)

    Args:
        x: [T, C] residual stream, fp16, bf16, fp32 or fp64, any strides. T may be 0.
        update: [T, C] what is added to it, or None; as all that follows of x's dtype and device.
        weight: [C] scale of the norm.
        bias: [C] added to it, or None.
        eps: added to the variance.
        backend: "auto" or a backend's name. "auto" is plain PyTorch for few elements, for rows of more than 16384, and
            under ``torch.compile`` and ``torch.autocast``.

    Returns:
        (total, normed), both [T, C] in x's dtype; total is x itself where there is no update. By a backend's name the
        norm is that of the rounded total, taken in fp32 (fp64 for fp64 inputs) and rounded once, as are all gradients;
        those of weight and bias are sums over the rows in an order that the sizes alone decide.

    Under ``torch.autocast`` "auto" goes by PyTorch's rules, which on a GPU keep the stream and its norm in fp32; a
    backend that is asked for by name casts everything to autocast's dtype, with fp32 inside.

    Raises:
        ValueError: a wrong shape, dtype or device, or eps below 0.
        RuntimeError: "triton" with rows of more than 16384 elements.
    """
    if backend == "auto" and autocast.active(x):
        return _plain(x, update, weight, bias, eps)
    x, update, weight, bias = autocast.together(x, update, weight, bias)
    checks.shape("x", x, "T", "C")
    checks.dtype("x", x, checks.FLOATS)
    columns = x.shape[1]
    if columns == 0:
        raise ValueError(f"x: expected at least one column (C >= 1), got shape {list(x.shape)}")
    for name, value, sizes in (("update", update, x.shape), ("weight", weight, [columns]), ("bias", bias, [columns])):
        if value is not None or name == "weight":
            checks.shape(name, value, *sizes)
            checks.dtype(name, value, x.dtype)
            checks.device(name, value, x.device)
    checks.number("eps", eps, 0.0)
    if dispatch.left_to_pytorch(x, backend) or (backend == "auto" and columns > WIDEST):
        return _plain(x, update, weight, bias, eps)
    total, normed, _ = OPERATOR(x, update, weight, bias, float(eps), backend)
    return x if update is None else total, normed
