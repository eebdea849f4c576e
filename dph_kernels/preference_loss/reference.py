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


def curvature(x: Tensor) -> Tensor:
    """d2s/dx2 = sigmoid(x) sigmoid(-x), whatever epsilon."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def logistic(chosen: Tensor, rejected: Tensor, epsilon: float, objective: str) -> Tensor:
    """Mean loss over all pairs and heads."""
    if objective == "contrastive":
        return smoothed(chosen - rejected, epsilon).mean()
    return (smoothed(chosen, epsilon) + smoothed(-rejected, epsilon)).mean()


def slopes(chosen: Tensor, rejected: Tensor, epsilon: float, objective: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``logistic`` in chosen and in rejected."""
    if objective == "contrastive":
        slope = smoothed_slope(chosen - rejected, epsilon) / chosen.numel()
        return slope, -slope
    return smoothed_slope(chosen, epsilon) / chosen.numel(), -smoothed_slope(-rejected, epsilon) / chosen.numel()


def bend(
    chosen: Tensor, rejected: Tensor, objective: str, along_chosen: Tensor, along_rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """The Hessian of ``logistic`` times a direction, in chosen and in rejected."""
    if objective == "contrastive":
        product = curvature(chosen - rejected) * (along_chosen - along_rejected) / chosen.numel()
        return product, -product
    return curvature(chosen) * along_chosen / chosen.numel(), curvature(rejected) * along_rejected / chosen.numel()


def implicit(beta: float, dtype: torch.dtype, *logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Implicit rewards beta (log pi - log pi_ref) of chosen and rejected; cDPO is contrastive on them."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (x.to(dtype) for x in logprobs)
    return beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)


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
) -> tuple[Tensor, Tensor]:
    """(loss, metrics), both in ``dtype``. A part that is off (None) adds nothing to the loss; its metrics are 0."""
    device = (policy_chosen if rewards_chosen is None else rewards_chosen).device
    loss = off = torch.zeros((), dtype=dtype, device=device)
    dph_loss, dpo_loss, explicit, implied = off, off, [off] * 4, [off] * 4
    if rewards_chosen is not None:
        rewards = rewards_chosen.to(dtype), rewards_rejected.to(dtype)
        dph_loss, explicit = logistic(*rewards, dph_epsilon, objective), summary(*rewards)
        loss = loss + dph_weight * dph_loss
    if policy_chosen is not None:
        rewards = implicit(beta, dtype, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        dpo_loss, implied = logistic(*rewards, dpo_epsilon, "contrastive"), summary(*rewards)
        loss = loss + dpo_weight * dpo_loss
    return loss, torch.stack([loss, dph_loss, dpo_loss, *explicit, *implied, loss.isfinite().to(dtype)])


def backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in rewards_chosen, rewards_rejected and policy_chosen, in the dtype of ``grad``; empty for what is off.

    Those of the other log-probabilities are the last one's but for the sign.
    """
    grads = [grad.new_empty(0) for _ in range(3)]
    if rewards_chosen is not None:
        rewards = rewards_chosen.to(grad.dtype), rewards_rejected.to(grad.dtype)
        grads[:2] = (grad * dph_weight * slope for slope in slopes(*rewards, dph_epsilon, objective))
    if policy_chosen is not None:
        rewards = implicit(beta, grad.dtype, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        grads[2] = grad * dpo_weight * beta * slopes(*rewards, dpo_epsilon, "contrastive")[0]
    return tuple(grads)


def double_backward(
    along: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``backward`` in grad and its three inputs: the slopes and the Hessian along a direction.

    Plain differentiable PyTorch, so that third derivatives are right too.
    """
    logprobs = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    options = (beta, dpo_epsilon, dph_epsilon, objective, dpo_weight, dph_weight)
    slope = backward(torch.ones_like(grad), rewards_chosen, rewards_rejected, *logprobs, *options)
    grads = [(a * s).sum() for a, s in zip(along, slope, strict=True)]
    grads = [sum(grads), *(grad.new_empty(0) for _ in range(3))]
    if rewards_chosen is not None:
        rewards = rewards_chosen.to(grad.dtype), rewards_rejected.to(grad.dtype)
        grads[1:3] = (grad * dph_weight * bent for bent in bend(*rewards, objective, *along[:2]))
    if policy_chosen is not None:
        rewards = implicit(beta, grad.dtype, *logprobs)
        bent, _ = bend(*rewards, "contrastive", along[2], torch.zeros_like(along[2]))
        grads[3] = grad * dpo_weight * beta**2 * bent
    return tuple(grads)
