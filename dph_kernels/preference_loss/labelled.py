"""The joint preference objective of labelled answers, in plain PyTorch: weights by head, absent answers, margins.

Plain pairs, whose weights are all 1, have kernels; these numbers are few beside the model that computes the rewards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dph_kernels.preference_loss.reference import Options, accuracy_of, implicit, precision, smoothed


class Labels(NamedTuple):
    """Weights of N labels for K heads: each compares two answers, or marks one, whose other answer has reward 0.

    With e the label smoothing, s(x) = -(1-e) log sigmoid(x) - e log sigmoid(-x), and sums over the labels::

        separable    L_DPH = mean over heads of (chosen s(r_w) + rejected s(-r_l)) / totals[0]
        contrastive  L_DPH = mean over heads of chosen s(r_w - r_l - margin) / totals[0]
        cDPO         L_DPO = pairs s(beta d) / pair_total

    Attributes:
        chosen, rejected: [N, K] weights of both answers for the heads; 0 for an absent answer, and for a head that the
            label is not for. The contrastive objective needs both answers.
        pairs: [N] weights for cDPO.
        margin: [N] offsets of the contrastive objective.
        totals: [3, K] sums over all labels of (chosen + rejected) / 2, of chosen and of rejected: of a step, if it is
            computed in several calls, whose losses and metrics then add up. A head without labels adds nothing.
        pair_total: [] sum of ``pairs``.
    """

    chosen: Tensor
    rejected: Tensor
    pairs: Tensor
    margin: Tensor
    totals: Tensor
    pair_total: Tensor


def forward(
    rewards: Sequence[Tensor], logprobs: Sequence[Tensor], labels: Labels, options: Options
) -> tuple[Tensor, Tensor]:
    """Return (loss, metrics) as `preference_loss`; the metrics are weighted means, NaN for a head without labels."""
    dtype = precision((*rewards, *logprobs))
    weights = Labels(*(x.to(dtype) for x in labels))
    loss = torch.zeros((), dtype=dtype, device=labels.chosen.device)
    off = torch.full_like(loss, torch.nan)
    dph_loss, dpo_loss, explicit, implied, by_head = off, off, [off] * 4, [off] * 4, []
    if rewards:
        chosen, rejected = (x.to(dtype).view(len(x), -1) for x in rewards)  # [N, K]
        if options.objective == "contrastive":
            losses = weights.chosen * smoothed(chosen - rejected - weights.margin[:, None], options.dph_epsilon)
        else:
            losses = weights.chosen * smoothed(chosen, options.dph_epsilon)
            losses = losses + weights.rejected * smoothed(-rejected, options.dph_epsilon)
        # Without labels for a head, 0 / 1: the gradient of 0 / 0 would be NaN.
        dph_loss = (losses.sum(0) / torch.where(weights.totals[0] > 0, weights.totals[0], 1.0)).mean()
        loss = loss + options.dph_weight * dph_loss
        means = head_means(chosen.detach(), rejected.detach(), losses.detach(), weights)  # [5, K]
        counted = weights.totals[[0, 0, 1, 2]] > 0
        explicit = list(torch.where(counted, means[1:], 0.0).sum(1) / counted.sum(1))
        if means.shape[1] > 1:
            by_head = list(means.T.flatten())
    if logprobs:
        chosen, rejected = implicit(options.beta, dtype, logprobs)
        share, margin = weights.pairs / weights.pair_total, chosen - rejected
        dpo_loss = (share * smoothed(margin, options.dpo_epsilon)).sum()
        loss = loss + options.dpo_weight * dpo_loss
        implied = [(share * x).sum().detach() for x in (accuracy_of(margin), margin, chosen, rejected)]
    detached = loss.detach()
    metrics = [detached, dph_loss.detach(), dpo_loss.detach(), *explicit, *implied, detached.isfinite().to(dtype)]
    return loss, torch.stack([*metrics, *by_head])


def head_means(chosen: Tensor, rejected: Tensor, losses: Tensor, weights: Labels) -> Tensor:
    """Return the weighted means [5, K] in the order of HEAD_METRICS, of rewards and losses [N, K]."""
    both, margin = (weights.chosen + weights.rejected) / 2, chosen - rejected
    sums = [losses, both * accuracy_of(margin), both * margin, weights.chosen * chosen, weights.rejected * rejected]
    return torch.stack(sums).sum(1) / weights.totals[[0, 0, 0, 1, 2]]
