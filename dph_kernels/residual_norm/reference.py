"""Residual connection and LayerNorm or RMSNorm in plain PyTorch: the specification of `residual_norm`."""

from collections.abc import Sequence

import torch
from torch import Tensor

X, WEIGHT, BIAS = range(3)


def results(x: Tensor, update: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of ``forward``."""
    # Sizes one by one: PyTorch takes 1 us longer to read a torch.Size.
    dtype = torch.promote_types(x.dtype, torch.float32)
    moments = x.new_empty(1 if kind == "rms" else 2, *x.shape[:-1], dtype=dtype)
    total = x.new_empty(0) if update is None else x.new_empty(*x.shape)
    return total, x.new_empty(*x.shape), moments


def gradients(total: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of ``backward``."""
    likes = total, weight, weight
    return tuple(x.new_empty(*(x.shape if need else (0,))) for x, need in zip(likes, needs, strict=True))


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (total, normed, moments); total is empty if there is no update.

    Moments are mean and 1 / standard deviation, [2, T] or [2, T, H]; 1 / root mean square alone, [1, ...], of kind
    "rms".
    """
    total = x if update is None else (x + update).contiguous()
    centred, moments = total.to(torch.promote_types(x.dtype, torch.float32)), []
    if kind == "layer":
        moments.append(centred.mean(-1, keepdim=True))
        centred = centred - moments[0]
    moments.append((centred.square().mean(-1, keepdim=True) + eps).rsqrt())
    normed = centred * moments[-1] * weight
    if bias is not None:
        normed = normed + bias
    total = x.new_empty(0) if update is None else total
    return total, normed.to(x.dtype).contiguous(), torch.stack(moments).squeeze(-1)


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x and update, weight, bias), empty unless ``needs``."""
    *mean, rstd = moments[..., None]  # of kind "rms" no mean
    centred = total.to(moments.dtype)
    for average in mean:
        centred = centred - average
    grad, normed = d_normed.to(moments.dtype), centred * rstd
    d_x, d_weight, d_bias = (total.new_empty(0) for _ in needs)
    if needs[X]:
        g = grad * weight
        slope = (g * normed).mean(-1, keepdim=True)
        if mean:
            g = g - g.mean(-1, keepdim=True)
        d_x = rstd * (g - normed * slope)
        d_x = (d_x if d_total is None else d_x + d_total).to(total.dtype).contiguous()
    if needs[WEIGHT]:
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(total.dtype)
    if needs[BIAS]:
        d_bias = grad.flatten(0, -2).sum(0).to(total.dtype)
    return d_x, d_weight, d_bias
