"""The joint preference objective of Direct Preference Heads: loss, gradients and logged metrics in one operator."""

import functools

import torch
from torch import Tensor

from dph_kernels import checks, dispatch
from dph_kernels.preference_loss import reference

OBJECTIVES = ("separable", "contrastive")
REWARDS = ("rewards_chosen", "rewards_rejected")
LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")

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
"""What the metrics vector holds, in order. Implicit rewards are beta (log pi - log pi_ref); `finite` is 1 or 0."""


def _precision(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of loss and metrics: fp32, or fp64 if any input is."""
    dtypes = (x.dtype for x in tensors if x is not None)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


@torch.library.custom_op("dph::preference_loss", mutates_args=())
def _forward(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (rewards_chosen, rewards_rejected, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    like = policy_chosen if rewards_chosen is None else rewards_chosen
    options = (beta, dpo_epsilon, dph_epsilon, objective, dpo_weight, dph_weight)
    return dispatch.call("forward", "preference_loss", like, backend, *inputs, *options, _precision(*inputs))


@_forward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (rewards_chosen, rewards_rejected, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    given, dtype = policy_chosen if rewards_chosen is None else rewards_chosen, _precision(*inputs)
    return given.new_empty((), dtype=dtype), given.new_empty(len(PREFERENCE_METRICS), dtype=dtype)


@torch.library.custom_op("dph::preference_loss_backward", mutates_args=())
def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (rewards_chosen, rewards_rejected, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    options = (beta, dpo_epsilon, dph_epsilon, objective, dpo_weight, dph_weight)
    like = policy_chosen if rewards_chosen is None else rewards_chosen
    return dispatch.call("backward", "preference_loss", like, backend, grad, *inputs, *options)


@_backward.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(grad.new_empty(0 if x is None else x.shape) for x in (rewards_chosen, rewards_rejected, policy_chosen))


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6])


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return *_share_out(grads, ctx.saved_tensors, ctx.needs_input_grad[:6]), *(None,) * 7


def _share_out(
    grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of all six inputs from the three that differ, each in its input's dtype."""
    chosen, rejected, policy = grads
    # d = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected): one slope, four signs.
    grads = (chosen, rejected, policy, -policy, -policy, policy.clone())
    return tuple(g.to(x.dtype) if need else None for g, x, need in zip(grads, inputs, needs, strict=True))


_forward.register_autograd(_gradients, setup_context=_setup)


def _setup_second(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[7:13]
    ctx.save_for_backward(*inputs[:7])


def _second(ctx: torch.autograd.function.FunctionCtx, *along: Tensor) -> tuple[Tensor | None, ...]:
    """Derivatives of the gradients, for Hessians and gradient penalties: rare, so plain PyTorch on every backend."""
    grad, *inputs = ctx.saved_tensors
    first, *grads = reference.double_backward(along, grad, *inputs, *ctx.options)
    shared = _share_out(tuple(grads), tuple(inputs), ctx.needs_input_grad[1:7])
    return first if ctx.needs_input_grad[0] else None, *shared, *(None,) * 7


_backward.register_autograd(_second, setup_context=_setup_second)


def _check_group(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors are there: all of one shape, dtype and device, or all None."""
    missing = [name for name, x in zip(names, tensors, strict=True) if x is None]
    if 0 < len(missing) < len(names):
        raise ValueError(f"{', '.join(missing)}: expected a tensor, as {', '.join(names)} come together, got None")
    if missing:
        return False
    checks.tensor(names[0], tensors[0])
    for name, x in zip(names, tensors, strict=True):
        checks.shape(name, x, *tensors[0].shape)
        checks.dtype(name, x, checks.FLOATS)
        checks.device(name, x, tensors[0].device)
    return True


def _check_tensors(rewards: tuple[Tensor | None, ...], logprobs: tuple[Tensor | None, ...]) -> None:
    """At least one part of the objective, at least one pair, and as many pairs in one part as in the other."""
    has_rewards, has_logprobs = _check_group(REWARDS, rewards), _check_group(LOGPROBS, logprobs)
    if not (has_rewards or has_logprobs):
        raise ValueError(
            "rewards_chosen, policy_chosen: expected at least one part of the objective, got None for both"
        )
    if has_rewards and rewards[0].dim() not in (1, 2):
        raise ValueError(f"rewards_chosen: expected shape [N] or [N, K], got {list(rewards[0].shape)}")
    if has_logprobs:
        checks.shape("policy_chosen", logprobs[0], rewards[0].shape[0] if has_rewards else "N")
    if has_logprobs and has_rewards:
        checks.device("policy_chosen", logprobs[0], rewards[0].device)
    name, first = ("rewards_chosen", rewards[0]) if has_rewards else ("policy_chosen", logprobs[0])
    if first.numel() == 0:
        raise ValueError(f"{name}: expected at least one pair, as the loss is a mean over pairs, got none")


def _blank(metrics: Tensor, off: tuple[str, ...]) -> Tensor:
    """NaN for the metrics whose names begin with one of ``off``; the operator gives 0."""
    metrics = metrics.clone()
    for i, name in enumerate(PREFERENCE_METRICS):
        if name.startswith(off):
            metrics[i] = torch.nan
    return metrics


def preference_loss(
    rewards_chosen: Tensor | None,
    rewards_rejected: Tensor | None,
    policy_chosen: Tensor | None = None,
    policy_rejected: Tensor | None = None,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.6,
    dpo_epsilon: float = 0.25,
    dph_epsilon: float = 0.1,
    objective: str = "separable",
    dpo_weight: float = 1.0,
    dph_weight: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``dpo_weight * L_cDPO + dph_weight * L_DPH`` and its metrics (arXiv 2405.20053, section 3)::

        ls = torch.nn.functional.logsigmoid
        separable:    L_DPH = -(1-e) ls(r_w) - e ls(-r_w) - e ls(r_l) - (1-e) ls(-r_l)
        contrastive:  L_DPH = -(1-e) ls(r_w - r_l) - e ls(r_l - r_w)
        d = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        cDPO:         L_cDPO = -(1-e) ls(beta d) - e ls(-beta d)

    Means are over the N pairs, and over the K heads where there are several.

    Args:
        rewards_chosen, rewards_rejected: [N] or [N, K] rewards of the preferred and the dispreferred answers;
            None for both turns the DPH part off.
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: [N] log-probabilities of the answers in
            nats; None for all turns the cDPO part off.
        beta: strength of the implicit reward, >= 0.
        dpo_epsilon, dph_epsilon: label smoothing of each part, the share of pairs assumed to be swapped, in [0, 0.5).
        objective: "separable" or "contrastive", for the DPH part.
        dpo_weight, dph_weight: the parts' weights, >= 0.
        backend: "auto" or a backend's name.

    Returns:
        (loss, metrics): the loss a scalar in fp32 (fp64 if any input is), stable for rewards and margins of 1e4;
        the metrics [12], named by PREFERENCE_METRICS, without gradient. A part that is off has NaN metrics. NaN in an
        input makes every figure NaN that depends on it, and `finite` 0.

    Raises:
        ValueError: a wrong shape, dtype or device, no pairs (a mean over nothing is not a number), an epsilon outside
            [0, 0.5), or both parts off.
    """
    rewards = (rewards_chosen, rewards_rejected)
    logprobs = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    _check_tensors(rewards, logprobs)
    for name, epsilon in (("dpo_epsilon", dpo_epsilon), ("dph_epsilon", dph_epsilon)):
        checks.number(name, epsilon, 0.0, 0.5, below=True)
    for name, value in (("beta", beta), ("dpo_weight", dpo_weight), ("dph_weight", dph_weight)):
        checks.number(name, value, 0.0)
    checks.option("objective", objective, OBJECTIVES)
    options = (float(beta), float(dpo_epsilon), float(dph_epsilon), objective, float(dpo_weight), float(dph_weight))
    loss, metrics = _forward(*rewards, *logprobs, *options, backend)
    off = ("dph_loss", "reward_") if rewards_chosen is None else ("dpo_loss", "implicit_")
    whole = rewards_chosen is not None and policy_chosen is not None
    return loss, metrics if whole else _blank(metrics, off)
