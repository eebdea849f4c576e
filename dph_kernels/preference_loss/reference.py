"""The joint preference objective in plain PyTorch: the specification of `preference_loss` (arXiv 2405.20053).

With s(x) = -(1 - eps) log sigmoid(x) - eps log sigmoid(-x) = softplus(-x) + eps x, the label-smoothed logistic loss:

    separable    L_DPH = s(r_w) + s(-r_l)               (equation of theorem 1)
    contrastive  L_DPH = s(r_w - r_l)                   (theorem 2)
    cDPO         L_DPO = s(beta d),  d = (log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PREFERENCE_METRICS = (
    "loss",
    "dph_loss",
    "dpo_loss",
    "reward_accuracy",
    "reward_margin",
    "reward_chosen",
    "reward_rejected",
    "implicit_accuracy",
    "implicit_margin",
    "implicit_chosen",
    "implicit_rejected",
    "finite",
)
"""The first metrics of the vector. Implicit rewards are beta (log pi - log pi_ref); `finite` is 1, or 0 if NaN or
infinity has reached the loss, computed on the device."""

HEAD_METRICS = ("dph_loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
"""The metrics of each reward head that follow, if there are several heads."""


def metric_names(heads: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the metrics of rewards [N, K], K = ``len(heads)``: ``reward_margin_NAME`` and the like."""
    several = heads if len(heads) > 1 else ()
    return PREFERENCE_METRICS + tuple(f"{metric}_{name}" for name in several for metric in HEAD_METRICS)


def sizes(rewards: Sequence[Tensor], logprobs: Sequence[Tensor]) -> tuple[int, int]:
    """Return the numbers of metrics and of slopes that ``forward`` returns."""
    shape = (*rewards, *logprobs)[0].shape
    heads = shape[1] if len(shape) == 2 else 1
    metrics = len(PREFERENCE_METRICS) + (len(HEAD_METRICS) * heads if heads > 1 else 0)
    return metrics, shape[0] * (len(rewards) * heads + len(logprobs) // 2)


class Options(NamedTuple):
    """Arguments of `preference_loss` besides tensors."""

    beta: float
    dpo_epsilon: float
    dph_epsilon: float
    dpo_weight: float
    dph_weight: float
    objective: str


def precision(inputs: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of loss and metrics: fp32, or fp64 if any input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def smoothed(x: Tensor, epsilon: float) -> Tensor:
    """Return s(x), exact for any size of x, since log sigmoid is computed as min(x, 0) - log1p(exp(-|x|)).

    Not softplus(-x) + eps x, which is the difference of two infinities at minus infinity. Without smoothing the second
    term is left out: at infinity it would be 0 times infinity.
    """
    loss = -(1 - epsilon) * logsigmoid(x)
    return loss - epsilon * logsigmoid(-x) if epsilon else loss


def smoothed_slope(x: Tensor, epsilon: float) -> Tensor:
    """Return ds/dx = eps - sigmoid(-x)."""
    return epsilon - torch.sigmoid(-x)


def accuracy_of(margin: Tensor) -> Tensor:
    """Return 1 for each margin above 0, else 0: a tie is wrong, and NaN stays NaN."""
    return torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype))


def logistic(chosen: Tensor, rejected: Tensor, epsilon: float, objective: str) -> Tensor:
    """Return the mean loss over all pairs and heads."""
    if objective == "contrastive":
        return smoothed(chosen - rejected, epsilon).mean()
    return (smoothed(chosen, epsilon) + smoothed(-rejected, epsilon)).mean()


def slopes(chosen: Tensor, rejected: Tensor, epsilon: float, objective: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``logistic`` with respect to chosen and rejected."""
    if objective == "contrastive":
        slope = smoothed_slope(chosen - rejected, epsilon) / chosen.numel()
        return slope, -slope
    return smoothed_slope(chosen, epsilon) / chosen.numel(), -smoothed_slope(-rejected, epsilon) / chosen.numel()


def implicit(beta: float, dtype: torch.dtype, logprobs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return implicit rewards beta (log pi - log pi_ref) of chosen and rejected; cDPO is contrastive on them."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (x.to(dtype) for x in logprobs)
    return beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)


def summary(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """Return accuracy, mean margin, mean of chosen and of rejected."""
    return [accuracy_of(chosen - rejected).mean(), (chosen - rejected).mean(), chosen.mean(), rejected.mean()]


def forward(*, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, metrics, slopes) in ``precision``.

    Args:
        rewards: of chosen and rejected, [N] or [N, K]; empty: that part is off, which adds nothing to the loss and has
            NaN metrics.
        logprobs: of the policy on chosen and rejected, of the reference on chosen and rejected, [N]; or empty.
        options: the fields of :class:`Options`, see `preference_loss`.

    Returns:
        The loss; the metrics that `metric_names` lists; and the gradients of the loss with respect to both rewards and
        both log-probabilities of the policy, as far as they are given, flattened and concatenated.
    """
    options, inputs = Options(**options), (*rewards, *logprobs)
    dtype = precision(inputs)
    loss = torch.zeros((), dtype=dtype, device=inputs[0].device)
    off = torch.full_like(loss, torch.nan)
    dph_loss, dpo_loss, explicit, implied, heads = off, off, [off] * 4, [off] * 4, []
    if rewards:
        chosen, rejected = (x.to(dtype) for x in rewards)
        dph_loss, explicit = (
            logistic(chosen, rejected, options.dph_epsilon, options.objective),
            summary(chosen, rejected),
        )
        loss = loss + options.dph_weight * dph_loss
        if chosen.dim() == 2 and chosen.shape[1] > 1:
            for pair in zip(chosen.unbind(1), rejected.unbind(1), strict=True):
                heads += [logistic(*pair, options.dph_epsilon, options.objective), *summary(*pair)]
    if logprobs:
        pair = implicit(options.beta, dtype, logprobs)
        dpo_loss, implied = logistic(*pair, options.dpo_epsilon, "contrastive"), summary(*pair)
        loss = loss + options.dpo_weight * dpo_loss
    metrics = [loss, dph_loss, dpo_loss, *explicit, *implied, loss.isfinite().to(dtype), *heads]
    grads = gradients(torch.ones_like(loss), rewards, logprobs, options)
    return loss, torch.stack(metrics), torch.cat([grad.flatten() for grad in grads])


def backward(slopes: Tensor, grad: Tensor, judged: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``judged``, the inputs of ``slopes``, for the gradient ``grad`` of the loss."""
    grads = (slopes * grad).split_with_sizes([x.numel() for x in judged])
    return [x.view_as(like) for x, like in zip(grads, judged, strict=True)]


def gradients(grad: Tensor, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options) -> list[Tensor]:
    """Return the gradients of both rewards and both log-probabilities of the policy, in the dtype of ``grad``.

    Those of the reference's log-probabilities are the policy's with the opposite sign. Differentiable itself.
    """
    grads = []
    if rewards:
        pair = (x.to(grad.dtype) for x in rewards)
        grads += [grad * options.dph_weight * x for x in slopes(*pair, options.dph_epsilon, options.objective)]
    if logprobs:
        pair = implicit(options.beta, grad.dtype, logprobs)
        scale = grad * options.dpo_weight * options.beta
        grads += [scale * x for x in slopes(*pair, options.dpo_epsilon, "contrastive")]
    return grads
