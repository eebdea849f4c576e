"""Log-probabilities of given tokens under a linear head, in plain PyTorch: the specification of `linear_logprob`.

Rows are processed in chunks, so that R x V logits never exist at once; the backward pass recomputes each chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**24
"""Number of logits that exist at the same time (64 MiB in fp32)."""


def chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of rows with at most CHUNK logits each (at least one row)."""
    step = max(1, CHUNK // vocabulary)
    return (slice(first, first + step) for first in range(0, rows, step))


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (log p(target) [R], normaliser [2, R], entropy [R] in nats, arg-max [R]); the last two may be empty.

    Entropy and arg-max are empty without ``statistics``. The normaliser is the largest logit m and
    log sum exp(logit - m). Their sum, the log-sum-exp, would lose the second if the first is large, and with it the
    backward pass's probabilities.
    """
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), len(hidden)
    wide = weight.to(dtype)
    logprobs, normaliser = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(2, rows, dtype=dtype)
    entropy = hidden.new_empty(rows if statistics else 0, dtype=dtype)
    best = targets.new_empty(rows if statistics else 0)
    for chunk in chunks(rows, len(weight)):
        logits = hidden[chunk].to(dtype) @ wide.T
        largest = logits.amax(-1)
        scores = logits - largest[:, None]
        log_sum = scores.exp().sum(-1).log()
        normaliser[0, chunk], normaliser[1, chunk] = largest, log_sum
        scores = scores - log_sum[:, None]  # not in place: autograd differentiates this, too
        logprobs[chunk] = scores.gather(-1, targets[chunk, None]).squeeze(-1)
        if statistics:
            # A score of minus infinity has probability 0 and no part in the entropy; their product would be NaN.
            entropy[chunk] = -(scores.exp() * scores.masked_fill(scores == float("-inf"), 0.0)).sum(-1)
            best[chunk] = logits.argmax(-1)
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
    """Return the gradients of hidden [R, C] and weight [V, C], empty if not needed.

    d log p(t) / d logits = onehot(t) - softmax(logits).
    """
    dtype = normaliser.dtype
    wide = weight.to(dtype)
    grad_hidden = (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if hidden_needed else hidden.new_empty(0)
    )
    grad_weight = torch.zeros(weight.shape if weight_needed else 0, dtype=dtype, device=weight.device)
    for chunk in chunks(len(hidden), len(weight)):
        rows, upstream = hidden[chunk].to(dtype), grad[chunk, None]
        scores = (rows @ wide.T).sub_(normaliser[0, chunk, None]).sub_(normaliser[1, chunk, None])
        grad_logits = scores.exp_().mul_(-upstream)
        grad_logits.scatter_add_(-1, targets[chunk, None], upstream)
        if hidden_needed:
            grad_hidden[chunk] = (grad_logits @ wide).to(hidden.dtype)
        if weight_needed:
            grad_weight += grad_logits.T @ rows
    return grad_hidden, grad_weight.to(weight.dtype)
