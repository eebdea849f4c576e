"""Names of PyTorch that are not public, all in one place, so that another version of PyTorch is checked here.

Importing this module never fails: a name that PyTorch lacks is replaced by a function that raises when it is called,
and :func:`missing` lists it.
"""

import functools
import platform
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

TESTED = ("2.11", "2.13")
"""Versions of PyTorch that the tests have passed with: 2.11 with CUDA, 2.13 on the CPU."""

NAMES = {
    "torch.Tensor._is_zerotensor": "whether a tensor is an implicit zero of autograd, without memory",
    "torch._C._FunctionBase.apply": "autograd functions without the Python of torch.autograd.Function.apply",
    "torch._C._SetExcludeDispatchKeyGuard": "autograd inside an operator",
    "torch._C.DispatchKey.AutogradFunctionality": "autograd inside an operator",
    "torch._C._DisableFuncTorch": "computation of constants inside of torch.func transforms",
    "torch._C._are_functorch_transforms_active": "whether torch.func transforms a call",
    "torch._C._functorch.get_interpreter_stack": "whether torch.func differentiates a compiled call",
    "torch._C._functorch.get_unwrapped": "the tensor inside the wrapper of a torch.func transform",
    "torch._C._functorch.is_functorch_wrapped_tensor": "whether a torch.func transform has wrapped a tensor",
    "torch._C._functorch.is_gradtrackingtensor": "whether torch.func differentiates with respect to a tensor",
    "torch._C._functorch.is_legacy_batchedtensor": "whether is_grads_batched of torch.autograd.grad batches a tensor",
    "torch._C._functorch.unwrap_if_dead": "the tensor inside the wrapper of a torch.func transform that has ended",
    "torch._C._is_any_autocast_enabled": "whether autocast is on for any device",
    "torch._C._get_tracing_state": "whether torch.jit traces a call",
    "torch._C._profiler._RecordFunctionFast": "a named range in a profile",
    "torch.autograd._profiler_enabled": "whether a profile is being recorded",
    "torch.autograd.forward_ad._current_level": "whether forward-mode differentiation is active",
    "torch.autograd.forward_ad._set_fwd_grad_enabled": "outputs without tangents",
    "torch.nn.modules.module._has_any_global_hook": "whether a hook is registered on all modules",
    "torch.cpu._is_avx512_bf16_supported": "whether the CPU has bf16 instructions",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "whether oneDNN multiplies bf16 matrices",
    "torch.ops.mkldnn._linear_pointwise": "oneDNN's product of fp32 matrices",
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode": "whether a dispatch mode is active",
}
"""Dotted name -> its use in this package."""


def missing(names: Iterable[str] = NAMES) -> list[str]:
    """Return those of ``names`` that this version of PyTorch lacks."""
    return [name for name in names if find(name) is None]


def find(name: str) -> Any:
    """Return the object of a dotted name that begins with ``torch``, or None."""
    value: Any = torch
    for attribute in name.split(".")[1:]:
        value = getattr(value, attribute, None)
    return value


def function(name: str) -> Callable[..., Any]:
    """Return the function of a name in NAMES, or one that raises RuntimeError with the name when it is called."""

    def absent(*_: Any, **__: Any) -> NoReturn:
        tested = " and ".join(TESTED)
        raise RuntimeError(f"PyTorch {torch.__version__} lacks {name}, used for: {NAMES[name]}; tested: {tested}")

    return find(name) or absent


any_autocast_enabled = function("torch._C._is_any_autocast_enabled")
are_functorch_transforms_active = function("torch._C._are_functorch_transforms_active")
_LEVEL = "torch.autograd.forward_ad._current_level"
forward_mode_level = function(_LEVEL)
if find(_LEVEL) is not None:  # a number that changes, read at each call
    forward_mode_level = functools.partial(getattr, find("torch.autograd.forward_ad"), "_current_level")
"""The level of forward-mode differentiation, negative if it is not active."""
get_tracing_state = function("torch._C._get_tracing_state")
"""The state of torch.jit.trace, None if it does not trace."""
is_in_torch_dispatch_mode = function("torch.utils._python_dispatch.is_in_torch_dispatch_mode")
disable_functorch = function("torch._C._DisableFuncTorch")
get_interpreter_stack = function("torch._C._functorch.get_interpreter_stack")
get_unwrapped = function("torch._C._functorch.get_unwrapped")
has_any_global_hook = function("torch.nn.modules.module._has_any_global_hook")
is_functorch_wrapped_tensor = function("torch._C._functorch.is_functorch_wrapped_tensor")
is_gradtrackingtensor = function("torch._C._functorch.is_gradtrackingtensor")
is_legacy_batchedtensor = function("torch._C._functorch.is_legacy_batchedtensor")
avx512_has_bf16 = function("torch.cpu._is_avx512_bf16_supported")
is_zerotensor = function("torch.Tensor._is_zerotensor")
onednn_takes_bf16 = function("torch.ops.mkldnn._is_mkldnn_bf16_supported")
linear_pointwise = function("torch.ops.mkldnn._linear_pointwise")
profiler_enabled = function("torch.autograd._profiler_enabled")
record_function = function("torch._C._profiler._RecordFunctionFast")
set_forward_mode_enabled = function("torch.autograd.forward_ad._set_fwd_grad_enabled")
unwrap_if_dead = function("torch._C._functorch.unwrap_if_dead")


def interception() -> str | None:
    """Return in words the mode or transform that every call goes through, None if there is none."""
    reasons = {
        "a torch dispatch mode is active": is_in_torch_dispatch_mode(),
        "a torch.func transform is active": are_functorch_transforms_active(),
        "forward-mode differentiation is active": forward_mode_level() >= 0,
        "torch.jit traces the call": get_tracing_state() is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bf16 matrices on the CPU by instructions for it, and not number by number.

    oneDNN takes bf16 on any x86 CPU with AVX-512, also without such instructions: then it is slower than in fp32.
    """
    if not torch.backends.mkldnn.is_available() or not onednn_takes_bf16():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or avx512_has_bf16()


def is_differentiated(x: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation has marked ``x``: its results need derivatives, too."""
    x = unwrap_if_dead(x)
    while is_functorch_wrapped_tensor(x):
        if is_gradtrackingtensor(x):
            return True
        x = get_unwrapped(x)
    return forward_mode_level() >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def unwrapped(x: Tensor) -> Tensor:
    """Return ``x`` without the wrappers that torch.func transforms put around a tensor that is created in them."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


@torch.compiler.assume_constant_result
def differentiation_active() -> bool:
    """Whether torch.func or forward-mode differentiation is active; a constant for torch.compile.

    The compiler guards both, and traces the calls that start them.
    """
    names = [level.key().name for level in get_interpreter_stack() or ()]
    return forward_mode_level() >= 0 or "Grad" in names or "Jvp" in names


def constant(x: Tensor) -> Tensor:
    """Return ``x`` without gradient and without tangent; ``detach`` alone keeps the tangent."""
    with set_forward_mode_enabled(False):
        return x.detach()


def unwrapped_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python, which prepares calls inside of functorch transforms."""
    return super(torch.autograd.Function, function).apply


def autograd_inside_operator() -> Any:
    """Return a context manager in which an operator's implementation, called by the dispatcher, records autograd."""
    guard = function("torch._C._SetExcludeDispatchKeyGuard")
    key = find("torch._C.DispatchKey.AutogradFunctionality")
    return guard(key, False) if key is not None else function("torch._C.DispatchKey.AutogradFunctionality")()
