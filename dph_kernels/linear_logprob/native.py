"""Log-probabilities on the CPU: products by PyTorch or oneDNN, the passes between by csrc/cpu/linear_logprob.cpp.

fp32 arithmetic, subject to the precision of PyTorch's products (``torch.set_float32_matmul_precision``); bf16 and fp16
are converted block by block.
"""

import torch
from torch import Tensor

from dph_kernels import native, torch_private
from dph_kernels.linear_logprob import tiles

MOST_LOGITS = 13_100_000  # and elements of states, per block of rows with joint gradients: 52 MB
LEAST_ROWS = 64  # per block that make reading all weights twice worthwhile


class Engine:
    """Products and passes on the CPU (see :class:`tiles.Engine`), within 64 MB of extra memory."""

    most_rows, most_columns = 2048, 1024  # at most 8 MiB of logits
    most_operand = 3 * 2**18  # 3 MiB of states, and of weights
    most_sums = 2**22  # 16 MiB

    def __init__(self, width: int) -> None:
        """Choose tiles for states of ``width`` elements."""
        most = max(16, self.most_operand // max(1, width))
        self.rows, self.columns = min(self.most_rows, most), min(self.most_columns, most)
        self.logits = torch.empty(0)

    def operand(self, x: Tensor) -> Tensor:
        """Return ``x`` in fp32 and contiguous, copied only if needed."""
        return x.float().contiguous()

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """Reduce a tile of logits in one pass, each row on one core."""
        logits = self._product(hidden, weight)
        tile = _tile(logits, first, targets, normaliser, last=last, **_result_addresses(logprobs, entropy, best))
        native.module().linear_logprob_reduce_cpu(tile, native.threads())

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """Return the gradient of a tile of logits, in the memory of the logits."""
        logits = self._product(hidden, weight)
        tile = _tile(logits, first, targets, normaliser, upstream=upstream.data_ptr())
        native.module().linear_logprob_gradient_cpu(tile, native.threads())
        return logits

    def _product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return logits; those of MKL reuse one buffer, as new ones would fragment memory between MKL's own."""
        if not mkl_is_faster():
            return product(hidden, weight)
        size = len(hidden), len(weight)
        if self.logits.numel() < size[0] * size[1]:
            self.logits = hidden.new_empty(size[0] * size[1])
        return torch.mm(hidden, weight.T, out=self.logits[: size[0] * size[1]].view(size))

    def sums(self, result: Tensor, transposed: bool) -> Tensor:
        """Return memory for fp32 sums, column-major if oneDNN's first factor is transposed: see :meth:`add`."""
        by_columns = transposed and not mkl_is_faster()
        return result.new_empty(result.shape[::-1], dtype=torch.float32).T if by_columns else tiles.fp32_sums(result)

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """Compute ``total`` (+)= ``a @ b``, transposed if oneDNN would copy a transposed ``a``."""
        if mkl_is_faster():
            torch.mm(a, b, out=total) if start else total.addmm_(a, b)
            return
        if a.stride(1) != 1:
            total, a, b = total.T, b.T, a.T
        result = product(a, b.T)
        total.copy_(result) if start else total.add_(result)

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Round the sums into the result."""
        tiles.rounded(sums, result)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    return tiles.forward(Engine(hidden.shape[1]), hidden, weight, targets, statistics)


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
    arguments = grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed
    return tiles.backward(Engine(hidden.shape[1]), *arguments)


def joint_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether :func:`forward_and_gradients` is faster than two passes.

    It is in fp32, whose sums need no memory besides the gradients, and with PyTorch's own product: oneDNN's packs the
    vocabulary again for each block of rows.
    """
    fp32 = hidden.dtype == weight.dtype == torch.float32
    return fp32 and len(hidden) > 0 and weight.is_contiguous() and mkl_is_faster() and _block(weight) >= LEAST_ROWS


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``, and the gradients of the sum of all log-probabilities.

    Blocks of rows with all of their logits: three products.
    """
    rows, upstream = len(hidden), hidden.new_ones(len(hidden))
    logprobs, normaliser, entropy, best = tiles.room(hidden, targets, statistics)
    grad_hidden, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    targets, logits = targets.contiguous(), hidden.new_empty(min(rows, _block(weight)), len(weight))
    for large in (logits, grad_weight):
        native.module().prefer_huge_pages(large.data_ptr(), 4 * large.numel())
    for block in tiles.spans(rows, len(logits), 16):
        h, x = hidden[block].contiguous(), logits[: block.stop - block.start]
        for columns in tiles.spans(len(weight), 2048, 16):  # for all columns at once MKL would allocate a packed copy
            torch.mm(h, weight[columns].T, out=x[:, columns])
        results = _result_addresses(logprobs[block], entropy[block], best[block])
        tile = _tile(x, 0, targets[block], normaliser[:, block], last=True, upstream=upstream.data_ptr(), **results)
        native.module().linear_logprob_both_cpu(tile, native.threads())
        torch.mm(x, weight, out=grad_hidden[block])
        torch.mm(x.T, h, out=grad_weight) if block.start == 0 else grad_weight.addmm_(x.T, h)
    return logprobs, normaliser, entropy, best, grad_hidden, grad_weight


def _block(weight: Tensor) -> int:
    """Return the number of rows per block: their logits, and perhaps a copy of their states, are in memory at once."""
    return MOST_LOGITS // sum(weight.shape) // 16 * 16


def mkl_is_faster() -> bool:
    """Whether PyTorch's own fp32 product is no slower than oneDNN's.

    PyTorch calls MKL, which uses half of the vector width of processors that are not Intel's; oneDNN uses all of it and
    is twice as fast there. On Intel's both are about equal, and MKL reads transposed factors without a copy.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return native.module().intel or not onednn


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T`` of ``a`` [m, k] and ``b`` [n, k] in fp32."""
    if mkl_is_faster() or not a.shape[1]:
        return a @ b.T
    return torch_private.linear_pointwise(a, b, None, "none", [], "")  # as PyTorch's compiler calls it


def _result_addresses(logprobs: Tensor, entropy: Tensor, best: Tensor) -> dict[str, int]:
    """Return the addresses of a reduction's results; the last two are empty without statistics."""
    addresses = {"logprobs": logprobs.data_ptr()}
    return addresses | {"entropy": entropy.data_ptr(), "best": best.data_ptr()} if len(entropy) else addresses


def _tile(logits: Tensor, first: int, targets: Tensor, normaliser: Tensor, **fields: int) -> object:
    """Return the kernels' argument, which holds addresses: the tensors have to outlive it."""
    return native.module().LogprobTile(
        logits=logits.data_ptr(),
        rows=logits.shape[0],
        columns=logits.shape[1],
        stride=logits.stride(0),
        first=first,
        targets=targets.data_ptr(),
        largest=normaliser[0].data_ptr(),
        log_sum=normaliser[1].data_ptr(),
        **fields,
    )
