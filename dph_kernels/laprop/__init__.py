"""LaProp with decoupled prior and weight decay, and the norm of its gradients: every parameter in one call.

Paper: arXiv 2405.20053, on LaProp (arXiv 2002.04839); the momentum carries the learning rate.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dph_kernels import checks, dispatch

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (torch.bfloat16, torch.float16)
_shape, _dtype, _device = (operator.attrgetter(name) for name in ("shape", "dtype", "device"))


class GradientNorm(NamedTuple):
    """What :func:`gradient_norm` gives; all of it lies on the gradients' device.

    Attributes:
        norm: Euclidean norm of all gradients together, [] fp64.
        scale: ``min(1, max_norm / norm)``, [1] fp32, NaN where the norm is not finite: ``grad_scale`` of ``laprop``.
        finite: whether the norm is finite, which it is where every gradient is (fp64 ones up to 1e154), [] bool.
    """

    norm: Tensor
    scale: Tensor
    finite: Tensor


@torch.no_grad()
def laprop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    prior_decay: float = 0.0,
    bias_correction: float = 1.0,
    momentum_scale: float = 1.0,
    grad_scale: Tensor | None = None,
    clock: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Update ``params``, ``exp_avg``, ``exp_avg_sq``, ``copies`` and ``clock`` in place.

    For each tensor, with g = grad * grad_scale::

        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g ** 2
        exp_avg = beta1 * exp_avg + (1 - beta1) * lr * bias_correction * g / (exp_avg_sq.sqrt() + eps)
        param = param - lr * (prior_decay * (param - prior) + weight_decay * param) - momentum_scale * exp_avg
        copy = param.to(copy.dtype)

    Where ``grad_scale`` is not finite, nothing changes at all, the clock included; no one waits to find out.

    Lists are of equal length; tensors that stand at the same place have the same shape, and all are contiguous and on
    one device. Parameters and state are float32 (or float64, which the reference backend computes), priors the same or
    bfloat16, gradients float32, bfloat16 or float16. Float16, of gradients or copies, costs a pass of its own: the
    kernels do not know it.

    A CUDA graph can capture the call. What changes from step to step then has to lie on the device: the rate as a
    tensor, the corrections by way of a clock, and gradients that keep their addresses.

    Args:
        params: the weights, fp32 masters where the model computes in bf16.
        grads: their gradients.
        exp_avg: momentum of normalised updates, which carries the learning rate.
        exp_avg_sq: second moment of the gradients.
        priors: the values that prior decay pulls to; needed where ``prior_decay`` is not 0.
        lr: learning rate of this step; with a clock also as one number on the tensors' device, read when the step runs.
        beta1: decay of the momentum.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: pull to zero, times ``lr``.
        prior_decay: pull to the prior, times ``lr``.
        bias_correction: ``sqrt(1 - beta2 ** t)`` at step t, from 1; not read where there is a clock.
        momentum_scale: ``lr / a``, which corrects the momentum's bias, where every step makes ``a`` (at first 0) into
            ``beta1 * a + (1 - beta1) * lr``; 1 where the learning rate is 0; not read where there is a clock.
        grad_scale: one fp32 number on the tensors' device that multiplies every gradient (a clip coefficient).
        clock: [2] fp64 on the tensors' device, zeros before the first step: the number of steps taken, and the a of
            ``momentum_scale``. It goes on by one step, and both corrections follow from it, in fp64.
        copies: bfloat16 or float16 tensors that receive the new weights, rounded to nearest even.
        backend: "auto", "reference", "cpu" (C++) or "cuda".

    Raises:
        ValueError: an argument of the wrong length, shape, dtype, device, layout or range.
        RuntimeError: ``backend`` was asked for by name and cannot run here.
    """
    if prior_decay == 0.0:
        priors = None  # not read at all: a fifth of the traffic less
    elif priors is None:
        raise ValueError(f"priors: expected one tensor per parameter as prior_decay is {prior_decay}, got None")
    lists = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "priors": priors, "copies": copies}
    for name, tensors in lists.items():
        if tensors is not None and len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors as in params, got {len(tensors)}")
    checks.option("backend", backend, ("auto", *dispatch.MODULES))
    if not params:
        return
    given = {"params": params, **{name: tensors for name, tensors in lists.items() if tensors is not None}}
    _check_tensors(given)
    if params[0].dtype == torch.float64 and backend == "auto":
        backend = "reference"
    if params[0].dtype == torch.float64 and backend != "reference":
        raise ValueError(f"params[0]: expected float32 for backend {backend!r}, got float64")
    device = params[0].device
    if grad_scale is not None:
        _check_number("grad_scale", grad_scale, device, torch.float32)
        grad_scale = grad_scale.reshape(())
    if clock is not None:
        checks.shape("clock", clock, 2)
        checks.dtype("clock", clock, torch.float64)
        checks.device("clock", clock, device)
        checks.contiguous("clock", clock)
    rate = None
    if isinstance(lr, Tensor):
        if clock is None:
            raise ValueError("lr: expected a number where there is no clock, got a tensor")
        _check_number("lr", lr, device, (torch.float32, torch.float64))
        rate, lr = lr.double().reshape(()), 0.0
    _check_settings(lr, beta1, beta2, eps, weight_decay, prior_decay)
    checks.number("bias_correction", bias_correction, 0.0, below=True)
    checks.number("momentum_scale", momentum_scale, 0.0, below=True)
    copies = list(copies or ())
    half = any(copy.dtype == torch.float16 for copy in copies)
    tensors = list(params), _known(grads), list(exp_avg), list(exp_avg_sq), list(priors or ()), [] if half else copies
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    numbers |= {"prior_decay": prior_decay, "bias_correction": bias_correction, "momentum_scale": momentum_scale}
    numbers = {name: float(number) for name, number in numbers.items()}
    if dispatch.unobserved(itertools.chain(*given.values())):
        # `torch.library.custom_op` takes longer over arguments that are written to than a small model's update.
        written = (*tensors[0], *tensors[2], *tensors[3], *tensors[5], *(() if clock is None else (clock,)))
        torch.autograd.graph.increment_version(written)
        with dispatch.named("dph::laprop"):
            dispatch.call("forward", "laprop", params[0], backend, *tensors, grad_scale, clock, rate, **numbers)
    else:
        _laprop(*tensors, grad_scale, clock, rate, *numbers.values(), backend)
    if half:
        _copy(copies, params, grad_scale)


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor], *, max_norm: float = float("inf"), backend: str = "auto") -> GradientNorm:
    """The norm of all gradients together, and the coefficient that clips it, without a wait for either.

    The same as::

        norm = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in grads]))
        scale = min(1, max_norm / norm) if norm.isfinite() else nan

    Squares are summed in fp64, which no finite gradient overflows, in an order that depends on nothing but the sizes:
    the same gradients give the same norm, bit by bit, on any number of threads. The gradients are contiguous, on one
    device, of any dtype of ``laprop``; float16 costs a pass of its own. Without gradients the norm is 0, on the CPU.

    Args:
        grads: tensors of any shapes.
        max_norm: what ``scale`` brings the norm down to.
        backend: "auto", "reference", "cpu" (C++) or "cuda".

    Raises:
        ValueError: an argument of the wrong dtype, device, layout or range.
        RuntimeError: ``backend`` was asked for by name and cannot run here.
    """
    checks.option("backend", backend, ("auto", *dispatch.MODULES))
    checks.number("max_norm", max_norm, 0.0)
    dtypes = *GRADIENTS, torch.float64
    if grads:
        checks.tensor("grads[0]", grads[0])
        if not _alike(grads, dtypes, grads[0].device):
            for i, grad in enumerate(grads):
                _check_one(f"grads[{i}]", grad, dtypes, grads[0].device)
    double = next((i for i, grad in enumerate(grads) if grad.dtype == torch.float64), None)
    if double is not None and backend not in ("auto", "reference"):
        raise ValueError(f"grads[{double}]: expected float32 or a half for backend {backend!r}, got float64")
    grads = _known(grads) or [torch.zeros(0, dtype=torch.float32, device="cpu")]
    return GradientNorm(*_gradient_norm(grads, float(max_norm), backend if double is None else "reference"))


def _known(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in dtypes that the kernels know."""
    return [grad.float() if grad.dtype == torch.float16 else grad for grad in grads]


def _copy(copies: Sequence[Tensor], params: Sequence[Tensor], grad_scale: Tensor | None) -> None:
    """Round the weights into copies of both kinds, unless the step changed nothing."""
    for copy, param in zip(copies, params, strict=True):
        copy.copy_(param if grad_scale is None else torch.where(grad_scale.isfinite(), param.to(copy.dtype), copy))


def _check_number(name: str, value: Tensor, device: torch.device, dtypes: torch.dtype | Sequence[torch.dtype]) -> None:
    """One element on the device."""
    checks.device(name, value, device)
    checks.dtype(name, value, dtypes)
    checks.shape(name, value.reshape(-1), 1)


def _check_tensors(lists: dict[str, Sequence[Tensor]]) -> None:
    """Shape, dtype, device and layout of every tensor; the names are put together only where something is wrong."""
    params = lists["params"]
    first = params[0]
    checks.tensor("params[0]", first)
    checks.dtype("params[0]", first, (torch.float32, torch.float64))
    for name, tensors in lists.items():
        others = {"grads": GRADIENTS, "priors": (torch.bfloat16,)}.get(name, ())
        dtypes = COPIES if name == "copies" else tuple(dict.fromkeys((*others, first.dtype)))
        if _alike(tensors, dtypes, first.device) and list(map(_shape, tensors)) == list(map(_shape, params)):
            continue
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            checks.tensor(f"{name}[{i}]", tensor)
            checks.shape(f"{name}[{i}]", tensor, *param.shape)
            _check_one(f"{name}[{i}]", tensor, dtypes, first.device)


def _alike(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    """Whether there is nothing for ``_check_one`` to say of any, found in a fraction of its time."""
    return (
        not torch.compiler.is_compiling()
        and dispatch.PLAIN.issuperset(map(type, tensors))
        and set(map(_dtype, tensors)).issubset(dtypes)
        and set(map(_device, tensors)) <= {device}
        and all(map(Tensor.is_contiguous, tensors))
    )


def _check_one(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    checks.tensor(name, tensor)
    checks.dtype(name, tensor, dtypes)
    checks.device(name, tensor, device)
    checks.contiguous(name, tensor)


def _check_settings(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, prior_decay: float) -> None:
    checks.number("lr", lr, 0.0)
    checks.number("beta1", beta1, 0.0, 1.0, below=True)
    checks.number("beta2", beta2, 0.0, 1.0, below=True)
    checks.number("eps", eps, 0.0)
    checks.number("weight_decay", weight_decay, 0.0)
    checks.number("prior_decay", prior_decay, 0.0)


@torch.library.custom_op("dph::laprop", mutates_args=("params", "exp_avg", "exp_avg_sq", "copies", "clock"))
def _laprop(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    priors: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    clock: Tensor | None,
    rate: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    prior_decay: float,
    bias_correction: float,
    momentum_scale: float,
    backend: str,
) -> None:
    dispatch.call(
        "forward",
        "laprop",
        params[0],
        backend,
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        priors,
        copies,
        grad_scale,
        clock,
        rate,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        prior_decay=prior_decay,
        bias_correction=bias_correction,
        momentum_scale=momentum_scale,
    )


@_laprop.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned; everything happens in place."""


@torch.library.custom_op("dph::gradient_norm", mutates_args=())
def _gradient_norm(grads: list[Tensor], max_norm: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.call("gradient_norm", "laprop", grads[0], backend, grads, max_norm)


@_gradient_norm.register_fake
def _(grads: list[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    first = grads[0]
    return (
        first.new_empty((), dtype=torch.float64),
        first.new_empty(1, dtype=torch.float32),
        first.new_empty((), dtype=torch.bool),
    )
