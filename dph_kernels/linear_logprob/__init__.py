"""Log-probabilities of given tokens, from hidden states and the language-model head, without R x V logits."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels import native as extension
from dph_kernels.operator import Gradient, Inputs, JointGradient, Operator


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities [R], normaliser [2, R], entropy [R], arg-max [R]); the last two empty without statistics."""
    return empty_results(hidden, targets, statistics)


def _fake_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of (hidden, weight)."""
    return (
        hidden.new_empty(hidden.shape if hidden_needed else 0),
        weight.new_empty(weight.shape if weight_needed else 0),
    )


def empty_results(hidden: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for log-probabilities, normaliser, entropy and arg-max, in the precision of the sums."""
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    logprobs, normaliser = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(2, rows, dtype=dtype)
    extra = rows if statistics else 0
    return logprobs, normaliser, hidden.new_empty(extra, dtype=dtype), targets.new_empty(extra)


def spans(size: int, most: int, multiple: int = 1) -> list[slice]:
    """Return slices of [0, size) of at most ``most`` elements and about equal length, if possible a multiple."""
    count = max(1, -(-size // most))
    step = max(1, min(most, -(-size // (count * multiple)) * multiple))
    slices = []
    for start in range(0, size, step):
        slices.append(slice(start, min(start + step, size)))
    return slices


def _check_targets(inputs: Inputs) -> None:
    checks.indices("targets", inputs["targets"], len(inputs["weight"]))


SAVED = ("hidden", "weight", "targets", "normaliser")


def _setup(ctx: FunctionCtx, output: Sequence[Tensor], inputs: Inputs) -> None:
    _logprobs, normaliser, entropy, best = output
    ctx.mark_non_differentiable(normaliser, entropy, best)
    ctx.save_for_backward(inputs["hidden"], inputs["weight"], inputs["targets"], normaliser)


def _compute(
    ctx: FunctionCtx, needs: Inputs, backward: Callable[..., tuple[Tensor, Tensor]], grad: Tensor, *_: Tensor
) -> Inputs:
    saved = dict(zip(SAVED, ctx.saved_tensors, strict=True))
    d_hidden, d_weight = backward(grad=grad, **saved, hidden_needed=needs["hidden"], weight_needed=needs["weight"])
    grads = {}
    if needs["hidden"]:
        grads["hidden"] = d_hidden
    if needs["weight"]:
        grads["weight"] = d_weight
    return grads


# Gradients along with the log-probabilities are, for hidden, those of each log-probability, and for weight that of
# their sum, or of the sum of row_weights * log-probabilities. If the upstream gradients are these weights times one
# factor, so is the weight gradient; otherwise it is recomputed, as both are in a second backward pass through the same
# graph. A registered operator may not modify saved tensors, so this path bypasses the dispatcher.


def _joint_pays(implementation: ModuleType, inputs: Inputs) -> bool:
    hidden, weight = inputs["hidden"], inputs["weight"]
    if not (hidden.requires_grad and weight.requires_grad):
        return False
    return hasattr(implementation, "joint_pays") and implementation.joint_pays(hidden, weight)


def _setup_joint(ctx: FunctionCtx, results: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    *output, d_hidden, d_weight = results
    ctx.gradients, ctx.row_weights = [d_hidden, d_weight], inputs["row_weights"]
    _setup(ctx, output, inputs)
    return tuple(output)


def _compute_joint(
    ctx: FunctionCtx, needs: Inputs, backward: Callable[..., tuple[Tensor, Tensor]], grad: Tensor, *_: Tensor
) -> Inputs:
    saved = dict(zip(SAVED, ctx.saved_tensors, strict=True))  # raises PyTorch's error if they have been freed
    recompute = partial(backward, grad=grad, **saved, weight_needed=True)
    if not ctx.gradients or not dispatch.can_bypass_dispatcher((grad,)):
        d_hidden, d_weight = recompute(hidden_needed=True)
        return {"hidden": d_hidden, "weight": d_weight}
    d_hidden, d_weight = ctx.gradients
    ctx.gradients = []
    factor = _factor(grad, ctx.row_weights)
    if factor is not None:
        d_weight.mul_(factor)
    else:
        del d_weight  # its memory is used again
        _, d_weight = recompute(hidden_needed=False)
    return {"hidden": d_hidden.mul_(grad[:, None]), "weight": d_weight}


def _factor(grad: Tensor, row_weights: Tensor | None) -> Tensor | None:
    """Return the number [1] by which ``row_weights`` (None: ones) give all upstream gradients, or None.

    [1] instead of a scalar, which would be rounded to the dtype of the weights. An expanded number, as of a sum, is
    visible; else numbers are compared, which waits for a GPU. While a CUDA graph is recorded nothing can be read.
    """
    if row_weights is None and grad.stride(0) == 0:
        return grad[:1]
    if grad.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    if row_weights is None:
        return grad[:1] if torch.equal(*grad.aminmax()) else None
    largest = row_weights.abs().argmax(0, keepdim=True)
    factor = grad[largest] / row_weights[largest]  # NaN if all are 0, and then no number equals its product
    rounding = 4 * torch.finfo(grad.dtype).eps * grad.abs()
    return factor if bool(((factor * row_weights - grad).abs() <= rounding).all()) else None


# Few logits, that of one row or of a small vocabulary, are quickly written and read again, and each tile of a kernel
# takes several calls from Python.
FEW = 16  # times ``dispatch.SMALL_ELEMENTS``: 8 MiB

_fits = extension.function("linear_logprob_fits")


def _prefer_pytorch(hidden: Tensor, weight: Tensor, backend: str, statistics: bool) -> bool:
    """Whether "auto" computes all logits in plain PyTorch: few, on the CPU in fp32; with and without gradients."""
    return (
        backend == "auto"
        and not statistics
        and not torch.compiler.is_compiling()
        and hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and 0 < len(hidden) * len(weight) <= FEW * dispatch.SMALL_ELEMENTS
        and not dispatch.is_batch_invariant()
    )


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probabilities from logits [R, V]."""
    return -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


OPERATOR = Operator(
    "linear_logprob",
    fake=_fake,
    like=itemgetter("hidden"),
    gradient=Gradient(setup=_setup, compute=_compute, fake=_fake_backward, like="hidden"),
    joint=JointGradient(pays=_joint_pays, setup=_setup_joint, compute=_compute_joint),
    check=_check_targets,
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    statistics: bool = False,
    uniform: bool = True,
    row_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's target token: ``log_softmax(hidden @ weight.T)[r, targets[r]]``.

    Args:
        hidden: [R, C] states that predict, fp16, bf16, fp32 or fp64, any strides. R may be 0.
        weight: [V, C] language-model head (the tied embedding), same dtype and device.
        targets: [R] int64, each in [0, V): rows without a target are left out by the caller.
        statistics: also return entropy and arg-max of each row's distribution.
        uniform: whether to expect one upstream gradient for all rows, as of a sum or a mean. The gradients may then be
            computed in the forward pass, on a GPU in bf16 and on most CPUs in fp32: three products of the size
            R x C x V instead of four. Any upstream gradient gives right results, but a different one per row costs
            five products, and gradients that are not used cost two. False for those, under
            ``torch.utils.checkpoint``, and for results with the bits of a call without gradients. Until the backward
            pass both gradients take their memory. The backward pass waits for a GPU unless the upstream gradient is
            expanded from one number, as that of ``sum`` is (that of ``mean`` is not, and counts as different per row
            while a CUDA graph is recorded).
        row_weights: [R] upstream gradients to expect instead, up to one factor, if they differ per row and are known:
            those of ``(row_weights * logprobs).sum()`` take three products, too. The result is not multiplied by them,
            and they get no gradient here.
        backend: "auto" or a backend's name. "auto" is plain PyTorch for few logits in fp32 on the CPU.

    Returns:
        [R] in nats, never above 0, in fp32 (fp64 for fp64 inputs); all sums are taken in that precision.
        With ``statistics``: (log-probabilities, entropy [R] in nats, arg-max [R] int64, the lowest index of a tie),
        the last two without gradient, from the same pass.

    Under ``torch.autocast`` hidden and weight are cast to its dtype; the sums stay in fp32.

    Raises:
        ValueError: a wrong shape, dtype or device, or ``row_weights`` with ``uniform=False``; on the CPU also a target
            outside [0, V). On a GPU that check would wait for the device; there the reference fails with PyTorch's
            device-side assertion, and "triton" returns NaN.
    """
    if (
        row_weights is None
        and _fits
        and not torch.compiler.is_compiling()
        and _fits(hidden, weight, targets)
        and _prefer_pytorch(hidden, weight, backend, statistics)
    ):
        return _plain(hidden, weight, targets)  # past the checks, which take longer
    hidden, weight = checks.cast_together(hidden, weight)
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
    if row_weights is not None:
        if not uniform:
            raise ValueError("row_weights: expected None with uniform=False, which expects no upstream gradients")
        checks.shape("row_weights", row_weights, hidden.shape[0])
        checks.dtype("row_weights", row_weights, checks.FLOATS)
        checks.device("row_weights", row_weights, hidden.device)
        checks.memory("row_weights", row_weights)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        row_weights = row_weights.detach().to(dtype, copy=True)  # the caller's may change before the backward pass
    if _prefer_pytorch(hidden, weight, backend, statistics):
        checks.require_memory(hidden=hidden, weight=weight, targets=targets)
        checks.indices("targets", targets, len(weight))
        return _plain(hidden, weight, targets)
    joint = {"row_weights": row_weights} if uniform else None
    logprobs, _, entropy, best = OPERATOR(
        hidden=hidden, weight=weight, targets=targets, statistics=statistics, backend=backend, joint=joint
    )
    return (logprobs, entropy, best) if statistics else logprobs
