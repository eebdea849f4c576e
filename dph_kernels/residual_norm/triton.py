"""Launcher of the Triton kernels of residual connection and LayerNorm or RMSNorm, one launch per pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    next_power_of_2,
    triton_device,
)
from dph_kernels.residual_norm import WIDEST
from dph_kernels.residual_norm import triton_kernels as kernels
from dph_kernels.residual_norm.reference import BIAS, WEIGHT, X, results

PROGRAMS_PER_SM = 4  # in the backward pass: enough to hide the loads, few partial sums to add
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 512, 256  # of a tile per warp
TILE = 2048  # elements of a program's tile of short rows
INTERPRETER_SMS = 2


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    return _forward(triton_device(x.device, INTERPRETER_SMS), x, update, weight, bias, eps, kind)


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.backward``; PyTorch adds the partial sums of weight and bias."""
    gpu = triton_device(total.device, INTERPRETER_SMS)
    return _backward(gpu, d_total, d_normed, total, weight, moments, needs)


def _forward(
    gpu: TritonDevice, x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    total, normed, moments = results(x, update, kind)
    rms, rows = kind == "rms", moments[0].numel()
    config = _tile(x.shape[-1], FORWARD_ELEMENTS, rms)
    x, x_token, x_head = _rows(x)
    added, update_token, update_head = (x, 0, 0) if update is None else _rows(update)  # any address without update
    arguments = {
        "x": x, "update": added, "weight": weight.contiguous(), "bias": (weight if bias is None else bias).contiguous(),
        "total": total, "normed": normed, "moments": moments, "rows": rows,
        "x_token": x_token, "x_head": x_head, "update_token": update_token, "update_head": update_head, "eps": eps,
    }  # fmt: skip
    constants = _sizes(x, config) | {"RMS": rms, "UPDATE": update is not None, "BIAS": bias is not None}
    gpu.launch(kernels.normalise, (cdiv(rows, config.block_m),), config, arguments, constants)
    return total, normed, moments


def _backward(
    gpu: TritonDevice, d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rms, rows, columns = len(moments) == 1, moments[0].numel(), total.shape[-1]
    need_sums = needs[WEIGHT] or needs[BIAS]
    config = _tile(columns, BACKWARD_ELEMENTS, rms)
    tiles = cdiv(rows, config.block_m)
    programs = min(tiles, PROGRAMS_PER_SM * gpu.sm_count)
    d_x = total.new_empty(total.shape if needs[X] else 0)
    partials = moments.new_empty(len(moments), programs if need_sums else 0, columns)
    d_normed = _rows(d_normed)
    arguments = {
        "d_total": d_normed if d_total is None else _rows(d_total),  # any address if there is no such gradient
        "d_normed": d_normed, "total": _rows(total), "weight": weight.contiguous(), "moments": moments, "d_x": d_x,
        "partials": partials, "rows": rows, "rows_per_program": cdiv(tiles, max(programs, 1)) * config.block_m,
    }  # fmt: skip
    constants = _sizes(total, config) | {
        "RMS": rms, "SKIP": d_total is not None, "NEED_X": needs[X], "NEED_SUMS": need_sums,
    }  # fmt: skip
    gpu.launch(kernels.gradients, (programs,), config, arguments, constants)
    sums = partials.sum(1) if need_sums else partials
    d_weight, d_bias = (  # copied: an operator's results share no memory
        sums[i].to(total.dtype, copy=True) if need else total.new_empty(0)
        for i, need in enumerate((needs[WEIGHT], needs[BIAS]))
    )
    return d_x, d_weight, d_bias


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """Argument (data, token stride, head stride) of a tensor [T, C] or [T, H, C]."""
    x = last_contiguous(x)
    return x, x.stride(0), x.stride(1) if x.ndim == 3 else 0


def _sizes(x: Tensor, config: LaunchConfig) -> dict[str, Any]:
    """Constants of a kernel for a tensor [T, C] or [T, H, C]."""
    heads = x.shape[1] if x.ndim == 3 else 1
    return {"C": x.shape[-1], "HEADS": heads, "ROWS": config.block_m, "BLOCK": config.block_n}


def _tile(columns: int, elements: int, rms: bool) -> LaunchConfig:
    """Configuration of a kernel whose programs hold whole rows, with ``elements`` of them per warp.

    Of kind "layer" it is one row, however short: several would add the elements of a row in another order than before.
    """
    if columns > WIDEST:
        raise RuntimeError(f"residual_norm: backend 'triton' takes rows of up to {WIDEST} elements, got {columns}")
    block = next_power_of_2(columns)
    rows = max(TILE // block, 1) if rms else 1
    return LaunchConfig(rows, block, 0, num_warps=min(max(rows * block // elements, 1), 16), num_stages=1)


def launches(capability: int) -> list[Launch]:
    """Launches for the audit, the same on any GPU.

    Both passes at the paper's width, with and without update, and those of queries in a joint projection.
    """
    gpu = LaunchRecorder(capability, sm_count=132)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(4096, 1536, dtype=dtype, device="meta")
        for update in (x, None):
            for kind, bias in (("layer", x[0]), ("rms", None)):
                _, normed, moments = _forward(gpu, x, update, x[0], bias, 1e-5, kind)
                _backward(gpu, update, normed, x, x[0], moments, [True, True, kind == "layer"])
        q = torch.empty(4096, 32, 128, dtype=dtype, device="meta")[:, :16]
        _, normed, moments = _forward(gpu, q, None, q[0, 0], None, 1e-5, "rms")
        _backward(gpu, None, normed, q, q[0, 0], moments, [True, True, False])
    return distinct(gpu.launches)
