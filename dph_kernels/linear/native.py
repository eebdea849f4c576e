"""Products of rows with weights in fp32 arithmetic: by csrc/cpu/linear.cpp, and of bf16 weights panel by panel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dph_kernels import native
from dph_kernels.checks import last_contiguous

DTYPES = (torch.float32, torch.bfloat16)
PANEL = 1 << 21  # weights that are fp32 numbers at the same time: 8 MiB


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` [R, N] in the dtype of ``x``."""
    rows, weight = last_contiguous(x.float()), last_contiguous(weight)
    bias = None if bias is None else bias.float().contiguous()
    out = torch.empty((len(rows), len(weight)))
    arguments = native.module().LinearArguments(
        rows=len(rows),
        columns=len(weight),
        depth=rows.shape[1],
        x=rows.data_ptr(),
        x_row=rows.stride(0),
        weight=weight.data_ptr(),
        weight_row=weight.stride(0),
        bf16=weight.dtype == torch.bfloat16,
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_row=out.stride(0),
    )
    native.module().linear_forward_cpu(arguments, native.threads())
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def forward_by_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` [R, N] in bf16 of bf16 rows and weights, by PyTorch's product in fp32."""
    rows, out = x.float(), x.new_empty(len(x), len(weight))
    columns = max(PANEL // weight.shape[1] // 16 * 16, 16)
    for first in range(0, len(weight), columns):
        panel = slice(first, first + columns)
        out[:, panel] = F.linear(rows, weight[panel].float(), None if bias is None else bias[panel].float())
    return out
