"""LaProp with decoupled prior and weight decay, every parameter in one call.

Paper: arXiv 2405.20053, on LaProp (arXiv 2002.04839); the momentum carries the learning rate (SPEC.md 4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import checks, dispatch

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def laprop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor] | None = None,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    prior_decay: float = 0.0,
    bias_correction: float = 1.0,
    momentum_scale: float = 1.0,
    grad_scale: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """Update ``params``, ``exp_avg``, ``exp_avg_sq`` and ``copies`` in place.

    For each tensor, with g = grad * grad_scale::

        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g ** 2
        exp_avg = beta1 * exp_avg + (1 - beta1) * lr * bias_correction * g / (exp_avg_sq.sqrt() + eps)
        param = param - lr * (prior_decay * (param - prior) + weight_decay * param) - momentum_scale * exp_avg
        copy = param.to(copy.dtype)

    Lists are of equal length; tensors that stand at the same place have the same shape, and all are contiguous and on
    one device. Parameters, state and priors are float32 (or float64, which the reference backend computes), gradients
    float32, bfloat16 or float16. Float16, of gradients or copies, costs a pass of its own: the kernels do not know it.

    Args:
        params: the weights, fp32 masters where the model computes in bf16.
        grads: their gradients.
        exp_avg: momentum of normalised updates, which carries the learning rate.
        exp_avg_sq: second moment of the gradients.
        priors: the values that prior decay pulls to; needed where ``prior_decay`` is not 0.
        lr: learning rate of this step.
        beta1: decay of the momentum.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: pull to zero, times ``lr``.
        prior_decay: pull to the prior, times ``lr``.
        bias_correction: ``sqrt(1 - beta2 ** t)`` at step t, from 1.
        momentum_scale: ``1 / c`` of SPEC.md 4, which corrects the momentum's bias; 1 where the learning rate is 0.
        grad_scale: one fp32 number on the tensors' device that multiplies every gradient (a clip coefficient).
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
    _check_tensors({"params": params, **{name: tensors for name, tensors in lists.items() if tensors is not None}})
    if params[0].dtype == torch.float64 and backend == "auto":
        backend = "reference"
    if params[0].dtype == torch.float64 and backend != "reference":
        raise ValueError(f"params[0]: expected float32 for backend {backend!r}, got float64")
    if grad_scale is not None:
        checks.device("grad_scale", grad_scale, params[0].device)
        checks.dtype("grad_scale", grad_scale, torch.float32)
        checks.shape("grad_scale", grad_scale.reshape(-1), 1)
    _check_numbers(lr, beta1, beta2, eps, weight_decay, prior_decay)
    checks.number("bias_correction", bias_correction, 0.0, below=True)
    checks.number("momentum_scale", momentum_scale, 0.0, below=True)
    copies = list(copies or ())
    half = any(copy.dtype == torch.float16 for copy in copies)
    _laprop(
        list(params),
        [grad.float() if grad.dtype == torch.float16 else grad for grad in grads],
        list(exp_avg),
        list(exp_avg_sq),
        list(priors or ()),
        [] if half else copies,
        grad_scale,
        float(lr),
        float(beta1),
        float(beta2),
        float(eps),
        float(weight_decay),
        float(prior_decay),
        float(bias_correction),
        float(momentum_scale),
        backend,
    )
    if half:
        torch._foreach_copy_(copies, list(params))


def _check_tensors(lists: dict[str, Sequence[Tensor]]) -> None:
    """Shape, dtype, device and layout of every tensor; the names are put together only where something is wrong."""
    params = lists["params"]
    first = params[0]
    checks.tensor("params[0]", first)
    checks.dtype("params[0]", first, (torch.float32, torch.float64))
    for name, tensors in lists.items():
        dtypes = {"grads": (*GRADIENTS, first.dtype), "copies": COPIES}.get(name, (first.dtype,))
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if (
                not isinstance(tensor, Tensor)
                or tensor.shape != param.shape
                or tensor.dtype not in dtypes
                or tensor.device != first.device
                or not tensor.is_contiguous()
            ):
                _complain(f"{name}[{i}]", tensor, param, dtypes, first.device)


def _complain(name: str, tensor: Tensor, param: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    checks.tensor(name, tensor)
    checks.shape(name, tensor, *param.shape)
    checks.dtype(name, tensor, dtypes)
    checks.device(name, tensor, device)
    checks.contiguous(name, tensor)


def _check_numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, prior_decay: float) -> None:
    checks.number("lr", lr, 0.0)
    checks.number("beta1", beta1, 0.0, 1.0, below=True)
    checks.number("beta2", beta2, 0.0, 1.0, below=True)
    checks.number("eps", eps, 0.0)
    checks.number("weight_decay", weight_decay, 0.0)
    checks.number("prior_decay", prior_decay, 0.0)


@torch.library.custom_op("dph::laprop", mutates_args=("params", "exp_avg", "exp_avg_sq", "copies"))
def _laprop(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    priors: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
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
