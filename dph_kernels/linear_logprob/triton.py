"""Launcher of the log-probabilities' Triton kernels: configurations, tiles and matrix products.

In half precision the logits never reach memory: the forward pass reduces each tile of them in registers, and the
backward pass turns it into gradients of logits, from which cuBLAS computes those of states and weights. If these are
computed along, the forward pass stores shares of the softmax, for some rows at a time. Single precision multiplies by
cuBLAS, with a fused pass over each tile.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dph_kernels.checks import last_contiguous, readable_by_cublas
from dph_kernels.launcher import (
    SPECIALIZED,
    Launch,
    LaunchConfig,
    LaunchRecorder,
    TritonDevice,
    cdiv,
    distinct,
    matrix,
    triton_device,
)
from dph_kernels.linear_logprob import empty_results, spans, tiles
from dph_kernels.linear_logprob import triton_kernels as kernels

# Configurations

# Of the kernels that multiply, in both passes, by architecture. Tiles are large since their operands pass through the
# cache; that of 90 is the best of eight on an H200, with bulk copies that save 8 and 4 % (both passes). 120 has the
# instructions of 80, and 99 KB of shared memory.
CONFIGS = {
    80: LaunchConfig(128, 128, 32, 4, 4, group_m=8),
    90: LaunchConfig(128, 256, 64, 8, 4, group_m=16, tma=True),
    120: LaunchConfig(128, 128, 32, 4, 4, group_m=8),
}
INTERPRETED = LaunchConfig(16, 32, 16, 1, 1, group_m=2, tma=True)
# Of the other kernels; block_n is the number of logits that a program of a pass holds at once.
ELEMENTWISE = LaunchConfig(1, 2048, 0, 4, 1)
COMBINE = {"BLOCKS": 32, "BR": 32}  # partial results that a program combines at once: blocks of columns x rows
# Dtypes in which gradients are computed along: those of a sum over all rows can overflow fp16.
JOINT = (torch.bfloat16,)
JOINT_BYTES = 295_000_000  # footprint of this, without the gradients themselves
LEAST_ROWS = 1024  # from which on it pays to read and write the sums of the weights' gradient
UNIT = 16  # elements: row strides of tiles in memory are multiples of it, for vector loads and fast products


def _config(gpu: TritonDevice) -> LaunchConfig:
    """Configuration of the newest architecture that is not newer than the device."""
    return gpu.newest(CONFIGS, "linear_logprob", " for half precision") if gpu.capability else INTERPRETED


# Engines


class Engine:
    """Tile sizes for a bound of 300 MB on extra memory, products and passes of fp32 (see :class:`tiles.Engine`)."""

    # 44 times 128: with C = 768 the 128 x 256 blocks of a gradient's product just fill the 132 SMs of an H100 or H200,
    # on which sides of 4096 and 8192 are 8 and 3 % slower. fp32 logits of a tile take 127 MB, gradients of logits in
    # half precision 63.
    side = 5632
    most_sums = 2**24  # 64 MiB

    def __init__(self, gpu: TritonDevice, hidden: Tensor, weight: Tensor) -> None:
        """Choose tiles; for few rows they are wide."""
        self.gpu = gpu
        self.rows = max(1, min(self.side, len(hidden)))
        wide = min(max(self.side, self.side**2 // self.rows), self.most_sums // max(1, weight.shape[1]))
        self.columns = max(UNIT, wide // UNIT * UNIT)
        self.size = self.rows, -(-min(self.columns, len(weight)) // UNIT) * UNIT
        self.dtype = hidden.dtype

    @functools.cached_property
    def buffer(self) -> Tensor:
        """Memory for one tile, reused by all tiles: for logits, their gradients, or both in turn."""
        return torch.empty(self.size, dtype=self.dtype, device=self.gpu.device)

    def operand(self, x: Tensor) -> Tensor:
        """Return ``x``: cuBLAS accepts all strides with a 1 among them, and PyTorch copies the others."""
        return x

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One program per row."""
        logits = self._logits(hidden, weight)
        arguments = {
            "logits": matrix(logits), "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "logprobs": logprobs, "entropy": entropy, "best": best, "columns": logits.shape[1], "first": first,
        }  # fmt: skip
        constants = {
            "START": first == 0, "LAST": last, "STATISTICS": len(entropy) > 0, "BLOCK": ELEMENTWISE.block_n,
        }  # fmt: skip
        self.gpu.launch(kernels.reduce_rows, (len(logits),), ELEMENTWISE, arguments, constants)

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """One program per block of a row; blocks of one row are neighbours. The logits are overwritten."""
        logits = self._logits(hidden, weight)
        arguments = {
            "logits": matrix(logits), "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "upstream": upstream, "columns": logits.shape[1], "first": first,
        }  # fmt: skip
        block = ELEMENTWISE.block_n
        grid = cdiv(logits.shape[1], block), len(logits)
        self.gpu.launch(kernels.gradient_rows, grid, ELEMENTWISE, arguments, {"BLOCK": block})
        return logits

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """``total`` (+)= ``a @ b``, from operands in half precision, without rounding to it before the last sum."""
        a, b = readable_by_cublas(a), readable_by_cublas(b)
        if a.is_cuda and a.dtype != torch.float32:
            if start:
                torch.mm(a, b, out_dtype=torch.float32, out=total)
            else:
                torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a.float(), b.float(), beta=0 if start else 1, out=total)

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Do nothing: the sums are the result."""

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = self.buffer[: len(hidden), : len(weight)]
        self.add(logits, hidden, weight.T, True)
        return logits


class Fused(Engine):
    """Engine of half precision: kernels that multiply, and reduce the logits or turn them into gradients in registers.

    The bound on memory excludes a copy of weights whose columns are not contiguous.
    """

    def __init__(self, gpu: TritonDevice, hidden: Tensor, weight: Tensor, partials: int = 0) -> None:
        """Choose tiles for ``partials`` numbers per row and block of columns that the forward pass stores.

        With them a tile has all columns, and as many rows as the partial results have memory for.
        """
        super().__init__(gpu, hidden, weight)
        self.unit: Tensor | None = None  # of the gradients of logits, if these are scaled
        if partials:
            config, self.columns = _config(gpu), len(weight)
            rows = self.most_sums // (partials * cdiv(self.columns, config.block_n))
            self.rows = max(1, rows // config.block_m) * config.block_m

    def keep(self, hidden: Tensor, weight: Tensor) -> None:
        """Size the buffer for :meth:`reduce_and_keep`: all columns of as many rows as the bound allows."""
        self.rows = min(self.rows, _joint_rows(self.gpu, weight))
        self.size = min(self.rows, len(hidden)), cdiv(len(weight), UNIT) * UNIT

    def operand(self, x: Tensor) -> Tensor:
        """Return ``x``, copied if its last dimension is not contiguous: the kernels read vectors of it."""
        return last_contiguous(x)

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One program per tile of logits, then one per block of rows; the tile has all columns."""
        self._reduce(hidden, weight, targets, normaliser, logprobs, entropy, best, None)

    def reduce_and_keep(
        self, hidden: Tensor, weight: Tensor, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> Tensor:  # fmt: skip
        """Reduce, and return the result of :meth:`gradient` for upstream gradients of 1, with all columns.

        This takes no further product, but a pass.
        """
        shares = self.buffer[: len(hidden), : len(weight)]
        tops = self._reduce(hidden, weight, targets, normaliser, logprobs, entropy, best, shares)
        arguments = {
            "shares": matrix(shares), "tops": tops, "targets": targets, "largest": normaliser[0],
            "log_sum": normaliser[1], "rows": len(hidden), "columns": len(weight),
        }  # fmt: skip
        width = _config(self.gpu).block_n
        constants = {"BN": width, "BLOCKS": max(1, ELEMENTWISE.block_n // width)}
        grid = len(hidden), cdiv(len(weight), width * constants["BLOCKS"])
        self.gpu.launch(kernels.gradient_shares, grid, ELEMENTWISE, arguments, constants)
        return shares

    def _reduce(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, normaliser: Tensor, logprobs: Tensor, entropy: Tensor,
        best: Tensor, shares: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the largest logits [blocks of columns, rows], which the ``shares`` are relative to."""
        config, statistics = _config(self.gpu), len(entropy) > 0
        size = cdiv(len(weight), config.block_n), len(hidden)
        tops, totals = (torch.empty(size, dtype=torch.float32, device=hidden.device) for _ in range(2))
        weighted, indices = (
            torch.empty(size if statistics else 0, dtype=dtype, device=hidden.device)
            for dtype in (torch.float32, torch.int32)
        )
        partials = tops, totals, weighted, indices
        arguments = {
            "targets": targets, "logprobs": logprobs, "partials": partials,
            "shares": (tops, 0) if shares is None else matrix(shares),  # any address if none are stored
        }  # fmt: skip
        constants = {"STATISTICS": statistics, "SHARES": shares is not None}
        self._multiply(kernels.reduce_tile, hidden, weight, arguments, constants)
        arguments = {
            "partials": partials, "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "logprobs": logprobs, "entropy": entropy, "best": best, "rows": len(hidden), "columns": len(weight),
        }  # fmt: skip
        constants = {"STATISTICS": statistics, "BN": config.block_n, **COMBINE}
        grid = (cdiv(len(hidden), COMBINE["BR"]),)
        self.gpu.launch(kernels.combine, grid, ELEMENTWISE, arguments, constants)
        return tops

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """One program per tile of logits."""
        changes = self.buffer[: len(hidden), : len(weight)]
        arguments = {
            "changes": matrix(changes), "targets": targets, "largest": normaliser[0], "log_sum": normaliser[1],
            "upstream": upstream, "first": first,
        }  # fmt: skip
        self._multiply(kernels.gradient_tile, hidden, weight, arguments, {})
        return changes

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Round the sums into the result, in the gradient's own unit again."""
        tiles.rounded(sums if self.unit is None else sums.mul_(self.unit), result)

    def scale(self, upstream: Tensor) -> Tensor:
        """Return ``upstream`` divided by a power of two (``unit``) that brings its largest element to 2^14 or above.

        Gradients of logits pass through the products in fp16: those of a mean over some thousand rows would
        underflow, and those of a loss scaled for fp16 overflow without it.
        """
        largest = upstream.abs().amax()
        exponent = torch.where(largest.isfinite() & (largest > 0), largest.frexp().exponent, 15).clamp(-100, 100)
        self.unit = torch.ldexp(torch.ones_like(largest), exponent - 15)
        return upstream / self.unit

    def _multiply(
        self, kernel: Any, hidden: Tensor, weight: Tensor, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Launch a kernel that multiplies, with tensor descriptors if both operands permit them.

        Else strides are passed in units of up to 16 elements, the largest that divides both, times ``SPECIALIZED``.
        """
        config = _config(self.gpu)
        tma = config.tma and _describable(hidden) and _describable(weight)
        unit = 1 if tma else math.gcd(16, hidden.stride(0), weight.stride(0))
        if tma:
            operands = {
                "hidden": TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
                "weight": TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
            }
        else:
            operands = {
                "hidden": (hidden, hidden.stride(0) // unit * SPECIALIZED),
                "weight": (weight, weight.stride(0) // unit * SPECIALIZED),
            }
        constants = constants | {
            "C": hidden.shape[1], "UNIT": unit, "TMA": tma, "BM": config.block_m, "BN": config.block_n,
            "BK": config.block_k, "GROUP": config.group_m,
        }  # fmt: skip
        sizes = {"rows": len(hidden), "columns": len(weight)}
        grid = (cdiv(len(hidden), config.block_m) * cdiv(len(weight), config.block_n),)
        self.gpu.launch(kernel, grid, config, operands | arguments | sizes, constants)


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can express ``x``: its rows are disjoint, and aligned to 16 bytes."""
    aligned = x.data_ptr() % 16 == x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= x.shape[1] > 0 and x.stride(1) == 1


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``, but NaN for a target outside of [0, V)."""
    return _forward(triton_device(hidden.device), hidden, weight, targets, statistics)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``."""
    arguments = hidden, weight, targets, normaliser, hidden_needed, weight_needed
    return _backward(triton_device(hidden.device), grad, *arguments)


def joint_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether :func:`forward_and_gradients` pays: states of a dtype in JOINT, and memory for enough rows."""
    if hidden.dtype not in JOINT or not hidden.numel():
        return False
    return _joint_rows(triton_device(hidden.device), weight) >= min(LEAST_ROWS, len(hidden))


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool, row_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results of ``reference.forward``, and the gradients that the backward pass scales.

    For hidden those of each log-probability, for weight that of their (weighted) sum. Three products, some rows at a
    time with all columns.
    """
    return _forward_and_gradients(triton_device(hidden.device), hidden, weight, targets, statistics, row_weights)


def _joint_rows(gpu: TritonDevice, weight: Tensor) -> int:
    """Rows at a time that fit in memory with the fp32 sums of the weights' gradient: a multiple of tiles, or 0."""
    (vocabulary, width), config = weight.shape, _config(gpu)
    # Shares, fp32 sums and a copy of a row's state, partial results.
    row = weight.element_size() * (vocabulary + width) + 4 * width + 16 * cdiv(vocabulary, config.block_n)
    return max(0, JOINT_BYTES - 4 * weight.numel()) // row // config.block_m * config.block_m


def _forward_and_gradients(
    gpu: TritonDevice,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: bool,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine = Fused(gpu, hidden, weight, partials=4 if statistics else 2)
    engine.keep(hidden, weight)
    logprobs, normaliser, entropy, best = empty_results(hidden, targets, statistics)
    grad_hidden, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    targets, w, weight_sums = targets.contiguous(), engine.operand(weight), tiles.fp32_sums(grad_weight)
    for part in spans(len(hidden), engine.rows, _config(gpu).block_m):
        h, hidden_sums = engine.operand(hidden[part]), tiles.fp32_sums(grad_hidden[part])
        results = normaliser[:, part], logprobs[part], entropy[part], best[part]
        change = engine.reduce_and_keep(h, w, targets[part], *results)
        engine.add(hidden_sums, change, w, True)
        engine.finish(hidden_sums, grad_hidden[part])
        if row_weights is not None:
            h = (h * row_weights[part, None]).to(h.dtype)
        engine.add(weight_sums, change.T, h, part.start == 0)
        del h, hidden_sums, change  # their memory is reused by the next ones
    engine.finish(weight_sums, grad_weight)
    return logprobs, normaliser, entropy, best, grad_hidden, grad_weight


def _forward(
    gpu: TritonDevice, hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    engine = _engine(gpu, hidden, weight, partials=4 if statistics else 2)
    return tiles.forward(engine, hidden, weight, targets, statistics)


def _backward(
    gpu: TritonDevice, grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, normaliser: Tensor,
    hidden_needed: bool, weight_needed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    engine = _engine(gpu, hidden, weight)
    if hidden.dtype == torch.float16 and len(hidden):
        grad = engine.scale(grad)
    return tiles.backward(engine, grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed)


def _engine(gpu: TritonDevice, hidden: Tensor, weight: Tensor, partials: int = 0) -> Engine:
    if hidden.dtype == torch.float32:
        return Engine(gpu, hidden, weight)
    return Fused(gpu, hidden, weight, partials)


# Audit


def _product_rows(kernel: Any, constants: Mapping[str, Any]) -> int:
    return constants.get("BM", 0)


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: all kernels for bf16 and fp32; fp16, and rows aligned to 8 bytes, without statistics."""
    gpu = LaunchRecorder(capability, product_rows=_product_rows)
    targets = torch.empty(8, dtype=torch.int64, device="meta")
    cases = [(torch.bfloat16, 768, False), (torch.bfloat16, 768, True), (torch.bfloat16, 772, False)]
    cases += [(torch.float16, 768, False), (torch.float32, 768, False), (torch.float32, 768, True)]
    for vocabulary, (dtype, stride, statistics) in itertools.product((1000, 100_000), cases):
        hidden, weight = (torch.empty(rows, stride, dtype=dtype, device="meta")[:, :768] for rows in (8, vocabulary))
        logprobs, normaliser, *_ = _forward(gpu, hidden, weight, targets, statistics)
        _backward(gpu, logprobs, hidden, weight, targets, normaliser, True, True)
        if dtype in JOINT and _joint_rows(gpu, weight):
            _forward_and_gradients(gpu, hidden, weight, targets, statistics)
    return distinct(gpu.launches)
