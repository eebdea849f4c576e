"""Which device to compute on."""

import torch

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
