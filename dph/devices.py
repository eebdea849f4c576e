"""Which device to compute on, how much memory there is, and what a device says without making the host wait."""

import os
from pathlib import Path

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


def low_precision(precision: str, device: torch.device) -> bool:
    """Whether a stage computes in bf16."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def host_memory() -> int:
    """Bytes that the host has available: as Linux says (elsewhere all there are), in the bounds of a container."""
    known, bounds = Path("/proc/meminfo"), ("memory.max", "memory/memory.limit_in_bytes")  # cgroups, version 2 and 1
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if known.exists():
        lines = dict(line.split(":") for line in known.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    for path in (Path("/sys/fs/cgroup") / name for name in bounds):
        if path.exists() and path.read_text().strip().isdigit():
            found.append(int(path.read_text()))
    return min(found)


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
