"""Residual connection and the LayerNorm or RMSNorm after it, one pass forward and one backward."""

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels.operator import Gradient, Inputs, Operator
from dph_kernels.residual_norm import reference
from dph_kernels.torch_private import forward_mode_level

KINDS = ("layer", "rms")
WIDEST = 16384  # elements of a row that a Triton program holds in registers


def _fake(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, normed, moments [2, ...], or [1, ...] of kind "rms", read as the kind by the backward pass)."""
    return reference.results(x, update, kind)


def _fake_backward(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    moments: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x and update, weight, bias)."""
    return reference.gradients(total, weight, needs)


def _setup(ctx: FunctionCtx, output: tuple[Tensor, Tensor, Tensor], inputs: Inputs) -> None:
    x, update = inputs["x"], inputs["update"]
    total, _normed, moments = output
    ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
    total_has_gradient = update is not None and (x.requires_grad or update.requires_grad)
    ctx.mark_non_differentiable(moments, *(() if total_has_gradient else (total,)))
    ctx.save_for_backward(x if update is None else total, inputs["weight"], moments)


def _compute(
    ctx: FunctionCtx,
    needs: Inputs,
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    d_total: Tensor | None,
    d_normed: Tensor | None,
    *_: None,
) -> Inputs:
    total, weight, moments = ctx.saved_tensors
    needed = [needs["x"] or needs["update"], needs["weight"], needs["bias"]]
    d_x, d_weight, d_bias = d_total, None, None
    if d_normed is not None:
        d_x, d_weight, d_bias = backward(
            d_total=d_total,
            d_normed=d_normed,
            total=total,
            weight=weight,
            moments=moments,
            needs=needed,
        )
    grads = {"x": d_x, "update": d_x, "weight": d_weight, "bias": d_bias}
    return {name: grad for name, grad in grads.items() if needs[name]}


OPERATOR = Operator(
    "residual_norm",
    fake=_fake,
    like=itemgetter("x"),
    gradient=Gradient(
        setup=_setup,
        compute=_compute,
        fake=_fake_backward,
        like="total",
        upstream=("d_total", "d_normed"),
        differentiable=2,
    ),
)


def _plain(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_dynamo_compiling() and forward_mode_level() >= 0:
        # The tangent of PyTorch's layer_norm has wrong gradients (2.13).
        total, normed, _ = reference.forward(x, update, weight, bias, eps, kind)
        return x if update is None else total, normed
    total = x if update is None else x + update
    if kind == "rms":
        return total, torch.nn.functional.rms_norm(total, total.shape[-1:], weight, eps)
    return total, torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    kind: str = "layer",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a residual and apply LayerNorm or RMSNorm to the sum::

        total = x if update is None else x + update
        normed = layer_norm(total, [C], weight, bias, eps)  # kind "layer"
        normed = total * rsqrt(mean(total ** 2) + eps) * weight  # kind "rms"

    Args:
        x: [T, C] residual stream, or [T, H, C] for a norm of each head (queries, keys), fp16, bf16, fp32 or fp64. T may
            be 0. Strides may be any: a slice [T, H, C] of a joint projection is read in place, while rows whose
            elements are not contiguous are copied.
        update: added to x, of its shape, or None. All tensors have x's dtype and device.
        weight: [C] scale of the norm.
        bias: [C] added to the norm, or None; kind "rms" has none.
        eps: added to the variance, or to the mean square.
        kind: "layer", or "rms" for RMSNorm (https://arxiv.org/abs/1910.07467) without mean and bias.
        backend: "auto" or a backend's name. "auto" is plain PyTorch for few elements (of kind "rms" only on a GPU),
            for rows of more than 16384, and under ``torch.compile`` and ``torch.autocast``.

    Returns:
        (total, normed), both of the shape and dtype of x; total is x itself if there is no update. With a backend's
        name the norm is that of the rounded total, computed in fp32 (fp64 for fp64 inputs) and rounded once, as are all
        gradients; those of weight and bias are sums over the rows in an order that depends on the sizes alone.

    In half precision ``LlamaRMSNorm`` of transformers rounds ``total * rsqrt(...)`` before the product with the weight,
    which is rounded again: a relative error of up to eps of the dtype instead of half of it, so that some elements
    differ from those here in the last bit. In fp32 there is no such difference.

    Under ``torch.autocast`` "auto" follows PyTorch's rules, which on a GPU keep the stream and its norm in fp32; a
    backend that is requested by name casts all tensors to autocast's dtype and computes in fp32.

    Raises:
        ValueError: a wrong shape, dtype or device, eps below 0, an unknown kind, or a bias of kind "rms".
        RuntimeError: "triton" with rows of more than 16384 elements.
    """
    if backend == "auto" and not torch.compiler.is_compiling() and (usual := dispatch.usual_call("residual_norm")):
        few = 0 if dispatch.is_batch_invariant() else dispatch.SMALL_ELEMENTS
        if results := usual(x, update, weight, bias, eps, kind, few):
            return results
    checks.option("kind", kind, KINDS)
    if kind == "rms" and bias is not None:
        raise ValueError(f"bias: expected None with kind 'rms', got a {type(bias).__name__}")
    if checks.autocast_active(x):
        if backend == "auto":
            return _plain(x, update, weight, bias, eps, kind)
        x, update, weight, bias = checks.cast_together(x, update, weight, bias)
    sizes = checks.sizes("x", x)
    if len(sizes) not in (2, 3):
        raise ValueError(f"x: expected shape [T, C] or [T, H, C], got {list(sizes)}")
    checks.dtype("x", x, checks.FLOATS)
    columns = sizes[-1]
    if columns == 0:
        raise ValueError(f"x: expected at least one column (C >= 1), got shape {list(sizes)}")
    for name, value, expected in (("update", update, sizes), ("weight", weight, [columns]), ("bias", bias, [columns])):
        if value is not None or name == "weight":
            checks.shape(name, value, *expected)
            checks.dtype(name, value, x.dtype)
            checks.device(name, value, x.device)
    checks.number("eps", eps, 0.0)
    few = dispatch.prefer_pytorch("residual_norm", x, backend, everywhere=kind == "layer")
    if few or (backend == "auto" and columns > WIDEST):
        checks.require_memory(x=x, update=update, weight=weight, bias=bias)
        return _plain(x, update, weight, bias, eps, kind)
    total, normed, _ = OPERATOR(
        x=x, update=update, weight=weight, bias=bias, eps=float(eps), kind=kind, backend=backend
    )
    return x if update is None else total, normed
