"""What the host has made, on its way to the device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor.to(device)``, for which the host does not wait.

    A copy from ordinary memory to a GPU ends only when all that the GPU was given before has ended. From pinned memory
    it takes its turn; PyTorch keeps that memory until then.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
