"""The casts of `torch.autocast` for the operators: one dtype for all tensors of a product."""

from typing import Any

import torch
from torch import Tensor


def active(x: Tensor) -> bool:
    """Whether PyTorch's autocast is on for the device of ``x``."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def cast_together(*values: Any) -> tuple[Any, ...]:
    """Cast floating-point tensors to the dtype of the active autocast context, if there is one.

    fp64 tensors are not cast, as in PyTorch's own rules, and other values are returned as they are. The casts are part
    of the graph: each tensor's gradient has the tensor's own dtype.
    """
    example = next((x for x in values if isinstance(x, Tensor)), None)
    if example is None or not active(example):
        return values
    dtype = torch.get_autocast_dtype(example.device.type)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in values)


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
