"""Which backend runs an operator, and why.

A backend is an argument. ``auto`` takes the first entry of one literal line per operator and device, below;
a backend that is asked for by name and cannot run raises with the reason.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

ONLY = "the only implementation so far"

# What `auto` tries, best first, and the measurement or the reason that puts it there.
AUTO: dict[str, dict[str, dict[str, str]]] = {
    "rope_attention": {"cpu": {"reference": ONLY}, "cuda": {"reference": ONLY}},
    "linear_logprob": {"cpu": {"reference": ONLY}, "cuda": {"reference": ONLY}},
    "swiglu_reward": {"cpu": {"reference": ONLY}, "cuda": {"reference": ONLY}},
    "preference_loss": {"cpu": {"reference": ONLY}, "cuda": {"reference": ONLY}},
    "laprop": {
        "cpu": {
            "cpu": "over 10 times as fast as eager PyTorch, as fast as its compiled form: benchmarks/bench_laprop.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "cuda": "one launch for all tensors; not yet measured",
            "reference": "plain PyTorch runs everywhere",
        },
    },
}

# Which file of an operator's folder holds a backend; no operator need have them all.
MODULES = {
    "reference": "reference",
    "triton": "triton",
    "cpu": "native",
    "cuda": "native",
    "flash": "flash",
    "sdpa": "sdpa",
}


@dataclass(frozen=True)
class Choice:
    """A backend and why it was taken."""

    backend: str
    reason: str


def implemented(operator: str) -> tuple[str, ...]:
    """The backends that ``operator`` has code for, on any device."""
    return tuple(dict.fromkeys(name for line in AUTO[operator].values() for name in line))


@functools.cache
def missing(operator: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device`` here, or None where it can."""
    if backend not in implemented(operator):
        return f"{operator} has no {backend!r} backend yet, only {', '.join(implemented(operator))}"
    if backend == "cpu" and device != "cpu":
        return f"the C++ kernel works on CPU tensors, and these are on {device}"
    if backend in ("triton", "cuda") and device != "cuda":
        return f"the {backend} kernel works on CUDA tensors, and these are on {device}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if backend in ("cpu", "cuda"):
        from dph_kernels import native

        return native.missing(backend)
    return None


@functools.cache
def choose(operator: str, device: str, backend: str = "auto") -> Choice:
    """The backend that runs ``operator`` on ``device`` ("cpu" or "cuda").

    Raises ValueError where ``backend`` is unknown, and RuntimeError with the reason where it was asked for by name
    and cannot run.
    """
    if backend != "auto":
        if backend not in MODULES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(MODULES)}, got {backend!r}")
        if reason := missing(operator, backend, device):
            raise RuntimeError(f"{operator}: backend {backend!r} cannot run: {reason}")
        return Choice(backend, "asked for by name")
    if device not in AUTO[operator]:
        raise ValueError(f"{operator}: expected tensors on {' or '.join(AUTO[operator])}, got {device}")
    passed_over = []
    for name, why in AUTO[operator][device].items():
        reason = missing(operator, name, device)
        if reason is None:
            return Choice(name, "; ".join([*passed_over, why]))
        passed_over.append(f"not {name}: {reason}")
    raise RuntimeError(f"{operator}: no backend can run on {device}: {'; '.join(passed_over)}")


def implementation(operator: str, device: torch.device | str, backend: str = "auto") -> ModuleType:
    """The module that implements ``operator``: ``dph_kernels.<operator>.<file>``."""
    choice = choose(operator, torch.device(device).type, backend)
    return importlib.import_module(f"dph_kernels.{operator}.{MODULES[choice.backend]}")


def call(function: str, operator: str, device: torch.device, backend: str, *arguments: Any, **options: Any) -> Any:
    """Run ``function`` ("forward" or "backward") of an operator's implementation, with autocast off.

    Operators compute in the dtypes of their arguments; autocast would change the products inside.
    """
    run = getattr(implementation(operator, device, backend), function)
    if not torch.is_autocast_enabled(device.type):
        return run(*arguments, **options)
    with torch.autocast(device.type, enabled=False):
        return run(*arguments, **options)


def toolchain() -> dict[str, str]:
    """How the native module was built and which compilers are here, for people to read: name -> description."""
    from dph_kernels import native

    return native.toolchain()
