"""Launcher of the Triton kernels of residual connection and LayerNorm, one launch per pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels.checks import last_contiguous
from dph_kernels.launcher import (
    Launch,
    LaunchConfig,
    LaunchRecorder,
    TritonDevice,
    cdiv,
    distinct,
    matrix,
    next_power_of_2,
    triton_device,
)
from dph_kernels.residual_norm import WIDEST
from dph_kernels.residual_norm import triton_kernels as kernels
from dph_kernels.residual_norm.reference import BIAS, WEIGHT, X, results

PROGRAMS_PER_SM = 4  # in the backward pass: enough to hide the loads, few partial sums to add
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 512, 256  # of a row per warp
INTERPRETER_SMS = 2


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    return _forward(triton_device(x.device, INTERPRETER_SMS), x, update, weight, bias, eps)


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.backward``; PyTorch adds the partial sums of weight and bias."""
    gpu = triton_device(total.device, INTERPRETER_SMS)
    return _backward(gpu, d_total, d_normed, total, weight, moments, needs)


def _forward(
    gpu: TritonDevice, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed, moments = results(x, update)
    config = _row_config(x.shape[1], FORWARD_ELEMENTS)
    x = last_contiguous(x)
    added = x if update is None else last_contiguous(update)  # any address if there is no update
    arguments = {
        "x": x, "update": added, "weight": weight.contiguous(), "bias": (weight if bias is None else bias).contiguous(),
        "total": total, "normed": normed, "moments": moments,
        "x_row": x.stride(0), "update_row": added.stride(0), "eps": eps,
    }  # fmt: skip
    constants = {"C": x.shape[1], "BLOCK": config.block_n, "UPDATE": update is not None, "BIAS": bias is not None}
    gpu.launch(kernels.normalise, (len(x),), config, arguments, constants)
    return total, normed, moments


def _backward(
    gpu: TritonDevice, d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = total.shape
    programs, need_sums = min(rows, PROGRAMS_PER_SM * gpu.sm_count), needs[WEIGHT] or needs[BIAS]
    d_x = total.new_empty(total.shape if needs[X] else 0)
    partials = moments.new_empty(2, programs if need_sums else 0, columns)
    config = _row_config(columns, BACKWARD_ELEMENTS)
    total, d_normed = last_contiguous(total), last_contiguous(d_normed)
    skipped = d_normed if d_total is None else last_contiguous(d_total)  # any address if there is no such gradient
    arguments = {
        "d_total": matrix(skipped), "d_normed": matrix(d_normed), "total": matrix(total),
        "weight": weight.contiguous(), "moments": moments, "d_x": d_x, "partials": partials, "T": rows,
        "rows_per_program": cdiv(rows, max(programs, 1)),
    }  # fmt: skip
    constants = {
        "C": columns, "BLOCK": config.block_n, "SKIP": d_total is not None, "NEED_X": needs[X], "NEED_SUMS": need_sums,
    }  # fmt: skip
    gpu.launch(kernels.gradients, (programs,), config, arguments, constants)
    d_weight, d_bias = (  # copied: an operator's results share no memory
        sums.to(total.dtype, copy=True) if need else total.new_empty(0)
        for sums, need in zip(partials.sum(1) if need_sums else partials, (needs[WEIGHT], needs[BIAS]), strict=True)
    )
    return d_x, d_weight, d_bias


def _row_config(columns: int, elements: int) -> LaunchConfig:
    """Configuration of a kernel whose programs hold a whole row, with ``elements`` of it per warp."""
    if columns > WIDEST:
        raise RuntimeError(f"residual_norm: backend 'triton' takes rows of up to {WIDEST} elements, got {columns}")
    block = next_power_of_2(columns)
    return LaunchConfig(1, block, 0, num_warps=min(max(block // elements, 1), 16), num_stages=1)


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: both passes at the paper's width, with and without update; the same on any GPU."""
    gpu = LaunchRecorder(capability, sm_count=132)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(4096, 1536, dtype=dtype, device="meta")
        for update in (x, None):
            _, normed, moments = _forward(gpu, x, update, x[0], x[0], 1e-5)
            _backward(gpu, update, normed, x, x[0], moments, [True] * 3)
    return distinct(gpu.launches)
