"""Log-probabilities on the CPU: products by PyTorch or oneDNN, the passes between by csrc/cpu/linear_logprob.cpp.

fp32 arithmetic, subject to the precision of PyTorch's products (``torch.set_float32_matmul_precision``); bf16 and fp16
are converted block by block. Blocks of the vocabulary are the outer loop, so that a block of weights is read (and
converted) once and its gradient is complete at the end of its iteration.
"""

import torch
from torch import Tensor

from dph_kernels import native, torch_private
from dph_kernels.linear_logprob import empty_results, spans

# Tiles of the R x V logits, within 64 MB of extra memory.
MOST_ROWS, MOST_COLUMNS = 2048, 1024  # at most 8 MiB of logits
MOST_OPERAND = 3 * 2**18  # elements of states, and of weights: 3 MiB
MOST_SUMS = 2**22  # elements of the fp32 sums for a gradient in half precision: 16 MiB

MOST_LOGITS = 13_100_000  # and elements of states, per block of rows with joint gradients: 52 MB
MOST_PACKED = 8192  # columns per product of such a block: MKL's packed copy of their weights grows with them
LEAST_ROWS = 64  # per block that make reading all weights twice worthwhile


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``; a tile is reduced in one pass, each row on one core."""
    logprobs, normaliser, entropy, best = empty_results(hidden, targets, statistics)
    row_blocks, column_blocks, buffer = _tiles(hidden, weight)
    targets = targets.contiguous()
    for columns in column_blocks:
        w = weight[columns].float().contiguous()
        for rows in row_blocks:
            h = hidden[rows].float().contiguous()
            logits = _product(h, w, buffer)
            state, is_last = (targets, normaliser, logprobs, entropy, best), columns.stop == len(weight)
            native.module().linear_logprob_reduce_cpu(logits, rows.start, columns.start, *state, is_last)
            del h, logits  # their memory is reused by the next ones
        del w
    return logprobs, normaliser, entropy, best


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; gradients are summed in fp32 and rounded once.

    If the fp32 sums for a gradient of hidden in half precision exceed MOST_SUMS, that gradient is computed for some
    rows at a time, and the weights' separately: a fifth product instead of memory that grows with R.
    """
    grad_hidden = hidden.new_empty(hidden.shape if hidden_needed else 0)
    grad_weight = weight.new_empty(weight.shape if weight_needed else 0)
    most_rows = max(1, MOST_SUMS // max(1, hidden.shape[1]))
    if hidden_needed and hidden.dtype != torch.float32 and len(hidden) > most_rows:
        for rows in spans(len(hidden), most_rows, 16):
            inputs = grad[rows], hidden[rows], weight, targets[rows], normaliser[:, rows]
            grad_hidden[rows] = backward(*inputs, True, False)[0]
        _, grad_weight = backward(grad, hidden, weight, targets, normaliser, False, weight_needed)
        return grad_hidden, grad_weight
    if not hidden_needed and not weight_needed:
        return grad_hidden, grad_weight

    row_blocks, column_blocks, buffer = _tiles(hidden, weight)
    grad, targets = grad.contiguous(), targets.contiguous()
    hidden_sums = grad_hidden if hidden.dtype == torch.float32 else torch.empty_like(grad_hidden, dtype=torch.float32)
    if not len(hidden):
        grad_weight.zero_()
        column_blocks = []
    for columns in column_blocks:
        w = weight[columns].float().contiguous()
        if weight_needed:
            weight_result = weight_sums = grad_weight[columns]
            if buffer is None:  # column-major: oneDNN computes the transpose, see _add
                weight_sums = w.new_empty(w.shape[::-1]).T
            elif weight.dtype != torch.float32:
                weight_sums = torch.empty_like(weight_result, dtype=torch.float32)
        for rows in row_blocks:
            h = hidden[rows].float().contiguous()
            logits = _product(h, w, buffer)
            state = targets, normaliser, grad
            native.module().linear_logprob_gradient_cpu(logits, rows.start, columns.start, *state)
            grad_logits = logits  # overwritten
            if hidden_needed:
                _add(hidden_sums[rows], grad_logits, w, columns.start == 0, buffer is not None)
            if weight_needed:
                _add(weight_sums, grad_logits.T, h, rows.start == 0, buffer is not None)
            del h, logits, grad_logits  # their memory is reused by the next ones
        if weight_needed and weight_sums is not weight_result:
            weight_result.copy_(weight_sums)
        del w
    if hidden_sums is not grad_hidden:
        grad_hidden.copy_(hidden_sums)
    return grad_hidden, grad_weight


def joint_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether :func:`forward_and_gradients` is faster than two passes.

    It is in fp32, whose sums need no memory besides the gradients, and with PyTorch's own product: oneDNN's packs the
    vocabulary again for each block of rows.
    """
    fp32 = hidden.dtype == weight.dtype == torch.float32
    return fp32 and len(hidden) > 0 and weight.is_contiguous() and mkl_is_faster() and _block(weight) >= LEAST_ROWS


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool, row_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``, and the gradients that the backward pass scales.

    For hidden those of each log-probability, for weight that of their (weighted) sum. Three products, for blocks of
    rows with all of their logits.
    """
    rows = len(hidden)
    logprobs, normaliser, entropy, best = empty_results(hidden, targets, statistics)
    grad_hidden, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    state = targets.contiguous(), normaliser, logprobs, entropy, best
    logits = hidden.new_empty(min(rows, _block(weight)), len(weight))
    factors = hidden.new_empty(len(logits), 1)  # times the kept logits: their gradients
    for large in (logits, grad_weight):
        native.module().prefer_huge_pages(large.data_ptr(), 4 * large.numel())
    for block in spans(rows, len(logits), 16):
        h, x = hidden[block].contiguous(), logits[: block.stop - block.start]
        for columns in spans(len(weight), MOST_PACKED, 16):
            torch.mm(h, weight[columns].T, out=x[:, columns])
        native.module().linear_logprob_keep_cpu(x, block.start, *state, factors)
        factor = factors[: len(h)]
        torch.mm(x, weight, out=grad_hidden[block]).mul_(factor)
        h = h * (factor if row_weights is None else factor * row_weights[block, None])
        torch.mm(x.T, h, out=grad_weight) if block.start == 0 else grad_weight.addmm_(x.T, h)
    return logprobs, normaliser, entropy, best, grad_hidden, grad_weight


def _block(weight: Tensor) -> int:
    """Return the number of rows per block: their logits, and perhaps a copy of their states, are in memory at once."""
    return MOST_LOGITS // sum(weight.shape) // 16 * 16


def mkl_is_faster() -> bool:
    """Whether PyTorch's own fp32 product is no slower than oneDNN's.

    PyTorch calls MKL, which uses no wider vectors than AVX2's on processors that are not Intel's; oneDNN is twice as
    fast on those with AVX-512. On the others both are about equal, and MKL reads transposed factors without a copy.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return True
    avx2 = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return avx2 or native.module().intel


def _tiles(hidden: Tensor, weight: Tensor) -> tuple[list[slice], list[slice], Tensor | None]:
    """Return blocks of rows, blocks of columns (tokens of the vocabulary), and memory for a tile of logits.

    The logits of MKL share this memory, as new ones would fragment memory between MKL's own; None: oneDNN multiplies.
    """
    most = max(16, MOST_OPERAND // max(1, hidden.shape[1]))
    most_rows, most_columns = min(MOST_ROWS, most), min(MOST_COLUMNS, most)
    buffer = None
    if mkl_is_faster():
        size = min(len(hidden), most_rows) * min(len(weight), most_columns)
        buffer = hidden.new_empty(size, dtype=torch.float32)
    return spans(len(hidden), most_rows, 16), spans(len(weight), most_columns, 16), buffer


def _product(a: Tensor, b: Tensor, buffer: Tensor | None) -> Tensor:
    """Return ``a @ b.T`` of ``a`` [m, k] and ``b`` [n, k] in fp32, by MKL in ``buffer`` or by oneDNN."""
    if buffer is not None:
        return torch.mm(a, b.T, out=buffer[: len(a) * len(b)].view(len(a), len(b)))
    if not a.shape[1]:
        return a @ b.T
    return torch_private.linear_pointwise(a, b, None, "none", [], "")  # as PyTorch's compiler calls it


def _add(total: Tensor, a: Tensor, b: Tensor, start: bool, mkl: bool) -> None:
    """Compute ``total += a @ b``, or ``total = a @ b`` if ``start``; oneDNN would copy a transposed ``a``."""
    if mkl:
        torch.mm(a, b, out=total) if start else total.addmm_(a, b)
        return
    if a.stride(1) != 1:
        total, a, b = total.T, b.T, a.T
    result = _product(a, b.T, None)
    total.copy_(result) if start else total.add_(result)
