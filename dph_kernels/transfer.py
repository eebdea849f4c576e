"""Asynchronous host-to-device copies."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # bytes: alignment of the tensors in one buffer; kernels load up to 16 at a time from aligned addresses


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without blocking the host.

    A copy from pageable memory to a GPU returns only after all earlier work of the GPU. One from pinned memory is
    queued; PyTorch keeps that memory until the copy has run.
    """
    if _blocks(tensor, device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copy tensors to a device without blocking the host, in one copy if possible; they then share its memory.

    One copy costs the host little more than that of a single tensor. A tensor that occurs twice is copied once, and the
    results are one tensor.
    """
    distinct = {id(tensor): tensor for tensor in tensors}
    if all(_blocks(tensor, device) for tensor in distinct.values()):
        copies = sent_together(list(distinct.values()), device)
    else:
        copies = [to_device(tensor, device) for tensor in distinct.values()]
    by_id = dict(zip(distinct, copies, strict=True))
    return [by_id[id(tensor)] for tensor in tensors]


def _blocks(tensor: Tensor, device: torch.device | str) -> bool:
    return tensor.device.type == "cpu" and torch.device(device).type == "cuda"


def sent_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copy tensors from the CPU to ``device`` through one buffer."""
    sizes = [size for tensor in tensors for size in (tensor.nbytes, -tensor.nbytes % ALIGNED)]
    host_buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for tensor, piece in zip(tensors, host_buffer.split(sizes)[::2], strict=True):
        piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    pieces = host_buffer.to(device, non_blocking=True).split(sizes)[::2]
    # ``data`` hides from autograd that the results share memory: it would refuse one after a write to another.
    return [piece.view(tensor.dtype).view(tensor.shape).data for tensor, piece in zip(tensors, pieces, strict=True)]
