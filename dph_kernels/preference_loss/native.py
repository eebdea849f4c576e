"""The joint preference objective by csrc/cpu/preference_loss.cpp: fp32 or bf16 of any strides, fp32 arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss.reference import HEAD_METRICS, PREFERENCE_METRICS

SCALAR = torch.empty((), dtype=torch.float32, device="cpu")  # torch.empty_like takes half the time of new_empty


def forward(
    *,
    rewards: Sequence[Tensor],
    logprobs: Sequence[Tensor],
    beta: float,
    dpo_epsilon: float,
    dph_epsilon: float,
    dpo_weight: float,
    dph_weight: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    inputs, options = (*rewards, *logprobs), (beta, dpo_epsilon, dph_epsilon, dpo_weight, dph_weight, objective)
    pairs, *more = inputs[0].shape
    heads = more[0] if more else 1
    metric_count = len(PREFERENCE_METRICS) + (len(HEAD_METRICS) * heads if heads > 1 else 0)
    slope_count = pairs * (len(rewards) * heads + len(logprobs) // 2)
    loss = torch.empty_like(SCALAR)
    metrics, slopes = loss.new_empty(metric_count), loss.new_empty(slope_count)
    arguments = len(rewards), options, loss, metrics, slopes, native.threads()
    if not native.module().preference_loss_cpu(inputs, *arguments):
        native.module().preference_loss_cpu(tuple(x.float() for x in inputs), *arguments)
    return loss, metrics, slopes


def backward(slopes: Tensor, grad: Tensor, judged: Sequence[Tensor]) -> list[Tensor]:
    """Same results as ``reference.backward``."""
    grads = []
    for x in judged:
        grads.append(slopes.new_empty(*x.shape))  # a torch.Size would cost 1 us more
    if native.module().preference_loss_gradients_cpu(slopes, grad, grads, native.threads()):
        return grads
    return reference.backward(slopes, grad, judged)  # a batch of gradients (vmap), or slopes changed by hooks
