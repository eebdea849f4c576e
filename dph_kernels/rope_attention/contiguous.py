"""Adapter to attention kernels of other libraries: one contiguous key range per segment, rotated rows, autograd."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dph_kernels import dispatch, torch_private
from dph_kernels.layout import first_true
from dph_kernels.rope_attention import reference


class InexpressibleError(RuntimeError):
    """A layout that the requested backend cannot express."""


def refuse(backend: str, number: int, reason: str) -> NoReturn:
    """Raise for segment ``number`` of the table."""
    raise InexpressibleError(f"rope_attention: backend {backend!r} cannot express segment {number}: {reason}")


def ranges(segments: Tensor, memory: int, backend: str) -> Tensor:
    """Return [N, 5] number, query range and key range of all segments that have queries, in the order of the queries.

    A segment's queries see its one key range causally, aligned at the end: a prefix has to end at the start of the
    own keys, and the range may not cross from the memory to the new keys. Anything else raises with the first segment
    that cannot be expressed.
    """
    numbers = (segments[:, 1] > segments[:, 0]).nonzero().flatten()
    numbers = numbers[segments[numbers, 0].argsort()]
    q0, q1, k0, k1, p0, p1, _ = segments[numbers].unbind(1)
    own, prefix = k1 > k0, p1 > p0
    start, end = torch.where(prefix, p0, k0), torch.where(own | ~prefix, k1, p1)
    for i in first_true((start < memory) & (memory < end)):
        refuse(backend, int(numbers[i]), f"its keys are on both sides of row {memory}, the end of the memory")
    for i in first_true(own & prefix & (p1 != k0)):
        refuse(backend, int(numbers[i]), f"its prefix ends at key {p1[i]}, and its own keys begin at {k0[i]}")
    for i in first_true(prefix & (q1 - q0 > k1 - k0 + 1)):
        few = f"{q1[i] - q0[i]} queries and {k1[i] - k0[i]} own keys"
        refuse(backend, int(numbers[i]), f"with {few}, alignment at the end would hide keys of its prefix")
    return torch.stack([numbers, q0, q1, start, end], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` [T, H, D] rotated, contiguous, in its dtype, by the device's kernel if it supports the dtype."""
    device = x.device.type
    kernel = {"cpu": "cpu", "cuda": "triton"}[device]
    if dispatch.missing("rope_attention", kernel, device, x.dtype):
        return reference.rotate(x, cos, sin).to(x.dtype)
    return dispatch.implementation("rope_attention", device, kernel, x.dtype).rotate(x, cos, sin)


def gradients(attend: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    """Return the gradients of the first ``wanted`` of ``inputs`` by recomputing ``attend`` under autograd.

    The libraries' own backward functions are private and differ between kernels; this calls public functions only.
    Inside a custom operator the dispatcher excludes autograd, so that ``enable_grad`` alone records nothing.
    ``torch.func.vjp`` does record, but breaks under dispatch modes such as PyTorch's FLOP counter.
    """
    with torch.enable_grad(), torch_private.autograd_inside_operator():
        leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(inputs)]
        return torch.autograd.grad(attend(*leaves), leaves[:wanted], grad)
