"""Argument checks. Errors have the form "name: expected X, got Y"."""

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, value: object) -> None:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def shape(name: str, value: Tensor, *expected: int | str) -> None:
    """Compare a tensor's shape with sizes; a string matches any size and names it in the error."""
    tensor(name, value)
    sizes = value.shape
    if sizes == expected:  # the usual case, without a loop
        return
    if len(sizes) != len(expected) or any(isinstance(e, int) and e != s for e, s in zip(expected, sizes, strict=True)):
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(sizes)}")


def dtype(name: str, tensor: Tensor, expected: torch.dtype | Iterable[torch.dtype]) -> None:
    """Compare ``tensor.dtype`` with one dtype or with several allowed ones."""
    if tensor.dtype == expected:
        return
    allowed = (expected,) if isinstance(expected, torch.dtype) else tuple(dict.fromkeys(expected))
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """Compare ``tensor.device`` with the device of the operator's first tensor."""
    if tensor.device != expected:
        raise ValueError(f"{name}: expected a tensor on {expected}, got one on {tensor.device}")


def contiguous(name: str, tensor: Tensor) -> None:
    """Require the strides of a contiguous tensor."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")


def number(name: str, value: float, low: float, high: float = float("inf"), *, below: bool = False) -> None:
    """Require ``low <= value <= high``, or ``low <= value < high`` with ``below``."""
    inside = low <= value < high if below else low <= value <= high
    if not inside:
        raise ValueError(f"{name}: expected {low} <= {name} {'<' if below else '<='} {high}, got {value}")


def indices(name: str, values: Tensor, size: int, kind: str = "values") -> None:
    """Require ``0 <= values < size`` on the CPU; on a GPU the check would wait for the device."""
    if values.device.type != "cpu" or not values.numel():
        return
    low, high = map(int, values.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected {kind} in [0, {size}), got {low if low < 0 else high}")


def option(name: str, value: str, allowed: Iterable[str]) -> None:
    """Require ``value`` to be one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
