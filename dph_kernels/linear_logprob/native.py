"""Log-probabilities on the CPU: products by oneDNN through PyTorch, the passes between by csrc/cpu/linear_logprob.cpp.

fp32 arithmetic throughout, as far as PyTorch's products have it (``torch.set_float32_matmul_precision``); bf16 and fp16
are converted block by block.
"""

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.linear_logprob import tiles


class Engine:
    """Sizes for a bound of 64 MB on extra memory, products and passes (see :class:`tiles.Engine`)."""

    most_rows, most_columns = 2048, 1024  # at most 8 MiB of logits
    most_operand = 3 * 2**18  # 3 MiB of states, and of weights
    most_sums = 2**22  # 16 MiB

    def __init__(self, width: int) -> None:
        """Choose tiles for states of ``width`` elements."""
        most = max(16, self.most_operand // max(1, width))
        self.rows, self.columns = min(self.most_rows, most), min(self.most_columns, most)

    def operand(self, x: Tensor) -> Tensor:
        """``x`` in fp32, contiguous; nothing is copied where it is."""
        return x.float().contiguous()

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One pass over the logits, each row by one core."""
        logits = product(hidden, weight)
        results = {"logprobs": logprobs.data_ptr()}
        if len(entropy):
            results |= {"entropy": entropy.data_ptr(), "best": best.data_ptr()}
        tile = _tile(logits, first, targets, normaliser, last=last, **results)
        native.module().linear_logprob_reduce_cpu(tile, native.threads())

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """The logits, overwritten."""
        logits = product(hidden, weight)
        tile = _tile(logits, first, targets, normaliser, upstream=upstream.data_ptr())
        native.module().linear_logprob_gradient_cpu(tile, native.threads())
        return logits

    def sums(self, result: Tensor, transposed: bool) -> Tensor:
        """Column by column where a first factor is transposed: see :meth:`add`."""
        return result.new_empty(result.shape[::-1], dtype=torch.float32).T if transposed else tiles.fp32_sums(result)

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """``total`` (+)= ``a @ b``, as ``total.T`` (+)= ``b.T @ a.T`` where PyTorch would copy a transposed ``a``."""
        if a.stride(1) != 1:
            total, a, b = total.T, b.T, a.T
        result = product(a, b.T)
        total.copy_(result) if start else total.add_(result)

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Rounded, and no more."""
        tiles.rounded(sums, result)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
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
    """What ``reference.backward`` gives."""
    arguments = grad, hidden, weight, targets, normaliser, hidden_needed, weight_needed
    return tiles.backward(Engine(hidden.shape[1]), *arguments)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [m, k] times ``b`` [n, k] transposed, fp32.

    PyTorch's own fp32 product is MKL's, which leaves processors that are not Intel's at half of their vector width;
    oneDNN's uses all of it: 400 against 180 GFLOP/s on two Zen 5 cores. PyTorch's compiler calls it in the same way.
    """
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and a.shape[1]:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def _tile(logits: Tensor, first: int, targets: Tensor, normaliser: Tensor, **fields: int) -> object:
    """The kernels' argument; it holds addresses, so the tensors have to outlive it."""
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
