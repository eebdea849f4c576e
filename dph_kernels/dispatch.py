"""Which backend runs an operator, and why.

A backend is an argument. ``auto`` takes the first entry of one literal line per operator and device, below;
a backend that is asked for by name and cannot run raises with the reason.
"""

import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ASKED = "only where it is asked for by name: nothing measured speaks for it"

# What `auto` tries, best first, and the measurement or the reason that puts it there.
AUTO: dict[str, dict[str, dict[str, str]]] = {
    "rope_attention": {
        "cpu": {
            "cpu": "1.1 to 2.5 times as fast as SDPA, both passes, by processor: benchmarks/bench_attention.py",
            "sdpa": ASKED,
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "triton": "359 TFLOP/s forward where flash has 272 and cuDNN 424 (H200, 4096 tokens), prompts once",
            "sdpa": ASKED,
            "flash": ASKED,
            "reference": "plain PyTorch runs everywhere",
        },
    },
    "linear_logprob": {
        "cpu": {
            "cpu": "1.1 (Xeon) to 1.7 times (EPYC) as fast as materialised logits, both passes of one loss, in 1/40 of "
            "the memory: benchmarks/bench_linear_logprob.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "triton": "422 TFLOP/s, both passes in bf16, beside 289 MB; all logits, compiled: 407 beside 4.8 GB (H200)",
            "reference": "plain PyTorch runs everywhere",
        },
    },
    "preference_loss": {
        "cpu": {
            "cpu": "4 to 6 times as fast as eager PyTorch, about twice as its compiled form: "
            "benchmarks/bench_preference_loss.py",
            "reference": "plain PyTorch runs everywhere, and in fp64",
        },
        "cuda": {
            "triton": "one launch, 4 us at 64 pairs as a CUDA graph; with Python 3.4 times as fast as eager (H200)",
            "reference": "plain PyTorch runs everywhere, and in fp64",
        },
    },
    "residual_norm": {
        "cpu": {
            "cpu": "1.2 to 1.4 times as fast as eager PyTorch at 4096 x 768, both passes: "
            "benchmarks/bench_residual_norm.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "triton": "as a CUDA graph 3.0 TB/s, both passes: 1.9 times eager, 1.3 times its compiled form (H200)",
            "reference": "plain PyTorch runs everywhere",
        },
    },
    "swiglu": {
        "cpu": {
            "cpu": "1.3 to 2.5 times as fast as eager PyTorch, 1 to 1.5 times as its compiled form: "
            "benchmarks/bench_swiglu.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "triton": "3.8 TB/s of 4.3 forward, 6.5 times eager; both passes, with Python, 2.6 times (H200)",
            "reference": "plain PyTorch runs everywhere",
        },
    },
    "swiglu_reward": {
        "cpu": {
            "cpu": "forward as fast as eager PyTorch for up to 3 rows (bound by memory), else 1.06 to 2.5 times: "
            "benchmarks/bench_swiglu_reward.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "triton": "two launches, as a CUDA graph 18 us for 16 answers, 24 us for 128; eager 33 and 35 (H200)",
            "reference": "plain PyTorch runs everywhere",
        },
    },
    "laprop": {
        "cpu": {
            "cpu": "over 12 times as fast as eager PyTorch, 0.9 to 1.1 times as its compiled form: "
            "benchmarks/bench_laprop.py",
            "reference": "plain PyTorch runs everywhere",
        },
        "cuda": {
            "cuda": "one launch for all tensors, 4.1 TB/s where a copy has 4.3 (H200)",
            "reference": "plain PyTorch runs everywhere",
        },
    },
}

PLAIN = frozenset((Tensor, torch.nn.Parameter))
_is_meta = operator.attrgetter("is_meta")
FEW = 2**17  # elements over which PyTorch's own operations take about as long as a kernel of ours with its Python

# The dtypes that a backend computes in, where not in all of them.
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
def missing(operator: str, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` cannot run ``operator`` on ``device`` in ``dtype`` here, or None where it can."""
    if backend not in implemented(operator):
        return f"{operator} has no {backend!r} backend yet, only {', '.join(implemented(operator))}"
    if backend == "sdpa" and device not in ("cpu", "cuda"):
        return f"it works on CPU and CUDA tensors, and these are on {device}"
    if backend == "cpu" and device != "cpu":
        return f"the C++ kernel works on CPU tensors, and these are on {device}"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
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
        from dph_kernels import native

        return native.missing(backend)
    return None


def interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run, slowly, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


@functools.cache
def choose(operator: str, device: str, backend: str = "auto", dtype: torch.dtype | None = None) -> Choice:
    """The backend that runs ``operator`` on ``device`` ("cpu" or "cuda") in ``dtype`` (None: in any).

    Raises ValueError where ``backend`` is unknown, and RuntimeError with the reason where it was asked for by name
    and cannot run.
    """
    if backend != "auto":
        if backend not in MODULES:
            raise ValueError(f"backend: expected 'auto' or one of {', '.join(MODULES)}, got {backend!r}")
        if reason := missing(operator, backend, device, dtype):
            raise RuntimeError(f"{operator}: backend {backend!r} cannot run: {reason}")
        return Choice(backend, "asked for by name")
    if device not in AUTO[operator]:
        raise ValueError(f"{operator}: expected tensors on {' or '.join(AUTO[operator])}, got {device}")
    passed_over = []
    for name, why in AUTO[operator][device].items():
        if why == ASKED:
            continue
        reason = missing(operator, name, device, dtype)
        if reason is None:
            return Choice(name, "; ".join([*passed_over, why]))
        passed_over.append(f"not {name}: {reason}")
    raise RuntimeError(f"{operator}: no backend can run on {device}: {'; '.join(passed_over)}")


def implementation(
    operator: str, device: torch.device | str, backend: str = "auto", dtype: torch.dtype | None = None
) -> ModuleType:
    """The module that implements ``operator``: ``dph_kernels.<operator>.<file>``; a string names a type of devices."""
    choice = choose(operator, device if isinstance(device, str) else device.type, backend, dtype)
    return _module(operator, choice.backend)


@functools.cache
def _module(operator: str, backend: str) -> ModuleType:
    return importlib.import_module(f"dph_kernels.{operator}.{MODULES[backend]}")


def call(function: str, operator: str, like: Tensor, backend: str, *arguments: Any, **options: Any) -> Any:
    """Run ``function`` ("forward", "backward", or what else it has) of an operator's implementation, autocast off.

    The implementation is one for the device and dtype of the tensor ``like``. Operators compute in the dtypes of their
    arguments; autocast would change the products inside.
    """
    device = like.device.type
    run = getattr(implementation(operator, device, backend, like.dtype), function)
    if not torch.is_autocast_enabled(device):
        return run(*arguments, **options)
    with torch.autocast(device, enabled=False):
        return run(*arguments, **options)


def observed(tensors: Iterable[Tensor]) -> bool:
    """Whether somebody records, transforms, batches or differentiates the call, or a change of sign has been put off.

    Then it has to go through PyTorch's dispatcher, past which an operator may take a shorter way.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return True
    tensors = tuple(tensors)
    return any(map(is_legacy_batchedtensor, tensors)) or any(map(Tensor.is_neg, tensors))


def unobserved(tensors: Iterable[Tensor]) -> bool:
    """Whether a call may go past the dispatcher: not :func:`observed`, of no subclass, and with numbers behind it."""
    tensors = tuple(tensors)
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)):
        return False
    return not (observed(tensors) or any(map(_is_meta, tensors)))


def named(name: str) -> AbstractContextManager:
    """What the block runs has this name in a profile; for what goes past the dispatcher, which names all others."""
    return _RecordFunctionFast(name) if torch.autograd._profiler_enabled() else nullcontext()


def left_to_pytorch(x: Tensor, backend: str) -> bool:
    """Whether "auto" leaves a cheap operator on ``x`` to plain PyTorch.

    Its compiler fuses such a thing with what stands around it, which it cannot do with an operator of ours. And where
    there is little to compute, as when an answer is written token by token, the way to a kernel takes several times as
    long as all of it; with gradients or without, so that both give the same bits.
    """
    return backend == "auto" and (torch.compiler.is_compiling() or x.numel() <= FEW)


def toolchain() -> dict[str, str]:
    """How the native module was built and which compilers are here, for people to read: name -> description."""
    from dph_kernels import native

    return native.toolchain()
