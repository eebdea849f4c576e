"""What `torch.autocast` asks of the operators: one dtype for all that goes into a product."""

from typing import Any

import torch
from torch import Tensor


def active(x: Tensor) -> bool:
    """Whether PyTorch's autocast is on for the device of ``x``."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def together(*values: Any) -> tuple[Any, ...]:
    """Cast floating-point tensors to the dtype of the autocast context around, if there is one.

    fp64 stays, as in PyTorch's own rules; so does what is no tensor. The casts are part of the graph: gradients come
    back in each tensor's own dtype.
    """
    first = next((x for x in values if isinstance(x, Tensor)), None)
    if first is None or not active(first):
        return values
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) if _eligible(x) else x for x in values)


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
