"""Products of rows with a matrix of weights, where PyTorch's are slow or depend on the number of rows.

Training uses PyTorch's products. Token by token few rows are multiplied with all weights of a model, which is a matter
of reading them: here each is read once, in the layout that it has. And a CPU without bf16 instructions multiplies bf16
weights as fp32 numbers, some at a time, so that a model takes half of the memory at nearly the same speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dph_kernels import dispatch
from dph_kernels.linear.native import DTYPES, forward, forward_by_panels
from dph_kernels.native import missing
from dph_kernels.torch_private import has_bf16_products

# Elements of weights from which the kernel pays: 1.6 to 2.8 times as fast as PyTorch for up to 32 rows, 0.9 to 1.1 for
# 256 to 1,024. Rows of fewer are short, and their products are quickly done.
LARGE = 1 << 18
FEW = 32  # rows up to which the kernel multiplies bf16 weights faster than PyTorch does in fp32


def may_differ(x: Tensor) -> bool:
    """Whether :func:`linear` may compute a product of ``x`` otherwise than PyTorch."""
    return not torch.compiler.is_compiling() and (dispatch.is_batch_invariant() or _is_decoded(x))


def _is_decoded(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bf16_products()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + bias`` [.., N] of rows [.., K] and weights [N, K].

    Without gradients, rows on the CPU are multiplied with large weights in fp32, and only the results of bf16 ones are
    rounded: by the kernel inside of ``dispatch.batch_invariant()``, and bf16 rows on a CPU without bf16 instructions
    everywhere. Everything else is computed by ``torch.nn.functional.linear``, and raises as it does.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        not may_differ(x)
        or torch.is_grad_enabled()
        or weight.numel() < LARGE
        or x.device.type != "cpu"
        or x.dtype not in DTYPES
        or x.ndim < 2
        or x.shape[-1:] != weight.shape[1:]
        or any(tensor.dtype != x.dtype for tensor in tensors)
        or torch.is_autocast_enabled("cpu")
        or not dispatch.can_bypass_dispatcher(tensors)
        or missing("cpu")
    ):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    multiply = forward if dispatch.is_batch_invariant() or len(rows) <= FEW else forward_by_panels
    return multiply(rows, weight, bias).view(*x.shape[:-1], len(weight))


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``, by :func:`linear` if the module is a plain ``nn.Linear`` and that may differ."""
    if not may_differ(x) or dispatch.is_modified(module, nn.Linear):
        return module(x)
    return linear(x, module.weight, module.bias)
