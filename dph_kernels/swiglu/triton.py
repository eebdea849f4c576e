"""Launcher of the gated activation's Triton kernels, one launch per pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dph_kernels.checks import last_contiguous
from dph_kernels.launcher import Launch, LaunchConfig, LaunchRecorder, TritonDevice, cdiv, distinct, triton_device
from dph_kernels.swiglu import triton_kernels as kernels

FORWARD = LaunchConfig(4, 512, 0, num_warps=4, num_stages=1)
# 8 columns per thread: 16 bytes of half precision. A program walks down its rows.
BACKWARD = LaunchConfig(1, 1024, 0, num_warps=4, num_stages=1)
PROGRAMS_PER_SM = 8  # in the backward pass: more would leave more partial sums to add
INTERPRETER_SMS = 1


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Same results as ``reference.forward``."""
    return _forward(triton_device(projected.device, INTERPRETER_SMS), projected, bias)


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; PyTorch adds the partial sums of the bias' gradient."""
    gpu = triton_device(projected.device, INTERPRETER_SMS)
    return _backward(gpu, grad, projected, bias, projected_needed, bias_needed)


def _forward(gpu: TritonDevice, projected: Tensor, bias: Tensor | None) -> Tensor:
    rows, width = len(projected), projected.shape[1] // 2
    out = projected.new_empty(rows, width)
    projected = last_contiguous(projected)
    arguments = {
        "projected": projected, "bias": projected if bias is None else bias.contiguous(), "out": out,
        "projected_row": projected.stride(0), "T": rows,
    }  # fmt: skip
    constants = {"F": width, "BT": FORWARD.block_m, "BF": FORWARD.block_n, "BIAS": bias is not None}
    grid = (cdiv(rows, FORWARD.block_m) * cdiv(width, FORWARD.block_n),)
    gpu.launch(kernels.forward, grid, FORWARD, arguments, constants)
    return out


def _backward(
    gpu: TritonDevice, grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    rows, width = grad.shape
    rows_per_program = _rows_per_program(rows, width, gpu.sm_count)
    d_projected = projected.new_empty((rows, 2 * width) if projected_needed else 0)
    sums = projected.new_empty((cdiv(rows, rows_per_program), 2 * width) if bias_needed else 0, dtype=torch.float32)
    grad, projected = last_contiguous(grad), last_contiguous(projected)
    arguments = {
        "grad": grad, "projected": projected, "bias": projected if bias is None else bias.contiguous(),
        "d_projected": d_projected, "sums": sums, "grad_row": grad.stride(0), "projected_row": projected.stride(0),
        "T": rows, "rows_per_program": rows_per_program,
    }  # fmt: skip
    constants = {
        "F": width, "BF": BACKWARD.block_n, "BIAS": bias is not None, "STORE": d_projected.numel() > 0,
        "SUMS": sums.numel() > 0,
    }  # fmt: skip
    gpu.launch(
        kernels.backward, (cdiv(width, BACKWARD.block_n), cdiv(rows, rows_per_program)), BACKWARD, arguments, constants
    )
    return d_projected, sums.sum(0).to(projected.dtype) if bias_needed else projected.new_empty(0)


def _rows_per_program(rows: int, width: int, sm_count: int) -> int:
    """Rows of a program in the backward pass, so that the grid fills the device."""
    programs = cdiv(PROGRAMS_PER_SM * sm_count, cdiv(width, BACKWARD.block_n))
    return max(1, cdiv(rows, programs))


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: both passes at the paper's width, with and without a bias; the same on any GPU."""
    rows, width = 16384, 4096
    gpu = LaunchRecorder(capability, sm_count=108)
    for dtype in (torch.bfloat16, torch.float32):
        projected = torch.empty(rows, 2 * width, dtype=dtype, device="meta")
        for bias in (None, projected[0]):
            out = _forward(gpu, projected, bias)
            _backward(gpu, out, projected, bias, True, bias is not None)
    return distinct(gpu.launches)
