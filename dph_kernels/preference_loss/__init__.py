"""The joint preference objective of Direct Preference Heads: loss, gradients and logged metrics in one operator."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dph_kernels import checks, dispatch
from dph_kernels import native as extension
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss.reference import HEAD_METRICS, PREFERENCE_METRICS, Options, metric_names

__all__ = ["HEAD_METRICS", "PREFERENCE_METRICS", "metric_names", "preference_loss"]

OBJECTIVES = ("separable", "contrastive")
REWARDS = ("rewards_chosen", "rewards_rejected")
LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def _implementation(inputs: Sequence[Tensor], backend: str) -> ModuleType:
    """The module whose ``forward`` and ``backward`` run, past ``dispatch.call``: autocast changes nothing in them."""
    dtypes = [x.dtype for x in inputs]
    dtype = torch.float64 if torch.float64 in dtypes else dtypes[0]  # kernels refuse fp64
    return dispatch.implementation("preference_loss", inputs[0].device, backend, dtype)


# Defined without `torch.library.custom_op`, whose wrapper takes longer than the arithmetic. The operator has no
# gradient of its own: `_Loss` makes it from the slopes.
torch.library.define(
    "dph::preference_loss",
    "(Tensor[] rewards, Tensor[] logprobs, float beta, float dpo_epsilon, float dph_epsilon, float dpo_weight, "
    "float dph_weight, str objective, str backend) -> (Tensor loss, Tensor metrics, Tensor slopes)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("dph::preference_loss", ("cpu", "cuda"))
def _(rewards: list[Tensor], logprobs: list[Tensor], *options: float | str) -> tuple[Tensor, Tensor, Tensor]:
    _accept(tuple(rewards), tuple(logprobs))
    implementation = _implementation((*rewards, *logprobs), options[-1])
    return implementation.forward(rewards, logprobs, Options(*options[:-1]))


@torch.library.register_fake("dph::preference_loss")
def _(rewards: list[Tensor], logprobs: list[Tensor], *_: float | str) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (*rewards, *logprobs)
    dtype = reference.precision(inputs)
    return tuple(inputs[0].new_empty(size, dtype=dtype) for size in ((), *reference.sizes(rewards, logprobs)))


class _Operator(NamedTuple):
    """An implementation that goes through PyTorch's dispatcher."""

    backend: str

    def forward(
        self, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dph.preference_loss.default(rewards, logprobs, *options, self.backend)

    backward = staticmethod(reference.backward)


class _Loss(torch.autograd.Function):
    """The operator with its gradient: the slopes that it has kept, times the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        implementation: ModuleType | _Operator,
        rewards: int,
        options: Options,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, slopes = implementation.forward(inputs[:rewards], inputs[rewards:], options)
        ctx.implementation, ctx.rewards, ctx.options = implementation, rewards, options
        ctx.save_for_backward(slopes, *inputs)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        slopes, *inputs = ctx.saved_tensors
        judged = inputs[: ctx.rewards + 2]  # the reference's log-probabilities come last
        if torch.is_grad_enabled():  # for Hessians and gradient penalties: rare, so plain PyTorch on every backend
            grads = reference.gradients(grad, inputs[: ctx.rewards], inputs[ctx.rewards :], ctx.options)
        else:
            implementation = reference if dispatch.observed((grad,)) else ctx.implementation
            grads = implementation.backward(slopes, grad, judged)
        # PyTorch casts them to the dtypes of the inputs.
        if len(judged) == len(inputs):
            return None, None, None, *grads
        if not (needs[-2] or needs[-1]):
            return None, None, None, *grads, None, None
        # d = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected): one slope, four signs.
        return None, None, None, *grads, grads[-1].clone(), grads[-2].clone()


_apply = super(torch.autograd.Function, _Loss).apply  # without that wrapper


def _accept(rewards: tuple[Tensor | None, ...], logprobs: tuple[Tensor | None, ...]) -> bool:
    """Whether C++ finds tensors as they have to be, and of no subclass; else what `_check` raises, if they are wrong.

    Of usual sizes, asking each here, PyTorch's dispatcher and the wrapper of `Function.apply` would take longer than
    the loss and its gradients.
    """
    seen = not torch.compiler.is_compiling() and extension.missing("cpu") is None
    if seen and extension.module().preference_loss_fits(rewards, logprobs):
        return True
    _check(rewards, logprobs)
    return False


def _check(rewards: Sequence[Tensor | None], logprobs: Sequence[Tensor | None]) -> None:
    """ValueError for no part of the objective, no pairs, other numbers of pairs in one part than in the other."""
    _check_group(REWARDS, rewards)
    _check_group(LOGPROBS, logprobs)
    if not (rewards or logprobs):
        raise ValueError(
            "rewards_chosen, policy_chosen: expected at least one part of the objective, got None for both"
        )
    if rewards and rewards[0].dim() not in (1, 2):
        raise ValueError(f"rewards_chosen: expected shape [N] or [N, K], got {list(rewards[0].shape)}")
    if logprobs:
        checks.shape("policy_chosen", logprobs[0], rewards[0].shape[0] if rewards else "N")
    if logprobs and rewards:
        checks.device("policy_chosen", logprobs[0], rewards[0].device)
    name, first = ("rewards_chosen", rewards[0]) if rewards else ("policy_chosen", logprobs[0])
    if first.numel() == 0:
        raise ValueError(f"{name}: expected at least one pair, as the loss is a mean over pairs, got none")


def _check_group(names: tuple[str, ...], tensors: Sequence[Tensor | None]) -> None:
    """All of one shape and device; none at all is right too."""
    if not tensors:
        return
    if len(tensors) != len(names):
        raise ValueError(f"{', '.join(names)}: expected {len(names)} tensors, got {len(tensors)}")
    if missing := [name for name, x in zip(names, tensors, strict=True) if x is None]:
        raise ValueError(f"{', '.join(missing)}: expected a tensor, as {', '.join(names)} come together, got None")
    checks.tensor(names[0], tensors[0])
    for name, x in zip(names, tensors, strict=True):
        checks.shape(name, x, *tensors[0].shape)
        checks.dtype(name, x, checks.FLOATS)
        checks.device(name, x, tensors[0].device)


def _check_options(options: Options) -> None:
    checks.number("dpo_epsilon", options.dpo_epsilon, 0.0, 0.5, below=True)
    checks.number("dph_epsilon", options.dph_epsilon, 0.0, 0.5, below=True)
    checks.number("beta", options.beta, 0.0)
    checks.number("dpo_weight", options.dpo_weight, 0.0)
    checks.number("dph_weight", options.dph_weight, 0.0)
    checks.option("objective", options.objective, OBJECTIVES)


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
        the metrics, named by `metric_names`, without gradient: [12], or [12 + 5 K] for K > 1 heads. A part that is off
        has NaN metrics. NaN in an input makes every figure NaN that depends on it, and `finite` 0, all without
        waiting for the device.

    Raises:
        ValueError: a wrong shape, dtype or device, no pairs (a mean over nothing is not a number), an epsilon outside
            [0, 0.5), or both parts off.
    """
    rewards, logprobs = (), ()
    if not rewards_chosen is rewards_rejected is None:
        rewards = rewards_chosen, rewards_rejected
    if not policy_chosen is policy_rejected is reference_chosen is reference_rejected is None:
        logprobs = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    plain = _accept(rewards, logprobs)
    options = Options(beta, dpo_epsilon, dph_epsilon, dpo_weight, dph_weight, objective)
    _check_options(options)
    inputs = (*rewards, *logprobs)
    if plain and not dispatch.observed(inputs):
        return _apply(_implementation(inputs, backend), len(rewards), options, *inputs)
    return _Loss.apply(_Operator(backend), len(rewards), options, *inputs)
