"""The joint preference objective of Direct Preference Heads: loss, gradients and logged metrics in one operator."""

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks
from dph_kernels import native as extension
from dph_kernels.operator import Gradient, Inputs, Operator
from dph_kernels.preference_loss import labelled, reference
from dph_kernels.preference_loss.labelled import Labels
from dph_kernels.preference_loss.reference import HEAD_METRICS, PREFERENCE_METRICS, Options, metric_names

__all__ = ["HEAD_METRICS", "PREFERENCE_METRICS", "Labels", "metric_names", "preference_loss"]

_options, _dtype = itemgetter(*Options._fields), attrgetter("dtype")
OBJECTIVES = ("separable", "contrastive")
REWARDS = ("rewards_chosen", "rewards_rejected")
LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def _fake(
    rewards: list[Tensor],
    logprobs: list[Tensor],
    beta: float,
    dpo_epsilon: float,
    dph_epsilon: float,
    dpo_weight: float,
    dph_weight: float,
    objective: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics, slopes)."""
    inputs = (*rewards, *logprobs)
    dtype = reference.precision(inputs)
    return tuple(inputs[0].new_empty(size, dtype=dtype) for size in ((), *reference.sizes(rewards, logprobs)))


def _setup(ctx: FunctionCtx, output: tuple[Tensor, Tensor, Tensor], inputs: Inputs) -> None:
    rewards, logprobs = inputs["rewards"], inputs["logprobs"]
    _loss, metrics, slopes = output
    ctx.save_for_backward(slopes, *rewards, *logprobs)
    ctx.mark_non_differentiable(metrics, slopes)
    ctx.set_materialize_grads(False)
    ctx.rewards, ctx.options = len(rewards), _options(inputs)
    ctx.reference_needed = bool(logprobs) and (logprobs[2].requires_grad or logprobs[3].requires_grad)


def _compute(
    ctx: FunctionCtx, needs: Inputs, backward: Callable[..., list[Tensor]], grad: Tensor | None, *_: None
) -> Inputs:
    """Multiply the slopes of the forward pass by the gradient of the loss."""
    if grad is None:
        return {}
    slopes, *inputs = ctx.saved_tensors
    count = ctx.rewards
    judged = inputs[: count + 2]  # the log-probabilities of the reference model come last
    if torch.is_grad_enabled():  # for Hessians and gradient penalties: rare, so plain PyTorch with every backend
        grads = reference.gradients(grad, inputs[:count], inputs[count:], Options(*ctx.options))
    else:
        grads = backward(slopes=slopes, grad=grad, judged=judged)
    of_logprobs = grads[count:]
    # PyTorch casts the gradients to the dtypes of the inputs.
    if len(judged) < len(inputs):
        if ctx.reference_needed:
            # d = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected): one slope, four signs.
            of_logprobs += [grads[-1].clone(), grads[-2].clone()]
        else:
            of_logprobs += [None, None]
    return {"rewards": grads[:count], "logprobs": of_logprobs}


def _widest(inputs: Inputs) -> Tensor:
    """Return a tensor in fp64 if there is one: kernels refuse fp64."""
    tensors = (*inputs["rewards"], *inputs["logprobs"])
    dtypes = list(map(_dtype, tensors))
    return tensors[dtypes.index(torch.float64) if torch.float64 in dtypes else 0]


def _accept(inputs: Inputs) -> bool:
    """Whether the C++ check accepts the tensors, of no subclass; otherwise `_check` raises for those that do not fit.

    At usual sizes, checking each tensor in Python would take longer than the loss and its gradients.
    """
    rewards, logprobs = tuple(inputs["rewards"]), tuple(inputs["logprobs"])
    checkable = not torch.compiler.is_compiling() and extension.missing("cpu") is None
    fits = checkable and extension.module().preference_loss_fits(rewards, logprobs)  # only tensors with an address
    if fits and checks.have_storage(rewards + logprobs):
        return True
    _check(rewards, logprobs)
    return False


OPERATOR = Operator(
    "preference_loss",
    fake=_fake,
    like=_widest,
    gradient=Gradient(setup=_setup, compute=_compute, plain=reference.backward, like="slopes"),
    accept=_accept,
)


def _check(rewards: Sequence[Tensor | None], logprobs: Sequence[Tensor | None]) -> None:
    """Require at least one part of the objective, at least one pair, and equal numbers of pairs in both parts."""
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
    """Require one shape and device; no tensors at all are valid too."""
    if not tensors:
        return
    if len(tensors) != len(names):
        raise ValueError(f"{', '.join(names)}: expected {len(names)} tensors, got {len(tensors)}")
    if missing := [name for name, x in zip(names, tensors, strict=True) if x is None]:
        raise ValueError(f"{', '.join(missing)}: expected a tensor, as {', '.join(names)} come together, got None")
    expected = checks.sizes(names[0], tensors[0])
    for name, x in zip(names, tensors, strict=True):
        checks.shape(name, x, *expected)
        checks.dtype(name, x, checks.FLOATS)
        checks.device(name, x, tensors[0].device)
        checks.memory(name, x)


def _check_options(
    beta: float, dpo_epsilon: float, dph_epsilon: float, dpo_weight: float, dph_weight: float, objective: str
) -> None:
    checks.number("dpo_epsilon", dpo_epsilon, 0.0, 0.5, below=True)
    checks.number("dph_epsilon", dph_epsilon, 0.0, 0.5, below=True)
    checks.number("beta", beta, 0.0)
    checks.number("dpo_weight", dpo_weight, 0.0)
    checks.number("dph_weight", dph_weight, 0.0)
    checks.option("objective", objective, OBJECTIVES)


def _check_labels(labels: Labels, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], backend: str) -> None:
    """Require the shapes and the device of the rewards, and a backend that computes labels."""
    checks.option("backend", backend, ("auto", "reference"))
    _check(rewards, logprobs)
    like = (*rewards, *logprobs)[0]
    heads = like.shape[1] if rewards and like.dim() == 2 else 1 if rewards else "K"
    checks.shape("labels.chosen", labels.chosen, len(like), heads)
    expected = {"rejected": labels.chosen.shape, "pairs": (len(like),), "margin": (len(like),)}
    expected |= {"totals": (3, labels.chosen.shape[1]), "pair_total": ()}
    for name, x in labels._asdict().items():
        checks.shape(f"labels.{name}", x, *expected.get(name, labels.chosen.shape))
        checks.dtype(f"labels.{name}", x, checks.FLOATS)
        checks.device(f"labels.{name}", x, like.device)


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
    labels: Labels | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``dpo_weight * L_cDPO + dph_weight * L_DPH`` and its metrics (arXiv 2405.20053, section 3)::

        ls = torch.nn.functional.logsigmoid
        separable:    L_DPH = -(1-e) ls(r_w) - e ls(-r_w) - e ls(r_l) - (1-e) ls(-r_l)
        contrastive:  L_DPH = -(1-e) ls(r_w - r_l) - e ls(r_l - r_w)
        d = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        cDPO:         L_cDPO = -(1-e) ls(beta d) - e ls(-beta d)

    Means are over the N pairs, and over the K heads if there are several.

    Args:
        rewards_chosen, rewards_rejected: [N] or [N, K] rewards of the preferred and the dispreferred answers;
            None for both turns the DPH part off.
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: [N] log-probabilities of the answers in
            nats; None for all turns the cDPO part off.
        beta: strength of the implicit reward, >= 0.
        dpo_epsilon, dph_epsilon: label smoothing of each part, the assumed fraction of swapped pairs, in [0, 0.5).
        objective: "separable" or "contrastive", for the DPH part.
        dpo_weight, dph_weight: the parts' weights, >= 0.
        labels: weights of the pairs by head, absent answers and margins (`Labels`), computed in plain PyTorch.
            None: all weights are 1.
        backend: "auto" or a backend's name.

    Returns:
        (loss, metrics): the loss a scalar in fp32 (fp64 if any input is), stable for rewards and margins of 1e4;
        the metrics, named by `metric_names`, without gradient: [12], or [12 + 5 K] for K > 1 heads. A part that is off
        has NaN metrics. NaN in an input makes all metrics that depend on it NaN, and `finite` 0, without waiting for
        the device.

    Raises:
        ValueError: a wrong shape, dtype or device, no pairs (a mean over nothing is not a number), an epsilon outside
            [0, 0.5), or both parts off.
    """
    rewards, logprobs = (), ()
    if not rewards_chosen is rewards_rejected is None:
        rewards = rewards_chosen, rewards_rejected
    if not policy_chosen is policy_rejected is reference_chosen is reference_rejected is None:
        logprobs = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    epsilons_fit = 0.0 <= dpo_epsilon < 0.5 and 0.0 <= dph_epsilon < 0.5
    weights_fit = beta >= 0.0 and dpo_weight >= 0.0 and dph_weight >= 0.0
    if not (epsilons_fit and weights_fit and objective in OBJECTIVES):  # the usual case makes no calls
        _check_options(beta, dpo_epsilon, dph_epsilon, dpo_weight, dph_weight, objective)
    if labels is not None:
        _check_labels(labels, rewards, logprobs, backend)
        options = Options(beta, dpo_epsilon, dph_epsilon, dpo_weight, dph_weight, objective)
        return labelled.forward(rewards, logprobs, labels, options)
    loss, metrics, _ = OPERATOR(
        rewards=rewards,
        logprobs=logprobs,
        beta=beta,
        dpo_epsilon=dpo_epsilon,
        dph_epsilon=dph_epsilon,
        dpo_weight=dpo_weight,
        dph_weight=dph_weight,
        objective=objective,
        backend=backend,
    )
    return loss, metrics
