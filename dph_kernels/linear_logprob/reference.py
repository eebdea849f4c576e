"""Log-probabilities of given tokens under a linear head, in plain PyTorch: the specification of `linear_logprob`.

Rows go through in chunks, so that R x V logits never exist at once; the backward pass computes each chunk anew.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**24
"""Logits that exist at one time (64 MiB in fp32)."""


def chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows with at most CHUNK logits each (at least one row)."""
    step = max(1, CHUNK // vocabulary)
    return (slice(first, first + step) for first in range(0, rows, step))


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p(target) [R], log-sum-exp [R], entropy [R] in nats, arg-max [R]); the last two empty without statistics."""
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), len(hidden)
    wide = weight.to(dtype)
    logprobs, normaliser = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype)
    entropy = hidden.new_empty(rows if statistics else 0, dtype=dtype)
    best = targets.new_empty(rows if statistics else 0)
    for part in chunks(rows, len(weight)):
        logits = hidden[part].to(dtype) @ wide.T
        scores = logits.log_softmax(-1).clamp_(max=0)
        logprobs[part] = scores.gather(-1, targets[part, None]).squeeze(-1)
        normaliser[part] = logits.logsumexp(-1)
        if statistics:
            entropy[part] = -(scores.exp() * scores).sum(-1)
            best[part] = logits.argmax(-1)
    return logprobs, normaliser, entropy, best


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [R, C] and weight [V, C], empty where not needed.

    d log p(t) / d logits = onehot(t) - softmax(logits).
    """
    dtype = normaliser.dtype
    wide = weight.to(dtype)
    grad_hidden = (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if hidden_needed else grad.new_empty(0)
    )
    grad_weight = torch.zeros(weight.shape if weight_needed else 0, dtype=dtype, device=weight.device)
    for part in chunks(len(hidden), len(weight)):
        rows, upstream = hidden[part].to(dtype), grad[part, None]
        logits = rows @ wide.T
        grad_logits = (logits - normaliser[part, None]).exp_().mul_(-upstream)
        grad_logits.scatter_add_(-1, targets[part, None], upstream)
        if hidden_needed:
            grad_hidden[part] = (grad_logits @ wide).to(hidden.dtype)
        if weight_needed:
            grad_weight += grad_logits.T @ rows
    return grad_hidden, grad_weight.to(weight.dtype)
