"""Products of rows with a matrix of weights, in which no row's result depends on the other rows.

Training uses PyTorch's products. Token by token few rows are multiplied with all weights of a model, which is a matter
of reading them: here each is read once, in the layout that it has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dph_kernels import dispatch
from dph_kernels.linear.native import DTYPES, forward
from dph_kernels.native import missing

# Elements of weights from which the kernel pays: 1.6 to 2.8 times as fast as PyTorch for up to 32 rows, 0.9 to 1.1 for
# 256 to 1,024. Rows of fewer are short, and their products are quickly done.
LARGE = 1 << 18


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + bias`` [R, N] of rows [R, K] and weights [N, K].

    Inside of ``dispatch.batch_invariant()``, without gradients, fp32 and bf16 rows on the CPU are multiplied with large
    weights by the kernel, in fp32: of bf16 ones only the results are rounded. Everything else is computed by
    ``torch.nn.functional.linear``, and raises as it does.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        not dispatch.is_batch_invariant()
        or torch.is_grad_enabled()
        or weight.numel() < LARGE
        or x.device.type != "cpu"
        or x.dtype not in DTYPES
        or x.ndim != 2
        or x.shape[1:] != weight.shape[1:]
        or any(tensor.dtype != x.dtype for tensor in tensors)
        or torch.is_autocast_enabled("cpu")
        or not dispatch.can_bypass_dispatcher(tensors)
        or missing("cpu")
    ):
        return F.linear(x, weight, bias)
    return forward(x, weight, bias)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``, by :func:`linear` if the module is a plain ``nn.Linear``."""
    if dispatch.is_modified(module, nn.Linear):
        return module(x)
    return linear(x, module.weight, module.bias)
