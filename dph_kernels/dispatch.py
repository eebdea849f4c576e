"""The choice of the backend that runs an operator, and of calls that may bypass PyTorch's dispatcher.

A backend is an argument. ``auto`` takes the first entry of a literal line for each operator and device, below;
a backend that is requested by name and cannot run raises with the reason.

Kernels have gradients, but neither tangents nor gradients of gradients. Inputs that torch.func (``grad``, ``vjp``,
``jvp`` and what is built on them) or forward-mode differentiation has marked are computed in plain PyTorch, by the
reference, with ``auto``; a kernel that is requested by name raises.
"""

import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dph_kernels import native, torch_private
from dph_kernels.checks import PLAIN, in_memory

ON_REQUEST = "only by name: not measured to be faster"
EVERYWHERE = "plain PyTorch runs everywhere"

# The backends that `auto` tries, best first, each with its reason. Figures are in benchmarks/results.
AUTO: dict[str, dict[str, dict[str, str]]] = {
    "rope_attention": {
        "cpu": {
            "cpu": "faster than SDPA, both passes",
            "sdpa": ON_REQUEST,
            "reference": EVERYWHERE,
        },
        "cuda": {
            "triton": "faster than flash-attn; a shared prompt is computed once",
            "sdpa": ON_REQUEST,
            "flash": ON_REQUEST,
            "reference": EVERYWHERE,
        },
    },
    "linear_logprob": {
        "cpu": {"cpu": "faster than materialised logits, in less memory", "reference": EVERYWHERE},
        "cuda": {"triton": "as fast as all logits, compiled, in less memory", "reference": EVERYWHERE},
    },
    "preference_loss": {
        "cpu": {"cpu": "faster than eager and compiled PyTorch", "reference": EVERYWHERE},
        "cuda": {"triton": "one launch; faster than eager PyTorch", "reference": EVERYWHERE},
    },
    "residual_norm": {
        "cpu": {"cpu": "faster than eager PyTorch, both passes", "reference": EVERYWHERE},
        "cuda": {"triton": "faster than eager and compiled PyTorch, both passes", "reference": EVERYWHERE},
    },
    "swiglu": {
        "cpu": {"cpu": "faster than eager PyTorch, both passes", "reference": EVERYWHERE},
        "cuda": {"triton": "faster than eager PyTorch, near the memory bandwidth", "reference": EVERYWHERE},
    },
    "swiglu_reward": {
        "cpu": {"cpu": "at least as fast as eager PyTorch", "reference": EVERYWHERE},
        "cuda": {"triton": "two launches; faster than eager PyTorch", "reference": EVERYWHERE},
    },
    "laprop": {
        "cpu": {"cpu": "faster than eager PyTorch, as fast as compiled", "reference": EVERYWHERE},
        "cuda": {"cuda": "one launch for all tensors, at the speed of a copy", "reference": EVERYWHERE},
    },
}

_NO_RANGE = nullcontext()
SMALL_ELEMENTS = 2**17  # elements up to which PyTorch's own operations take about as long as a kernel with its Python

# The dtypes that a backend computes in, if not in all of them.
UP_TO_FP32 = (torch.float32, torch.bfloat16, torch.float16)
DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {
    ("rope_attention", "cpu"): (torch.float32, torch.bfloat16),
    ("rope_attention", "triton"): UP_TO_FP32,
    ("rope_attention", "flash"): (torch.bfloat16, torch.float16),
    ("linear_logprob", "cpu"): UP_TO_FP32,
    ("linear_logprob", "triton"): UP_TO_FP32,
    ("preference_loss", "cpu"): UP_TO_FP32,
    ("preference_loss", "triton"): UP_TO_FP32,
    ("residual_norm", "cpu"): (torch.float32, torch.bfloat16),
    ("residual_norm", "triton"): UP_TO_FP32,
    ("swiglu", "cpu"): (torch.float32, torch.bfloat16),
    ("swiglu", "triton"): UP_TO_FP32,
    ("swiglu_reward", "cpu"): (torch.float32, torch.bfloat16),
    ("swiglu_reward", "triton"): UP_TO_FP32,
}

# The file of an operator's folder that holds a backend; an operator need not have all of them.
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
    """A backend and the reason for it."""

    backend: str
    reason: str


def implemented(operator: str) -> tuple[str, ...]:
    """The backends that ``operator`` has code for, on any device."""
    return tuple(dict.fromkeys(itertools.chain(*AUTO[operator].values())))


def _has_flash_attn() -> bool:
    """Return whether flash-attn is installed: flash-attn-4, another package, has the same name without that module."""
    return all(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))


@functools.cache
def missing(operator: str, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``backend`` cannot run ``operator`` on ``device`` in ``dtype`` here, or None if it can."""
    if backend not in implemented(operator):
        return f"{operator} has no {backend!r} backend yet, only {', '.join(implemented(operator))}"
    if backend == "sdpa" and device not in ("cpu", "cuda"):
        return f"it works on CPU and CUDA tensors, and these are on {device}"
    if backend == "cpu" and device != "cpu":
        return f"the C++ kernel works on CPU tensors, and these are on {device}"
    if backend == "flash" and not _has_flash_attn():
        return "flash-attn is not installed: pip install flash-attn"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if backend in ("triton", "cuda", "flash") and device != "cuda" and not (backend == "triton" and interpreted()):
        return f"the {backend} kernel works on CUDA tensors, and these are on {device}"
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    dtypes = DTYPES.get((operator, backend))
    if dtypes and dtype is not None and dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"it computes in {known}, and these are {str(dtype).removeprefix('torch.')}"
    if backend in ("cpu", "cuda"):
        return native.missing(backend)
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run, slowly, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


@functools.cache
def choose(operator: str, device: str, backend: str = "auto", dtype: torch.dtype | None = None) -> Choice:
    """Return the backend that runs ``operator`` on ``device`` ("cpu" or "cuda") in ``dtype`` (None: in any).

    Raises ValueError if ``backend`` is unknown, and RuntimeError with the reason if it was requested by name and cannot
    run.
    """
    if backend != "auto":
        if backend not in MODULES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(MODULES)}, got {backend!r}")
        if reason := missing(operator, backend, device, dtype):
            raise RuntimeError(f"{operator}: backend {backend!r} cannot run: {reason}")
        return Choice(backend, "requested by name")
    if device not in AUTO[operator]:
        raise ValueError(f"{operator}: expected tensors on {' or '.join(AUTO[operator])}, got {device}")
    passed_over = []
    for name, why in AUTO[operator][device].items():
        if why == ON_REQUEST:
            continue
        reason = missing(operator, name, device, dtype)
        if reason is None:
            return Choice(name, "; ".join([*passed_over, why]))
        passed_over.append(f"not {name}: {reason}")
    raise RuntimeError(f"{operator}: no backend can run on {device}: {'; '.join(passed_over)}")


@functools.cache
def implementation(operator: str, device: str, backend: str = "auto", dtype: torch.dtype | None = None) -> ModuleType:
    """Return the module of the backend that :func:`choose` returns, ``dph_kernels.<operator>.<file>``."""
    file = MODULES[choose(operator, device, backend, dtype).backend]
    return importlib.import_module(f"dph_kernels.{operator}.{file}")


def call(function: Callable[..., Any], device: str, arguments: dict[str, Any]) -> Any:
    """Call a function of an implementation by keyword, with autocast for ``device`` off.

    Operators compute in the dtypes of their arguments; autocast would change the products inside.
    """
    if not torch.is_autocast_enabled(device):
        return function(**arguments)
    return without_autocast(function, device, **arguments)


def without_autocast(function: Callable[..., Any], device: str, /, **arguments: Any) -> Any:
    """Call ``function`` by keyword with autocast for ``device`` off."""
    with torch.autocast(device, enabled=False):
        return function(**arguments)


def needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Whether a call has to go through PyTorch's dispatcher.

    It has to under tracing, dispatch modes, torch.func and forward-mode differentiation, and with tensors that are
    batched (``is_grads_batched``) or lazily negated.
    """
    return (
        torch.compiler.is_compiling()
        or is_intercepted(tensors)
        or any(map(torch_private.is_legacy_batchedtensor, tensors))
    )


def can_bypass_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call does not need the dispatcher, and its tensors are of no subclass and have elements in memory.

    Entries may be None. The C++ module, if there is one, takes a fifth of the time.
    """
    if torch.compiler.is_compiling():
        return False
    if native.missing("cpu") is None:
        return native.module().can_bypass_dispatcher(tensors)
    present = [x for x in tensors if x is not None]
    return PLAIN.issuperset(map(type, present)) and not is_intercepted(present) and in_memory(present)


def is_intercepted(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with tensors in memory has to go through the dispatcher, apart from torch.compile."""
    return (
        torch_private.is_in_torch_dispatch_mode()
        or torch_private.are_functorch_transforms_active()
        or torch_private.forward_mode_level() >= 0
        or torch_private.get_tracing_state() is not None
        or any(map(Tensor.is_neg, tensors))
    )


def needs_formula(tensors: Sequence[Tensor]) -> bool:
    """Whether torch.func or forward-mode differentiation needs an operator in PyTorch's own operations."""
    if torch.compiler.is_compiling():
        return torch_private.differentiation_active()
    return any(map(torch_private.is_differentiated, tensors))


def bypass_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Return in words why :func:`can_bypass_dispatcher` is False, None if it is True."""
    for x in tensors:
        if type(x) not in PLAIN:
            return f"a tensor is a {type(x).__name__}, not a plain tensor"
        if x.is_meta:
            return "a tensor is on the meta device"
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if reason := torch_private.interception():
        return reason
    if needs_dispatcher(tensors):
        return "a tensor is batched or negated lazily"
    return None if in_memory(tensors) else "a tensor has no elements in memory"


def modification(module: torch.nn.Module, kind: type[torch.nn.Module]) -> str | None:
    """Return how ``module`` differs from an unobserved module of class ``kind``, None if it does not."""
    if type(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__name__}, not a {kind.__module__}.{kind.__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    return "has a forward method of its own" if "forward" in vars(module) else None


def is_modified(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether ``module`` has to be called: a kernel that takes its weights instead would compute something else.

    It is not an unobserved module of class ``kind``, or has a parameter that is no plain tensor in memory (quantised,
    sharded or offloaded).
    """
    if modification(module, kind) or torch_private.has_any_global_hook():
        return True
    return any(type(p) not in PLAIN or p.is_meta for p in module._parameters.values() if p is not None)


def profile_range(name: str) -> AbstractContextManager:
    """Return a context manager that names its block in a profile; the dispatcher does so for calls through it."""
    return torch_private.record_function(name) if torch_private.profiler_enabled() else _NO_RANGE


_BATCH_INVARIANT = ContextVar("batch_invariant", default=False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Let each row's result be the same bits with any other rows in its call, in this thread.

    "auto" then takes the same kernels for any number of rows, the CPU's attention computes each segment by itself,
    which is slower for many short ones that share a prompt, and ``dph_kernels.linear`` multiplies rows with weights.
    The products of PyTorch's matrices, which others than the CPU's kernels use, decide for themselves.
    """
    token = _BATCH_INVARIANT.set(True)
    try:
        yield
    finally:
        _BATCH_INVARIANT.reset(token)


is_batch_invariant = _BATCH_INVARIANT.get
"""Whether the caller is inside of :func:`batch_invariant`."""


@functools.cache
def usual_call(operator: str) -> Callable[..., Any] | None:
    """Return a function for usual calls of ``operator`` on the CPU, or None if there is none.

    For few elements the Python before a kernel would take several times as long as all of the arithmetic. A call with
    the backend "auto" is usual if its tensors are plain, in memory and fit, without the dispatcher, autocast or a
    profile. The function checks this in C++ and returns None for any other call, which the operator then checks and
    computes in the same bits. Not for code that is compiled.
    """
    return getattr(implementation(operator, "cpu", "auto", torch.float32), "usual_call", None)


def prefer_pytorch(operator: str, x: Tensor, backend: str, *, everywhere: bool = False) -> bool:
    """Whether "auto" computes a cheap operator on ``x`` in plain PyTorch.

    PyTorch's compiler fuses such an operation with its neighbours, which it cannot do with a custom operator. And for
    few elements the Python before a kernel takes several times as long as all of the arithmetic, except on the CPU (see
    :func:`usual_call`) unless it is so ``everywhere``. The choice does not depend on gradients: calls with and without
    them give the same bits.
    """
    if backend != "auto":
        return False
    if torch.compiler.is_compiling():
        return True
    if not is_small(x):
        return False
    return everywhere or x.device.type != "cpu" or choose(operator, "cpu", "auto", x.dtype).backend != "cpu"


def is_small(x: Tensor) -> bool:
    """Whether the Python before a kernel may take longer than the kernel; never inside of :func:`batch_invariant`."""
    return x.numel() <= SMALL_ELEMENTS and not is_batch_invariant()


def toolchain() -> dict[str, str]:
    """Return how the native module was built and which compilers are installed, in words: name -> description."""
    return native.toolchain()


def one_thread() -> str | None:
    """Return why the C++ kernels use one thread and the command that changes it, or None."""
    from dph_kernels import native

    return native.one_thread()
