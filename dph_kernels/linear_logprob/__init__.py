"""Log-probabilities of given tokens, from hidden states and the language-model head, without R x V logits."""

import torch
from torch import Tensor

from dph_kernels import autocast, checks, dispatch


@torch.library.custom_op("dph::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.indices("targets", targets, len(weight))
    return dispatch.call("forward", "linear_logprob", hidden, backend, hidden, weight, targets, statistics)


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    logprobs, normaliser = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(2, rows, dtype=dtype)
    extra = rows if statistics else 0
    return logprobs, normaliser, hidden.new_empty(extra, dtype=dtype), targets.new_empty(extra)


@torch.library.custom_op("dph::linear_logprob_backward", mutates_args=())
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed
    return dispatch.call("backward", "linear_logprob", hidden, backend, *arguments)


@_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if hidden_needed else 0),
        weight.new_empty(weight.shape if weight_needed else 0),
    )


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, _, ctx.backend = inputs
    _, normaliser, entropy, best = output
    ctx.mark_non_differentiable(normaliser, entropy, best)
    ctx.save_for_backward(hidden, weight, targets, normaliser)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden_needed, weight_needed = ctx.needs_input_grad[:2]
    grads = _backward(grad, *ctx.saved_tensors, hidden_needed, weight_needed, ctx.backend)
    return grads[0] if hidden_needed else None, grads[1] if weight_needed else None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


class _Joint(torch.autograd.Function):
    """Gradients computed along, as those of the sum of all log-probabilities: right but for a factor where the upstream
    gradients turn out equal. Else the weights' is computed anew, as it is for whoever asks for gradients once more.

    Past the dispatcher, as an operator could not give away what it has saved.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        statistics: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        checks.indices("targets", targets, len(weight))
        arguments = hidden, weight, targets, statistics
        found = dispatch.call("forward_and_gradients", "linear_logprob", hidden, backend, *arguments)
        logprobs, normaliser, entropy, best, *ctx.gradients = found
        ctx.backend = backend
        ctx.mark_non_differentiable(entropy, best)
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return logprobs, entropy, best

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # or what PyTorch says of those that are gone
        if not ctx.gradients or dispatch.observed((grad,)):
            return *_backward(grad, *tensors, True, True, ctx.backend), None, None, None
        hidden, weight = ctx.gradients
        ctx.gradients = []
        if _uniform(grad):
            weight.mul_(grad[:1])  # not a scalar, which would be rounded to the dtype of the weights
        else:
            del weight  # its memory serves again
            weight = _backward(grad, *tensors, False, True, ctx.backend)[1]
        return hidden.mul_(grad[:, None]), weight, None, None, None


def _uniform(grad: Tensor) -> bool:
    """Whether all upstream gradients are one number: of a sum they are, visibly; else the numbers are looked at.

    For that a GPU is waited for, but not where a CUDA graph is recorded, in which nothing can be seen.
    """
    if grad.stride(0) == 0:
        return True
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return torch.equal(*grad.aminmax())


def _joint_pays(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> bool:
    """Whether the gradients are to be computed along: both are needed, nobody looks on, and the backend is for it."""
    if not (torch.is_grad_enabled() and hidden.requires_grad and weight.requires_grad):
        return False
    if not dispatch.unobserved((hidden, weight, targets)):
        return False
    implementation = dispatch.implementation("linear_logprob", hidden.device, backend, hidden.dtype)
    return hasattr(implementation, "joint_pays") and implementation.joint_pays(hidden, weight)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    statistics: bool = False,
    uniform: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's target token: ``log_softmax(hidden @ weight.T)[r, targets[r]]``.

    Args:
        hidden: [R, C] states that predict, fp16, bf16, fp32 or fp64, any strides. R may be 0.
        weight: [V, C] language-model head (the tied embedding), same dtype and device.
        targets: [R] int64, each in [0, V): rows without a target are left out by the caller.
        statistics: also return entropy and arg-max of each row's distribution.
        uniform: whether to expect one upstream gradient for all rows, as of a sum or a mean. The gradients may then be
            computed along, on a GPU in bf16 and on an Intel CPU in fp32: three products of the size
            R x C x V instead of four. Whatever comes is right, but another upstream gradient costs five, and gradients
            that nobody asks for cost two: False for those, under ``torch.utils.checkpoint``, and where results are to
            have the bits of a call without gradients. Until the backward pass both gradients take their memory. A GPU
            is waited for unless the upstream gradient is expanded from one number, as that of ``sum`` is (that of
            ``mean`` is not, and counts as another one where a CUDA graph is recorded).
        backend: "auto" or a backend's name.

    Returns:
        [R] in nats, never above 0, in fp32 (fp64 for fp64 inputs); all sums are taken in that precision.
        With ``statistics``: (log-probabilities, entropy [R] in nats, arg-max [R] int64, the lowest index of a tie),
        the last two without gradient; they come from the same pass. Where the arg-max equals the target, the token was
        predicted right.

    Under ``torch.autocast`` hidden and weight are cast to its dtype; the sums stay in fp32.

    Raises:
        ValueError: a wrong shape, dtype or device; on the CPU also a target outside [0, V). On a GPU that test would
            wait for the device; there the reference stops with PyTorch's device-side assertion, and "triton" gives NaN.
    """
    hidden, weight = autocast.together(hidden, weight)
    checks.shape("hidden", hidden, "R", "C")
    checks.dtype("hidden", hidden, checks.FLOATS)
    checks.shape("weight", weight, "V", hidden.shape[1])
    checks.dtype("weight", weight, hidden.dtype)
    checks.device("weight", weight, hidden.device)
    checks.shape("targets", targets, hidden.shape[0])
    checks.dtype("targets", targets, torch.int64)
    checks.device("targets", targets, hidden.device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one row (V >= 1), got shape {list(weight.shape)}")
    if uniform and _joint_pays(hidden, weight, targets, backend):
        logprobs, entropy, best = _Joint.apply(hidden, weight, targets, statistics, backend)
    else:
        logprobs, _, entropy, best = _forward(hidden, weight, targets, statistics, backend)
    return (logprobs, entropy, best) if statistics else logprobs
