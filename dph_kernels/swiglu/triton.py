"""The gated activation on the GPU: what ``triton_kernels.py`` is launched with, one launch each way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels.launches import Launch, cdiv, multiprocessors, signature
from dph_kernels.native import device_guard
from dph_kernels.strides import last_contiguous
from dph_kernels.swiglu import triton_kernels as kernels

ROWS, COLUMNS, WARPS = 4, 512, 4  # of a tile of the forward pass
BLOCK = 1024  # columns of a program of the backward pass: 8 for each thread, 16 bytes of half precision
PROGRAMS = 8  # of the backward pass for each multiprocessor: more shares of the rows would give more sums to add up


class _Call(NamedTuple):
    """One launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch it, unless there are no rows."""
        if 0 in self.grid:
            return
        with device_guard(device):
            options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def forward(projected: Tensor, bias: Tensor | None) -> Tensor:
    """What ``reference.forward`` gives."""
    out = projected.new_empty(len(projected), projected.shape[1] // 2)
    _forward(projected, bias, out).run(projected.device)
    return out


def backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, projected_needed: bool, bias_needed: bool
) -> tuple[Tensor, Tensor]:
    """What ``reference.backward`` gives; rows are added up in shares, and these by PyTorch."""
    rows, width = projected.shape
    share = _share(rows, width // 2, multiprocessors(projected.device))
    d_projected = projected.new_empty((rows, width) if projected_needed else 0)
    sums = projected.new_empty((cdiv(rows, share), width) if bias_needed else 0, dtype=torch.float32)
    _backward(grad, projected, bias, d_projected, sums, share).run(projected.device)
    return d_projected, sums.sum(0).to(projected.dtype) if bias_needed else projected.new_empty(0)


def _forward(projected: Tensor, bias: Tensor | None, out: Tensor) -> _Call:
    projected, (rows, width), has_bias = last_contiguous(projected), out.shape, bias is not None
    arguments = {
        "projected": projected, "bias": bias.contiguous() if has_bias else projected, "out": out,
        "projected_row": projected.stride(0), "T": rows,
    }  # fmt: skip
    constants = {"F": width, "BT": ROWS, "BF": COLUMNS, "BIAS": has_bias}
    return _Call(kernels.forward, (cdiv(rows, ROWS) * cdiv(width, COLUMNS),), arguments, constants)


def _backward(
    grad: Tensor, projected: Tensor, bias: Tensor | None, d_projected: Tensor, sums: Tensor, share: int
) -> _Call:
    grad, projected, (rows, width), has_bias = (
        last_contiguous(grad),
        last_contiguous(projected),
        grad.shape,
        bias is not None,
    )
    arguments = {
        "grad": grad, "projected": projected, "bias": bias.contiguous() if has_bias else projected,
        "d_projected": d_projected, "sums": sums, "grad_row": grad.stride(0), "projected_row": projected.stride(0),
        "T": rows, "share": share,
    }  # fmt: skip
    constants = {
        "F": width, "BF": BLOCK, "BIAS": has_bias, "STORE": d_projected.numel() > 0,
        "SUMS": sums.numel() > 0,
    }  # fmt: skip
    return _Call(kernels.backward, (cdiv(width, BLOCK), cdiv(rows, share)), arguments, constants)


def _share(rows: int, width: int, multiprocessors: int) -> int:
    """How many rows a program of the backward pass takes, for as many programs as keep the device busy."""
    shares = cdiv(PROGRAMS * multiprocessors, cdiv(width, BLOCK))
    return max(1, cdiv(rows, shares))


def launches(capability: int) -> list[Launch]:
    """For the audit: both passes at the paper's width, with and without a bias; the same on any GPU."""
    rows, width = 16384, 4096
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        projected, out = (torch.empty((rows, n), dtype=dtype, device="meta") for n in (2 * width, width))
        for bias in (None, torch.empty(2 * width, dtype=dtype, device="meta")):
            sums = torch.empty(0 if bias is None else (1, 2 * width), device="meta")
            found += [
                _launch("forward", dtype, _forward(projected, bias, out)),
                _launch("backward", dtype, _backward(out, projected, bias, projected, sums, 1)),
            ]
    return found


def _launch(name: str, dtype: torch.dtype, call: _Call) -> Launch:
    words = ["swiglu", name, str(dtype).removeprefix("torch."), *(["bias"] if call.constants["BIAS"] else [])]
    return Launch(
        name=" ".join(words),
        kernel=call.kernel,
        signature=signature(call.kernel, call.arguments, call.constants),
        constants=call.constants,
        aligned=tuple(n for n, v in call.arguments.items() if n not in kernels.NUMBERS),
        num_warps=WARPS,
        num_stages=1,
    )
