"""Residual connection and LayerNorm on the GPU: one launch each way, and PyTorch's sums over the programs' shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels.launches import Launch, cdiv, multiprocessors, next_power_of_2, signature
from dph_kernels.native import device_guard
from dph_kernels.residual_norm import WIDEST
from dph_kernels.residual_norm import triton_kernels as kernels
from dph_kernels.residual_norm.reference import BIAS, WEIGHT, X, results
from dph_kernels.strides import last_contiguous

PROGRAMS = 4  # of the backward pass on each processor: enough to hide the loads, few enough to add up
INTERPRETED = 2  # processors


class Call(NamedTuple):
    """A launch; ``elements`` of a row for each warp."""

    kernel: Any
    programs: int
    elements: int
    arguments: dict[str, Any]
    constants: dict[str, Any]

    @property
    def warps(self) -> int:
        """A power of 2."""
        return min(max(self.constants["BLOCK"] // self.elements, 1), 16)


def forward(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
    found = results(x, update)
    _run(_normalise(x, update, weight, bias, eps, *found))
    return found


def backward(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.backward`` gives."""
    programs = min(total.shape[0], PROGRAMS * multiprocessors(total.device, INTERPRETED))
    d_x = total.new_empty(total.shape if needs[X] else 0)
    summed = needs[WEIGHT] or needs[BIAS]
    partials = moments.new_empty(2, programs if summed else 0, weight.shape[0])
    _run(_gradients(d_total, d_normed, total, weight, moments, d_x, partials, programs, needs))
    d_weight, d_bias = (  # copied: an operator's results share no memory
        part.to(total.dtype, copy=True) if need else total.new_empty(0)
        for part, need in zip(partials.sum(1) if summed else partials, (needs[WEIGHT], needs[BIAS]), strict=True)
    )
    return d_x, d_weight, d_bias


def _normalise(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    total: Tensor, normed: Tensor, moments: Tensor,
) -> Call:  # fmt: skip
    x, given = last_contiguous(x), x if update is None else last_contiguous(update)  # where there is none, any address
    arguments = {
        "x": x, "update": given, "weight": weight.contiguous(), "bias": (weight if bias is None else bias).contiguous(),
        "total": total, "normed": normed, "moments": moments,
        "x_row": x.stride(0), "update_row": given.stride(0), "eps": eps,
    }  # fmt: skip
    constants = {**_columns(x), "UPDATE": update is not None, "BIAS": bias is not None}
    return Call(kernels.normalise, len(x), 512, arguments, constants)


def _gradients(
    d_total: Tensor | None, d_normed: Tensor, total: Tensor, weight: Tensor, moments: Tensor,
    d_x: Tensor, partials: Tensor, programs: int, needs: Sequence[bool],
) -> Call:  # fmt: skip
    total, d_normed = last_contiguous(total), last_contiguous(d_normed)
    skipped = d_normed if d_total is None else last_contiguous(d_total)
    arguments = {
        "d_total": skipped, "d_normed": d_normed, "total": total, "weight": weight.contiguous(),
        "moments": moments, "d_x": d_x, "partials": partials,
        "d_total_row": skipped.stride(0), "d_normed_row": d_normed.stride(0), "total_row": total.stride(0),
        "T": total.shape[0], "share": cdiv(total.shape[0], max(programs, 1)),
    }  # fmt: skip
    constants = {
        **_columns(total), "SKIP": d_total is not None, "NEED_X": needs[X], "NEED_SUMS": needs[WEIGHT] or needs[BIAS],
    }  # fmt: skip
    return Call(kernels.gradients, programs, 256, arguments, constants)


def _columns(x: Tensor) -> dict[str, int]:
    columns = x.shape[1]
    if columns > WIDEST:
        raise RuntimeError(f"residual_norm: backend 'triton' takes rows of up to {WIDEST} elements, got {columns}")
    return {"C": columns, "BLOCK": next_power_of_2(columns)}


def _run(call: Call) -> None:
    """Launch it, unless there is nothing to do."""
    if not call.programs:
        return
    device = call.arguments["weight"].device
    with device_guard(device):
        call.kernel[(call.programs,)](**call.arguments, **call.constants, num_warps=call.warps, num_stages=1)


def launches(capability: int) -> list[Launch]:
    """For the audit: both passes at the paper's width, with and without update; the same on any GPU."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.empty(size, dtype=dtype, device="meta") for size in ((4096, 1536), 1536))
        moments, partials = (torch.empty(size, device="meta") for size in ((2, 4096), (2, 528, 1536)))
        for update in (x, None):
            calls = (
                _normalise(x, update, weight, weight, 1e-5, x, x, moments),
                _gradients(update, x, x, weight, moments, x, partials, 528, [True] * 3),
            )
            words = str(dtype).removeprefix("torch."), "update" if update is not None else "no update"
            found += [_launch(call, *words) for call in calls]
    return found


def _launch(call: Call, *words: str) -> Launch:
    whole = {n for n, v in call.arguments.items() if isinstance(v, Tensor) or (isinstance(v, int) and v % 16 == 0)}
    return Launch(
        name=" ".join([f"residual_norm.{call.kernel.__name__}", *words]),
        kernel=call.kernel,
        signature=signature(call.kernel, call.arguments, call.constants),
        constants=call.constants,
        aligned=tuple(sorted(whole.difference(kernels.NUMBERS))),
        num_warps=call.warps,
        num_stages=1,
    )
