"""LaProp in plain PyTorch: the specification (SPEC.md 4; LaProp: arXiv 2002.04839; prior decay: arXiv 2405.20053)."""

from collections.abc import Sequence

from torch import Tensor


def forward(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor],
    copies: Sequence[Tensor],
    grad_scale: Tensor | None,
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
    for i, (param, m, v) in enumerate(zip(params, exp_avg, exp_avg_sq, strict=True)):
        grad = grads[i].to(param.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        m.mul_(beta1).add_(grad / (v.sqrt() + eps), alpha=(1 - beta1) * lr * bias_correction)
        update = momentum_scale * m
        if priors:
            update = update + prior_decay * lr * (param - priors[i])
        if weight_decay:
            update = update + weight_decay * lr * param
        param.sub_(update)
        if copies:
            copies[i].copy_(param)
