"""Log-probabilities on the GPU: matrix products by cuBLAS, one fused Triton pass over each tile of logits.

A fully fused product would have to recompute or spill its tiles at V = 50,000, and Triton's products reach less of the
tensor cores than cuBLAS's; against that, writing and reading fp32 logits costs about a fifth of the products' time.
"""

import contextlib
import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from dph_kernels.launches import Launch, signature
from dph_kernels.linear_logprob import tiles
from dph_kernels.linear_logprob import triton_kernels as kernels

BLOCK = 2048  # logits that a program holds at once
WARPS = 4
UNIT = 16  # elements: rows of logits begin at multiples of it, which vectors and fast products need
SIZES = {"UNIT": UNIT, "BLOCK": BLOCK}


class Engine:
    """Sizes for a bound of 300 MB on extra memory, products and passes (see :class:`tiles.Engine`)."""

    # 44 times 128: with C = 768 the 128 x 256 blocks of a gradient's product just fill the 132 processors of an H100 or
    # H200. fp32 logits of a tile take 127 MB, their gradients in half precision 63.
    side = 5632
    most_sums = 2**24  # 64 MiB

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        """Memory for one tile, which all tiles share; few rows make wide tiles."""
        self.rows = max(1, min(self.side, len(hidden)))
        wide = min(max(self.side, self.side**2 // self.rows), self.most_sums // max(1, weight.shape[1]))
        self.columns = max(UNIT, wide // UNIT * UNIT)
        size = self.rows, -(-min(self.columns, len(weight)) // UNIT) * UNIT
        self.buffer = torch.empty(size, dtype=torch.float32, device=hidden.device)
        self.dtype = hidden.dtype
        self.unit: Tensor | None = None  # of the gradients of logits, where these are scaled

    @functools.cached_property
    def changes(self) -> Tensor:
        """Memory for the gradients of a tile; fp32 ones take the place of the logits."""
        return self.buffer if self.dtype == torch.float32 else torch.empty_like(self.buffer, dtype=self.dtype)

    def operand(self, x: Tensor) -> Tensor:
        """As it is: cuBLAS takes all strides with a 1 among them, and PyTorch copies the others."""
        return x

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``hidden @ weight.T`` in the memory that all tiles share."""
        logits = self.buffer[: len(hidden), : len(weight)]
        self.add(logits, hidden, weight.T, True)
        return logits

    def reduce(
        self, logits: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One program for each row."""
        arguments = {
            "logits": logits, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "logprobs": logprobs, "entropy": entropy, "best": best, **self._sizes(logits, first),
        }  # fmt: skip
        constants = {"START": first == 0, "LAST": last, "STATISTICS": len(entropy) > 0}
        self.run(kernels.reduce_rows, (len(logits),), arguments, constants)

    def gradient(self, logits: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor) -> Tensor:
        """One program for each block of a row; blocks of one row are neighbours."""
        rows, columns = logits.shape
        changes = self.changes[:rows, :columns]
        arguments = {
            "logits": logits, "changes": changes, "targets": targets, "largest": normaliser[0],
            "log_sum": normaliser[1], "upstream": upstream, **self._sizes(logits, first),
        }  # fmt: skip
        self.run(kernels.gradient_rows, (-(-columns // BLOCK), rows), arguments, {})
        return changes

    def sums(self, result: Tensor, transposed: bool) -> Tensor:
        """The result itself, if it is fp32: products of all layouts are equally fast."""
        return tiles.fp32_sums(result)

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """``total`` (+)= ``a @ b``: half precision goes in, and nothing is rounded to it before the last sum."""
        if a.is_cuda and a.dtype != torch.float32:
            if start:
                torch.mm(a, b, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a.float(), b.float(), beta=0 if start else 1, out=total)

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """In the gradient's own unit again."""
        tiles.rounded(sums if self.unit is None else sums.mul_(self.unit), result)

    def scale(self, upstream: Tensor) -> Tensor:
        """``upstream`` by a power of two that brings the largest of it to 2^14 or above.

        Gradients of logits go through the products in fp16, where a mean over some thousand rows would lose them below
        its smallest number, and a loss scaled for fp16 above its largest.
        """
        largest = upstream.abs().amax()
        exponent = torch.where(largest.isfinite() & (largest > 0), largest.frexp().exponent, 15).clamp(-100, 100)
        self.unit = torch.ldexp(torch.ones_like(largest), exponent - 15)
        return upstream / self.unit

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any]) -> None:
        """Launch it."""
        device, constants = arguments["logits"].device, {**constants, **SIZES}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](**arguments, **constants, num_warps=WARPS, num_stages=1, enable_fp_fusion=True)

    def _sizes(self, logits: Tensor, first: int) -> dict[str, int]:
        return {"units": logits.stride(0) // UNIT, "columns": logits.shape[1], "first": first}


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives, but NaN for a target outside of [0, V)."""
    return tiles.forward(Engine(hidden, weight), hidden, weight, targets, statistics)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """What ``reference.backward`` gives."""
    engine = Engine(hidden, weight)
    if hidden.dtype == torch.float16 and len(hidden):
        grad = engine.scale(grad)
    return tiles.backward(engine, grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed)


# For the audit


class _Recorder(Engine):
    """Keeps every launch instead of doing it."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__(hidden, weight)
        self.found: list[Launch] = []

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """Not a kernel of ours."""

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any]) -> None:
        """Describe it."""
        dtype = arguments.get("changes", arguments["logits"]).dtype
        words = str(dtype).removeprefix("torch."), *(name.lower() for name, on in constants.items() if on)
        constants = {**constants, **SIZES}
        self.found.append(
            Launch(
                name=" ".join([f"linear_logprob.{kernel.__name__}", *words]),
                kernel=kernel,
                signature=signature(kernel, arguments, constants),
                constants=constants,
                aligned=tuple(name for name in ("logits", "changes") if name in arguments),
                num_warps=WARPS,
                num_stages=1,
            )
        )


def launches(capability: int) -> list[Launch]:
    """Every kernel for bf16, fp16 and fp32 states; all architectures run the same ones."""
    found: dict[tuple, Launch] = {}
    targets = torch.empty(8, dtype=torch.int64, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocabulary, statistics in itertools.product((1000, 100_000), (False, True)):
            hidden, weight = (torch.empty(rows, 768, dtype=dtype, device="meta") for rows in (8, vocabulary))
            engine = _Recorder(hidden, weight)
            logprobs, normaliser, *_ = tiles.forward(engine, hidden, weight, targets, statistics)
            tiles.backward(engine, logprobs, hidden, weight, targets, normaliser, True, True)
            for launch in engine.found:
                found.setdefault(launch.key(), launch)
    return list(found.values())
