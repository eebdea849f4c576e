"""The joint preference objective in plain PyTorch: the specification of `preference_loss` (arXiv 2405.20053).

With s(x) = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x) = softplus(-x) + eps x, the label-smoothed logistic loss:

    separable    L_DPH = s(r_w) + s(-r_l)               (equation of theorem 1)
    contrastive  L_DPH = s(r_w - r_l)                   (theorem 2)
    cDPO         L_DPO = s(beta d),  d = (log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def smoothed(x: Tensor, epsilon: float) -> Tensor:
    """s(x); exact for any size of x, since log sigmoid is taken as min(x, 0) - log1p(exp(-|x|))."""
    return epsilon * x - logsigmoid(x)


def smoothed_slope(x: Tensor, epsilon: float) -> Tensor:
    """ds/dx = eps - sigmoid(-x)."""
    return epsilon - torch.sigmoid(-x)


def accuracy(margin: Tensor) -> Tensor:
    """The share of pairs whose margin is above 0; a tie is wrong, and NaN stays NaN."""
    return torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype)).mean()


def logistic(chosen: Tensor, rejected: Tensor, epsilon: float, objective: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss over all pairs and heads, its gradient in chosen, its gradient in rejected)."""
    if objective == "contrastive":
        margin = chosen - rejected
        slope = smoothed_slope(margin, epsilon) / margin.numel()
        return smoothed(margin, epsilon).mean(), slope, -slope
    loss = smoothed(chosen, epsilon) + smoothed(-rejected, epsilon)
    slopes = smoothed_slope(chosen, epsilon), -smoothed_slope(-rejected, epsilon)
    return loss.mean(), slopes[0] / loss.numel(), slopes[1] / loss.numel()


def summary(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """Accuracy, mean margin, mean of chosen and of rejected."""
    return [accuracy(chosen - rejected), (chosen - rejected).mean(), chosen.mean(), rejected.mean()]


def forward(
    rewards_chosen: Tensor | None,
    rewards_rejected: Tensor | None,
    policy_chosen: Tensor | None,
    policy_rejected: Tensor | None,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    beta: float,
    dpo_epsilon: float,
    dph_epsilon: float,
    objective: str,
    dpo_weight: float,
    dph_weight: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, its gradients in rewards_chosen, rewards_rejected and policy_chosen), all in ``dtype``.

    A part that is off (None) adds nothing to the loss, and gives NaN metrics and an empty gradient.
    """
    device = (policy_chosen if rewards_chosen is None else rewards_chosen).device
    loss, off = torch.zeros((), dtype=dtype, device=device), torch.full((), torch.nan, dtype=dtype, device=device)
    dph_loss, rewards, grads = off, [off] * 4, [loss.new_empty(0) for _ in range(3)]
    dpo_loss, implicit = off, [off] * 4
    if rewards_chosen is not None:
        chosen, rejected = rewards_chosen.to(dtype), rewards_rejected.to(dtype)
        dph_loss, *slopes = logistic(chosen, rejected, dph_epsilon, objective)
        loss, rewards = loss + dph_weight * dph_loss, summary(chosen, rejected)
        grads[:2] = (dph_weight * slope for slope in slopes)
    if policy_chosen is not None:
        # cDPO is the contrastive objective on the implicit rewards beta (log pi - log pi_ref).
        chosen = beta * (policy_chosen.to(dtype) - reference_chosen.to(dtype))
        rejected = beta * (policy_rejected.to(dtype) - reference_rejected.to(dtype))
        dpo_loss, slope, _ = logistic(chosen, rejected, dpo_epsilon, "contrastive")
        loss, implicit = loss + dpo_weight * dpo_loss, summary(chosen, rejected)
        grads[2] = dpo_weight * beta * slope
    metrics = torch.stack([loss, dph_loss, dpo_loss, *rewards, *implicit, loss.isfinite().to(dtype)])
    return loss, metrics, *grads


def backward(
    grad: Tensor, grad_chosen: Tensor, grad_rejected: Tensor, grad_policy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass's gradients times the loss's own."""
    return grad * grad_chosen, grad * grad_rejected, grad * grad_policy
