"""Names of PyTorch that are not public, all in one place, so that another version of PyTorch is checked here.

Importing this module never fails: a name that PyTorch lacks is replaced by a function that raises when it is called,
and :func:`missing` lists it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

TESTED = ("2.11", "2.13")
"""Versions of PyTorch that the tests have passed with: 2.11 with CUDA, 2.13 on the CPU."""

NAMES = {
    "torch._C._FunctionBase.apply": "autograd functions without the Python of torch.autograd.Function.apply",
    "torch._C._SetExcludeDispatchKeyGuard": "autograd inside an operator",
    "torch._C.DispatchKey.AutogradFunctionality": "autograd inside an operator",
    "torch._C._are_functorch_transforms_active": "whether torch.func transforms a call",
    "torch._C._functorch.is_legacy_batchedtensor": "whether is_grads_batched of torch.autograd.grad batches a tensor",
    "torch._C._get_tracing_state": "whether torch.jit traces a call",
    "torch._C._profiler._RecordFunctionFast": "a named range in a profile",
    "torch.autograd._profiler_enabled": "whether a profile is being recorded",
    "torch.autograd.forward_ad._current_level": "whether forward-mode differentiation is active",
    "torch.nn.modules.module._has_any_global_hook": "whether a hook is registered on all modules",
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


are_functorch_transforms_active = function("torch._C._are_functorch_transforms_active")
_LEVEL = "torch.autograd.forward_ad._current_level"
forward_mode_level = function(_LEVEL)
if find(_LEVEL) is not None:  # a number that changes, read at each call
    forward_mode_level = functools.partial(getattr, find("torch.autograd.forward_ad"), "_current_level")
"""The level of forward-mode differentiation, negative if it is not active."""
get_tracing_state = function("torch._C._get_tracing_state")
"""The state of torch.jit.trace, None if it does not trace."""
is_in_torch_dispatch_mode = function("torch.utils._python_dispatch.is_in_torch_dispatch_mode")
has_any_global_hook = function("torch.nn.modules.module._has_any_global_hook")
is_legacy_batchedtensor = function("torch._C._functorch.is_legacy_batchedtensor")
linear_pointwise = function("torch.ops.mkldnn._linear_pointwise")
profiler_enabled = function("torch.autograd._profiler_enabled")
record_function = function("torch._C._profiler._RecordFunctionFast")


def interception() -> str | None:
    """Return in words the mode or transform that every call goes through, None if there is none."""
    reasons = {
        "a torch dispatch mode is active": is_in_torch_dispatch_mode(),
        "a torch.func transform is active": are_functorch_transforms_active(),
        "forward-mode differentiation is active": forward_mode_level() >= 0,
        "torch.jit traces the call": get_tracing_state() is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def unwrapped_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` without its Python, which prepares calls inside of functorch transforms."""
    return super(torch.autograd.Function, function).apply


def autograd_inside_operator() -> Any:
    """Return a context manager in which an operator's implementation, called by the dispatcher, records autograd."""
    guard = function("torch._C._SetExcludeDispatchKeyGuard")
    key = find("torch._C.DispatchKey.AutogradFunctionality")
    return guard(key, False) if key is not None else function("torch._C.DispatchKey.AutogradFunctionality")()
