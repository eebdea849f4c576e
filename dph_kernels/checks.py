"""Checks, casts under `torch.autocast` and memory layout of an operator's inputs.

Errors have the form "name: expected X, got Y".
"""

from collections.abc import Iterable, Sequence
from functools import partial
from operator import is_not, mul
from typing import Any

import torch
from torch import Tensor

from dph_kernels.torch_private import is_functorch_wrapped_tensor, is_legacy_batchedtensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def tensor(name: str, value: object) -> None:
    """Require a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def sizes(name: str, value: Tensor) -> torch.Size:
    """Return a tensor's shape; nested tensors and uninitialised parameters have none."""
    if not isinstance(value, Tensor):
        tensor(name, value)
    try:
        return value.shape
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        raise ValueError(f"{name}: expected a dense tensor, got a {type(value).__name__}: {reason}") from None


def shape(name: str, value: Tensor, *expected: int | str) -> None:
    """Compare a tensor's shape with sizes; a string matches any size and names it in the error."""
    got = sizes(name, value)
    if got == expected:  # the usual case, without a loop
        return
    fits = len(got) == len(expected)
    for size, wanted in zip(got, expected, strict=False):
        fits = fits and (not isinstance(wanted, int) or wanted == size)
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(got)}")


def dtype(name: str, tensor: Tensor, expected: torch.dtype | Iterable[torch.dtype]) -> None:
    """Compare ``tensor.dtype`` with one dtype or with several allowed ones."""
    if tensor.dtype == expected:
        return
    allowed = (expected,) if isinstance(expected, torch.dtype) else tuple(dict.fromkeys(expected))
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def memory(name: str, value: Tensor) -> None:
    """Require a dense tensor whose storage holds all elements that shape, strides and offset refer to.

    PyTorch's own operations crash if it does not. Wrappers of transforms and subclasses pass: they have no storage.
    """
    if torch.compiler.is_dynamo_compiling() or type(value) not in PLAIN:
        return
    if is_functorch_wrapped_tensor(value) or is_legacy_batchedtensor(value):
        return
    if value.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    needed, stored = span(value) if value.numel() else 0, value.untyped_storage().nbytes()
    if stored < needed:
        raise ValueError(f"{name}: expected a storage of at least {needed} bytes, got {stored}: its memory was freed")


def span(x: Tensor) -> int:
    """Return the bytes of storage up to the last element of a dense tensor that has elements."""
    strides = x.stride()
    last = x.storage_offset() + sum(map(mul, x.shape, strides)) - sum(strides)
    return (last + 1) * x.itemsize


def in_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels can read all tensors: none is freed, a wrapper, on the meta device, or an implicit zero."""
    try:
        return have_storage(tensors) and _have_addresses(tensors)
    except RuntimeError:  # sparse tensors and wrappers of transforms have no storage
        return False


def have_storage(tensors: Iterable[Tensor]) -> bool:
    """Whether the storages of dense tensors hold all of their elements."""
    for x in tensors:
        stored, size = x.untyped_storage().nbytes(), x.nbytes
        is_whole = stored == size and not x.storage_offset() and x.is_contiguous()
        if size and not is_whole and stored < span(x):
            return False
    return True


def _have_addresses(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors that have elements have an address; loops in Python take longer."""
    without = list(map(Tensor.data_ptr, tensors)).count(0)
    return without == 0 or without == list(map(Tensor.numel, tensors)).count(0)


is_given = partial(is_not, None)


def require_memory(**tensors: Tensor | None) -> None:
    """Require :func:`memory` of tensors that PyTorch's own operations read, if one has no address."""
    if torch.compiler.is_dynamo_compiling():
        return
    try:
        if _have_addresses(list(filter(is_given, tensors.values()))):
            return
    except RuntimeError:  # no storage
        pass
    for name, value in tensors.items():
        if value is not None:
            memory(name, value)


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


# Casts


def autocast_active(x: Tensor) -> bool:
    """Whether PyTorch's autocast is on for the device of ``x``."""
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def cast_together(first: Any, *others: Any) -> tuple[Any, ...]:
    """Cast floating-point tensors to the dtype of the autocast context that is active for the first, if there is one.

    fp64 tensors are not cast, as in PyTorch's own rules, and other values are returned as they are. The casts are part
    of the graph: each tensor's gradient has the tensor's own dtype.
    """
    if not isinstance(first, Tensor) or not autocast_active(first):
        return first, *others
    dtype = torch.get_autocast_dtype(first.device.type)
    cast = []
    for value in (first, *others):
        is_cast = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        cast.append(value.to(dtype) if is_cast else value)
    return tuple(cast)


# Memory layout


def last_contiguous(x: Tensor) -> Tensor:
    """Return ``x``, copied unless the stride of its last dimension is 1, for kernels that read vectors of a row.

    The other strides may be any.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def readable_by_cublas(x: Tensor) -> Tensor:
    """Return ``x``, copied if its elements span 2**31 or more, which overflows the 32-bit offsets of cuBLAS.

    Seen with PyTorch 2.11 on an H200: an illegal access in a product of fp16 rows 2**30 elements apart.
    """
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if x.is_cuda and span >= 2**31 else x
