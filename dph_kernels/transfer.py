"""What the host has made, on its way to the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # bytes: where tensors of one buffer begin; kernels load up to 16 at a time where addresses allow it


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor.to(device)``, for which the host does not wait.

    A copy from ordinary memory to a GPU ends only when all that the GPU was given before has ended. From pinned memory
    it takes its turn; PyTorch keeps that memory until then.
    """
    if _waits(tensor, device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def all_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """``to_device`` of each, in one copy, which costs the host little more than that of one; they share its memory.

    A tensor that comes twice is sent once, and is one tensor there.
    """
    different = {id(tensor): tensor for tensor in tensors}
    if all(_waits(tensor, device) for tensor in different.values()):
        sent = sent_together(list(different.values()), device)
    else:
        sent = [to_device(tensor, device) for tensor in different.values()]
    there = dict(zip(different, sent, strict=True))
    return [there[id(tensor)] for tensor in tensors]


def _waits(tensor: Tensor, device: torch.device | str) -> bool:
    return tensor.device.type == "cpu" and torch.device(device).type == "cuda"


def sent_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Copies on ``device`` of tensors of the CPU, all in one piece of memory."""
    sizes = [size for tensor in tensors for size in (tensor.nbytes, -tensor.nbytes % ALIGNED)]
    here = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    for tensor, place in zip(tensors, here.split(sizes)[::2], strict=True):
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    there = here.to(device, non_blocking=True)
    places = zip(tensors, there.split(sizes)[::2], strict=True)
    # By ``data`` none is a view of another to autograd, which would refuse one where another has been written to.
    return [place.view(tensor.dtype).view(tensor.shape).data for tensor, place in places]
