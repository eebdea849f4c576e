"""LaProp with decoupled prior and weight decay, and the norm of gradients: all parameters in one call.

Paper: arXiv 2405.20053, on LaProp (arXiv 2002.04839); the momentum carries the learning rate.
"""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dph_kernels import checks, dispatch
from dph_kernels import native as extension
from dph_kernels.operator import Inputs, Operator

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (torch.bfloat16, torch.float16)
LISTS = ("params", "grads", "exp_avg", "exp_avg_sq", "priors", "copies")
_shape, _dtype, _device = (operator.attrgetter(name) for name in ("shape", "dtype", "device"))


class GradientNorm(NamedTuple):
    """The result of :func:`gradient_norm`, on the gradients' device.

    Attributes:
        norm: Euclidean norm of all gradients together, [] fp64.
        scale: ``min(1, max_norm / norm)``, [1] fp32, NaN if the norm is not finite: ``grad_scale`` of ``laprop``.
        finite: whether the norm is finite, which it is if all gradients are (fp64 ones up to 1e154), [] bool.
    """

    norm: Tensor
    scale: Tensor
    finite: Tensor


def _fake(
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
    """All results are in place."""


def _fake_gradient_norm(grads: list[Tensor], max_norm: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Norm [], scale [1] and whether the norm is finite []."""
    example = grads[0]
    return (
        example.new_empty((), dtype=torch.float64),
        example.new_empty(1, dtype=torch.float32),
        example.new_empty((), dtype=torch.bool),
    )


def _first_gradient(inputs: Inputs) -> Tensor:
    return inputs["grads"][0]


OPERATOR = Operator(
    "laprop",
    fake=_fake,
    like=_first_gradient,
    mutates=("params", "exp_avg", "exp_avg_sq", "copies", "clock"),
)
GRADIENT_NORM = Operator(
    "gradient_norm",
    fake=_fake_gradient_norm,
    like=_first_gradient,
    folder="laprop",
    function="gradient_norm",
)


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

    If ``grad_scale`` is not finite, nothing changes, the clock included; this is decided on the device.

    Lists are of equal length; tensors of the same index have the same shape, and all are contiguous and on one device.
    Parameters and state are float32 (or float64, which the reference backend computes), priors the same or bfloat16,
    gradients float32, bfloat16 or float16. Float16 gradients or copies cost a pass of their own: the kernels do not
    support float16.

    A CUDA graph can capture the call. Values that change from step to step then have to be on the device: the learning
    rate as a tensor, the corrections through a clock, and gradients with constant addresses.

    Args:
        params: the weights, fp32 masters if the model computes in bf16.
        grads: their gradients.
        exp_avg: momentum of normalised updates, times the learning rate.
        exp_avg_sq: second moment of the gradients.
        priors: the values that prior decay pulls to; needed unless ``prior_decay`` is 0.
        lr: learning rate of this step; with a clock also as one number on the tensors' device, read when the step runs.
        beta1: decay of the momentum.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: pull to zero, times ``lr``.
        prior_decay: pull to the prior, times ``lr``.
        bias_correction: ``sqrt(1 - beta2 ** t)`` at step t, from 1; not read if there is a clock.
        momentum_scale: ``lr / a``, which corrects the momentum's bias; each step replaces ``a`` (0 at first) by
            ``beta1 * a + (1 - beta1) * lr``; 1 if the learning rate is 0; not read if there is a clock.
        grad_scale: one fp32 number on the tensors' device that multiplies every gradient (a clip coefficient).
        clock: [2] fp64 on the tensors' device, zeros before the first step: the number of steps taken, and the a of
            ``momentum_scale``. The call advances it by one step and computes both corrections from it, in fp64.
        copies: bfloat16 or float16 tensors that receive the new weights, rounded to nearest even.
        backend: "auto", "reference", "cpu" (C++) or "cuda".

    Raises:
        ValueError: an argument of the wrong length, shape, dtype, device, layout or range.
        RuntimeError: ``backend`` was requested by name and cannot run here.
    """
    if prior_decay == 0.0:
        priors = None  # not read: saves a fifth of the memory traffic
    elif priors is None:
        raise ValueError(f"priors: expected one tensor per parameter as prior_decay is {prior_decay}, got None")
    lists = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "priors": priors, "copies": copies}
    present = {"params": params}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors as in params, got {len(tensors)}")
        present[name] = tensors
    checks.option("backend", backend, ("auto", *dispatch.MODULES))
    if not params:
        return
    _check_tensors(present)
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
            raise ValueError("lr: expected a number without a clock, got a tensor")
        _check_number("lr", lr, device, (torch.float32, torch.float64))
        rate, lr = lr.double().reshape(()), 0.0
    decays_fit = 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and weight_decay >= 0.0 and prior_decay >= 0.0
    corrections_fit = 0.0 <= bias_correction < math.inf and 0.0 <= momentum_scale < math.inf
    if not (decays_fit and corrections_fit and lr >= 0.0 and eps >= 0.0):  # the usual case makes no calls
        _check_settings(lr, beta1, beta2, eps, weight_decay, prior_decay)
        checks.number("bias_correction", bias_correction, 0.0, below=True)
        checks.number("momentum_scale", momentum_scale, 0.0, below=True)
    copies = list(copies or ())
    has_fp16_copy = False
    for copy in copies:
        has_fp16_copy = has_fp16_copy or copy.dtype == torch.float16
    OPERATOR(
        params=list(params),
        grads=_widen_fp16(grads),
        exp_avg=list(exp_avg),
        exp_avg_sq=list(exp_avg_sq),
        priors=list(priors or ()),
        copies=[] if has_fp16_copy else copies,
        grad_scale=grad_scale,
        clock=clock,
        rate=rate,
        lr=float(lr),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(eps),
        weight_decay=float(weight_decay),
        prior_decay=float(prior_decay),
        bias_correction=float(bias_correction),
        momentum_scale=float(momentum_scale),
        backend=backend,
    )
    if has_fp16_copy:
        _copy(copies, params, grad_scale)


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor], *, max_norm: float = float("inf"), backend: str = "auto") -> GradientNorm:
    """Return the norm of all gradients together and the coefficient that clips it, without waiting for the device.

    The same as::

        norm = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in grads]))
        scale = min(1, max_norm / norm) if norm.isfinite() else nan

    Squares are summed in fp64, which no finite gradient overflows, in an order that depends on the sizes alone: the
    same gradients give the same norm, bit for bit, with any number of threads. The gradients are contiguous, on one
    device, of any dtype of ``laprop``; float16 costs a pass of its own. Without gradients the norm is 0, on the CPU.

    Args:
        grads: tensors of any shapes.
        max_norm: the norm after multiplication by ``scale``, at most.
        backend: "auto", "reference", "cpu" (C++) or "cuda".

    Raises:
        ValueError: an argument of the wrong dtype, device, layout or range.
        RuntimeError: ``backend`` was requested by name and cannot run here.
    """
    checks.option("backend", backend, ("auto", *dispatch.MODULES))
    checks.number("max_norm", max_norm, 0.0)
    dtypes = *GRADIENTS, torch.float64
    if grads:
        checks.tensor("grads[0]", grads[0])
        if not _alike(grads, dtypes, grads[0].device):
            for i, grad in enumerate(grads):
                _check_one(f"grads[{i}]", grad, dtypes, grads[0].device)
    for i, grad in enumerate(grads):
        if grad.dtype == torch.float64:
            if backend not in ("auto", "reference"):
                raise ValueError(f"grads[{i}]: expected float32 or a half for backend {backend!r}, got float64")
            backend = "reference"
    grads = _widen_fp16(grads) or [torch.zeros(0, dtype=torch.float32, device="cpu")]
    return GradientNorm(*GRADIENT_NORM(grads=grads, max_norm=float(max_norm), backend=backend))


def _widen_fp16(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients with those in float16, which the kernels do not support, in float32."""
    widened = list(grads)
    for i, grad in enumerate(grads):
        if grad.dtype == torch.float16:
            checks.memory(f"grads[{i}]", grad)
            widened[i] = grad.float()
    return widened


def _copy(copies: Sequence[Tensor], params: Sequence[Tensor], grad_scale: Tensor | None) -> None:
    """Round the weights into copies of any dtype, unless the step was skipped."""
    for i, (copy, param) in enumerate(zip(copies, params, strict=True)):
        checks.memory(f"copies[{i}]", copy)
        copy.copy_(param if grad_scale is None else torch.where(grad_scale.isfinite(), param.to(copy.dtype), copy))


def _check_number(name: str, value: Tensor, device: torch.device, dtypes: torch.dtype | Sequence[torch.dtype]) -> None:
    """Require one element on the device."""
    checks.tensor(name, value)
    checks.memory(name, value)
    checks.device(name, value, device)
    checks.dtype(name, value, dtypes)
    checks.shape(name, value.reshape(-1), 1)


def _check_tensors(lists: dict[str, Sequence[Tensor]]) -> None:
    """Check shape, dtype, device and layout of every tensor; names are formatted only for an error."""
    params = lists["params"]
    example = params[0]
    has_extension = not torch.compiler.is_compiling() and extension.missing("cpu") is None
    if has_extension and extension.module().laprop_fits(*(lists.get(name, ()) for name in LISTS)):
        return  # in a fraction of the time of Python
    checks.tensor("params[0]", example)
    checks.dtype("params[0]", example, (torch.float32, torch.float64))
    for name, tensors in lists.items():
        others = {"grads": GRADIENTS, "priors": (torch.bfloat16,)}.get(name, ())
        dtypes = COPIES if name == "copies" else tuple(dict.fromkeys((*others, example.dtype)))
        try:
            if _alike(tensors, dtypes, example.device) and list(map(_shape, tensors)) == list(map(_shape, params)):
                continue
        except RuntimeError:  # a nested tensor has no shape
            pass
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            checks.tensor(f"{name}[{i}]", tensor)
            checks.memory(f"{name}[{i}]", tensor)
            checks.shape(f"{name}[{i}]", tensor, *param.shape)
            _check_one(f"{name}[{i}]", tensor, dtypes, example.device)


def _alike(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    """Whether all tensors pass ``_check_one``, in a fraction of its time."""
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
    checks.memory(name, tensor)
    checks.contiguous(name, tensor)


def _check_settings(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, prior_decay: float) -> None:
    checks.number("lr", lr, 0.0)
    checks.number("beta1", beta1, 0.0, 1.0, below=True)
    checks.number("beta2", beta2, 0.0, 1.0, below=True)
    checks.number("eps", eps, 0.0)
    checks.number("weight_decay", weight_decay, 0.0)
    checks.number("prior_decay", prior_decay, 0.0)
