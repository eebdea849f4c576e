"""What attention kernels of other libraries need: one contiguous range of keys a segment, rotated rows, autograd."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dph_kernels import dispatch
from dph_kernels.layout import first_true
from dph_kernels.rope_attention import reference


class InexpressibleError(RuntimeError):
    """A layout that the backend which was asked for has no means to express."""


def refuse(backend: str, number: int, reason: str) -> NoReturn:
    """Raise for segment ``number`` of the table."""
    raise InexpressibleError(f"rope_attention: backend {backend!r} cannot express segment {number}: {reason}")


def ranges(segments: Tensor, memory: int, backend: str) -> Tensor:
    """[N, 5] number, query range and key range of every segment that has queries, in the order of the queries.

    A segment's queries see its one key range causally, aligned at the end: a prefix has to end where the own keys
    begin, and neither memory nor new keys may be missing from the tensor that holds the range. Anything else raises
    with the first segment that cannot be expressed.
    """
    numbers = (segments[:, 1] > segments[:, 0]).nonzero().flatten()
    numbers = numbers[segments[numbers, 0].argsort()]
    q0, q1, k0, k1, p0, p1, _ = segments[numbers].unbind(1)
    own, prefix = k1 > k0, p1 > p0
    start, end = torch.where(prefix, p0, k0), torch.where(own | ~prefix, k1, p1)
    for i in first_true((start < memory) & (memory < end)):
        refuse(backend, int(numbers[i]), f"its keys lie on both sides of row {memory}, where the memory ends")
    for i in first_true(own & prefix & (p1 != k0)):
        refuse(backend, int(numbers[i]), f"its prefix ends at key {p1[i]}, and its own keys begin at {k0[i]}")
    for i in first_true(prefix & (q1 - q0 > k1 - k0 + 1)):
        few = f"{q1[i] - q0[i]} queries and {k1[i] - k0[i]} own keys"
        refuse(backend, int(numbers[i]), f"with {few}, alignment at the end would hide keys of its prefix")
    return torch.stack([numbers, q0, q1, start, end], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [T, H, D] rotated, contiguous, in its dtype: by our own kernel of the device where it takes this dtype."""
    device = x.device.type
    kernel = {"cpu": "cpu", "cuda": "triton"}[device]
    if dispatch.missing("rope_attention", kernel, device, x.dtype):
        return reference.rotate(x, cos, sin).to(x.dtype)
    return dispatch.implementation("rope_attention", device, kernel, x.dtype).rotate(x, cos, sin)


def gradients(attend: Callable[..., Tensor], grad: Tensor, given: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    """Gradients of the first ``wanted`` tensors given to ``attend``, by computing it once more under autograd.

    The libraries' own backward functions are private and differ from kernel to kernel; this way only their public ones
    are called. Inside a custom operator dispatch leaves autograd out, so that ``enable_grad`` alone records nothing.
    ``torch.func.vjp`` does record, but breaks under dispatch modes such as PyTorch's FLOP counter.
    """
    inside = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), inside:
        leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(given)]
        return torch.autograd.grad(attend(*leaves), leaves[:wanted], grad)
