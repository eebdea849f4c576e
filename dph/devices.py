"""Choice of the device, and sizes of its memory and the host's."""

import os
from pathlib import Path

import torch

from dph.errors import UserError


def choose(name: str, key: str = "device") -> str:
    """Return ``name`` if this machine has such a device; "auto" is the GPU if there is one, else the CPU.

    Raises UserError, which begins with ``key``, for any other name.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    known = ["cpu"]
    if gpus:
        known += ["cuda", *(f"cuda:{i}" for i in range(gpus))]
    if name not in known:
        raise UserError(f"{key}: expected auto or a device of this machine ({', '.join(known)}), got {name!r}")
    return name


def inference_dtype(name: str, device: str) -> str:
    """Return the dtype ``name``; for "auto" float32 on the CPU, where it is the fastest, and bfloat16 on a GPU."""
    if name != "auto":
        return name
    return "float32" if device == "cpu" else "bfloat16"


def low_precision(precision: str, device: torch.device) -> bool:
    """Whether a stage computes in bf16; "auto" does on GPUs."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def device_memory(device: torch.device) -> int:
    """Total memory of a GPU, in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def host_memory() -> int:
    """Memory available on the host, in bytes, within the limit of a container.

    Without Linux's /proc/meminfo, all physical memory counts as available.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        path = Path("/sys/fs/cgroup") / name
        if path.exists() and path.read_text().strip().isdigit():
            limits.append(int(path.read_text()))
    return min(limits)
