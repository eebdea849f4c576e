"""Objectives as functions (arXiv 2405.20053, section 3) on top of `dph_kernels.preference_loss`."""

import torch
from torch import Tensor

from dph_kernels import checks
from dph_kernels.preference_loss import preference_loss

IGNORED = -100
"""Target that is left out, as in PyTorch's cross-entropy."""


def sequence_logprobs(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    """Log-probability of each sequence's targets: [B] in nats, fp32 (fp64 for fp64 logits).

    Training uses `dph_kernels.linear_logprob` instead, which computes log-probabilities without building the logits.

    Args:
        logits: [B, S, V], row i predicting targets[i].
        targets: [B, S] int64, already shifted; -100 is ignored.
        reduction: "sum" or "mean" over the targets that are not ignored. Without any, the sum is 0 and the mean NaN.

    Raises:
        ValueError: wrong shape, dtype, device or reduction; on the CPU also a target outside [0, V) other than -100.
    """
    checks.option("reduction", reduction, ("sum", "mean"))
    checks.shape("logits", logits, "B", "S", "V")
    checks.dtype("logits", logits, checks.FLOATS)
    checks.shape("targets", targets, *logits.shape[:2])
    checks.dtype("targets", targets, torch.int64)
    checks.device("targets", targets, logits.device)
    counted = targets != IGNORED  # [B, S]
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = counted & ((targets < 0) | (targets >= logits.shape[2]))
        if wrong.any():
            expected = f"values in [0, {logits.shape[2]}) or {IGNORED}"
            raise ValueError(f"targets: expected {expected}, got {targets[wrong][0].item()}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    sums = -losses.view(targets.shape).sum(1)
    return sums if reduction == "sum" else sums / counted.sum(1)


def dph_loss(chosen: Tensor, rejected: Tensor, epsilon: float = 0.1, objective: str = "separable") -> Tensor:
    """Reward-head loss (scalar) of rewards [N] or [N, K]: "separable" (theorem 1) or "contrastive" (theorem 2).

    Raises:
        ValueError: as `preference_loss`.
    """
    return preference_loss(chosen, rejected, dph_epsilon=epsilon, objective=objective)[0]


def cdpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.6,
    epsilon: float = 0.25,
) -> Tensor:
    """Conservative DPO loss (scalar) of sequence log-probabilities [N] in nats (DPO with label smoothing epsilon).

    Raises:
        ValueError: as `preference_loss`.
    """
    logprobs = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return preference_loss(None, None, *logprobs, beta=beta, dpo_epsilon=epsilon)[0]
