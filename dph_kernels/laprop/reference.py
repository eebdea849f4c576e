"""LaProp in plain PyTorch: the specification (LaProp: arXiv 2002.04839; prior decay: arXiv 2405.20053)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor],
    copies: Sequence[Tensor],
    grad_scale: Tensor | None,
    clock: Tensor | None,
    rate: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    prior_decay: float,
    bias_correction: float,
    momentum_scale: float,
) -> None:
    """One step, in place, in the precision of ``params``; ``priors`` and ``copies`` may be empty."""
    if grad_scale is not None and not bool(torch.isfinite(grad_scale)):
        return
    if clock is not None:
        lr = lr if rate is None else float(rate)
        step, rate_average = clock.tolist()
        step, rate_average = step + 1, beta1 * rate_average + (1 - beta1) * lr
        clock.copy_(torch.tensor([step, rate_average], dtype=clock.dtype))
        bias_correction = math.sqrt(1 - beta2**step)
        momentum_scale = lr / rate_average if lr != 0 else 1.0
    for i, (param, m, v) in enumerate(zip(params, exp_avg, exp_avg_sq, strict=True)):
        grad = grads[i].to(param.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        m.mul_(beta1).add_(grad / (v.sqrt() + eps), alpha=(1 - beta1) * lr * bias_correction)
        update = momentum_scale * m
        if priors:
            update = update + prior_decay * lr * (param - priors[i].to(param.dtype))
        if weight_decay:
            update = update + weight_decay * lr * param
        param.sub_(update)
        if copies:
            copies[i].copy_(param)


def gradient_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Norm [] in fp64, min(1, max_norm / norm) [1] in fp32 or NaN, and whether the norm is finite []."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    finite = torch.isfinite(norm)
    scale = torch.where(finite, torch.where(norm > max_norm, max_norm / norm, 1.0), math.nan)
    return norm, scale.float().reshape(1), finite
