"""Which device to compute on, and what it says without making the host wait."""

import torch
from torch import Tensor

from dph.errors import UserError


def choose(name: str, key: str = "device") -> str:
    """``name`` as a device of this machine; "auto" is the GPU where there is one.

    Raises UserError, beginning with ``key``, where this machine has no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    known = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        raise UserError(f"{key}: expected auto or a device of this machine ({', '.join(known)}), got {name!r}")
    return name


class Reading:
    """Numbers on their way from a tensor to the host, which may go on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy, behind the work that is queued already and before what comes."""
        self._numbers, self._there = tensor, None
        if tensor.is_cuda:
            self._numbers = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._numbers.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def numbers(self) -> list[float]:
        """Wait until they have come."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()
