"""Residual connection and LayerNorm in plain PyTorch: the specification of `residual_norm`."""

from collections.abc import Sequence

import torch
from torch import Tensor

X, WEIGHT, BIAS = range(3)


def results(x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of ``forward``."""
    moments = x.new_empty(2, len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    # Sizes one by one: PyTorch takes 1 us longer to read a torch.Size.
    total = x.new_empty(0) if update is None else x.new_empty(*x.shape)
    return total, x.new_empty(*x.shape), moments


def gradients(total: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the results of ``backward``."""
    likes = total, weight, weight
    return tuple(x.new_empty(*(x.shape if need else (0,))) for x, need in zip(likes, needs, strict=True))


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (total, normed, [mean, 1 / standard deviation] [2, T]); total is empty if there is no update."""
    total = x if update is None else (x + update).contiguous()
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    normed = centred * rstd * weight
    if bias is not None:
        normed = normed + bias
    moments = torch.cat([mean, rstd], 1).T.contiguous()
    return x.new_empty(0) if update is None else total, normed.to(x.dtype).contiguous(), moments


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x and update, weight, bias), empty unless ``needs``."""
    mean, rstd = moments[:, :, None]
    grad, normed = d_normed.to(moments.dtype), (total.to(moments.dtype) - mean) * rstd
    d_x, d_weight, d_bias = (total.new_empty(0) for _ in needs)
    if needs[X]:
        g = grad * weight
        d_x = rstd * (g - g.mean(1, keepdim=True) - normed * (g * normed).mean(1, keepdim=True))
        d_x = (d_x if d_total is None else d_x + d_total).to(total.dtype).contiguous()
    if needs[WEIGHT]:
        d_weight = (grad * normed).sum(0).to(total.dtype)
    if needs[BIAS]:
        d_bias = grad.sum(0).to(total.dtype)
    return d_x, d_weight, d_bias
