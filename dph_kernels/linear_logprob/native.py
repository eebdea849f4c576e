"""Log-probabilities on the CPU: products by PyTorch or oneDNN, the passes between by csrc/cpu/linear_logprob.cpp.

fp32 arithmetic throughout, as far as PyTorch's products have it (``torch.set_float32_matmul_precision``); bf16 and fp16
are converted block by block.
"""

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.linear_logprob import tiles

MOST_LOGITS = 13_100_000  # and elements of states, of rows whose gradients are computed along: 52 MB
LEAST_ROWS = 64  # for which it is worth to read all weights twice


class Engine:
    """Sizes for a bound of 64 MB on extra memory, products and passes (see :class:`tiles.Engine`)."""

    most_rows, most_columns = 2048, 1024  # at most 8 MiB of logits
    most_operand = 3 * 2**18  # 3 MiB of states, and of weights
    most_sums = 2**22  # 16 MiB

    def __init__(self, width: int) -> None:
        """Choose tiles for states of ``width`` elements."""
        most = max(16, self.most_operand // max(1, width))
        self.rows, self.columns = min(self.most_rows, most), min(self.most_columns, most)
        self.logits = torch.empty(0)

    def operand(self, x: Tensor) -> Tensor:
        """``x`` in fp32, contiguous; nothing is copied where it is."""
        return x.float().contiguous()

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """One pass over the logits, each row by one core."""
        logits = self._product(hidden, weight)
        tile = _tile(logits, first, targets, normaliser, last=last, **_places(logprobs, entropy, best))
        native.module().linear_logprob_reduce_cpu(tile, native.threads())

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """The logits, overwritten."""
        logits = self._product(hidden, weight)
        tile = _tile(logits, first, targets, normaliser, upstream=upstream.data_ptr())
        native.module().linear_logprob_gradient_cpu(tile, native.threads())
        return logits

    def _product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits; MKL's lie where the last ones did, or the allocator would leave holes between its buffers."""
        if not mkl_is_faster():
            return product(hidden, weight)
        size = len(hidden), len(weight)
        if self.logits.numel() < size[0] * size[1]:
            self.logits = hidden.new_empty(size[0] * size[1])
        return torch.mm(hidden, weight.T, out=self.logits[: size[0] * size[1]].view(size))

    def sums(self, result: Tensor, transposed: bool) -> Tensor:
        """Column by column where oneDNN's first factor is transposed: see :meth:`add`."""
        by_columns = transposed and not mkl_is_faster()
        return result.new_empty(result.shape[::-1], dtype=torch.float32).T if by_columns else tiles.fp32_sums(result)

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """``total`` (+)= ``a @ b``, as ``total.T`` (+)= ``b.T @ a.T`` where oneDNN would copy a transposed ``a``."""
        if mkl_is_faster():
            torch.mm(a, b, out=total) if start else total.addmm_(a, b)
            return
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


def joint_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether :func:`forward_and_gradients` is for these.

    It is in fp32, where sums lie in the gradients themselves, and where PyTorch's own product is the one to take:
    oneDNN's packs the vocabulary anew for every few rows.
    """
    fp32 = hidden.dtype == weight.dtype == torch.float32
    return fp32 and len(hidden) > 0 and weight.is_contiguous() and mkl_is_faster() and _block(weight) >= LEAST_ROWS


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives, and the gradients of the sum of all log-probabilities.

    Some rows at a time, with all of their logits: three products.
    """
    rows, upstream = len(hidden), hidden.new_ones(len(hidden))
    logprobs, normaliser, entropy, best = tiles.room(hidden, targets, statistics)
    grad_hidden, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, weight))
    targets, logits = targets.contiguous(), hidden.new_empty(min(rows, _block(weight)), len(weight))
    for large in (logits, grad_weight):
        native.module().prefer_huge_pages(large.data_ptr(), 4 * large.numel())
    for part in tiles.spans(rows, len(logits), 16):
        h, x = hidden[part].contiguous(), logits[: part.stop - part.start]
        for columns in tiles.spans(len(weight), 2048, 16):  # of all at once MKL would hold a copy, in its own order
            torch.mm(h, weight[columns].T, out=x[:, columns])
        places = _places(logprobs[part], entropy[part], best[part])
        tile = _tile(x, 0, targets[part], normaliser[:, part], last=True, upstream=upstream.data_ptr(), **places)
        native.module().linear_logprob_both_cpu(tile, native.threads())
        torch.mm(x, weight, out=grad_hidden[part])
        torch.mm(x.T, h, out=grad_weight) if part.start == 0 else grad_weight.addmm_(x.T, h)
    return logprobs, normaliser, entropy, best, grad_hidden, grad_weight


def _block(weight: Tensor) -> int:
    """Rows whose logits, and perhaps a copy of whose states, lie in memory at once."""
    return MOST_LOGITS // sum(weight.shape) // 16 * 16


def mkl_is_faster() -> bool:
    """Whether PyTorch's own fp32 product is no slower than oneDNN's.

    It is MKL's, which leaves processors that are not Intel's at half of their vector width, where oneDNN uses all of
    it: 180 against 400 GFLOP/s on two Zen 5 cores. On Intel's they are about equal, and MKL takes factors as they lie:
    transposed 240 for 145 on two cores of a Xeon.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return native.module().intel or not onednn


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a`` [m, k] times ``b`` [n, k] transposed, fp32."""
    if mkl_is_faster() or not a.shape[1]:
        return a @ b.T
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # as PyTorch's compiler calls it


def _places(logprobs: Tensor, entropy: Tensor, best: Tensor) -> dict[str, int]:
    """Where a reduction's results go; the last two are empty without statistics."""
    places = {"logprobs": logprobs.data_ptr()}
    return places | {"entropy": entropy.data_ptr(), "best": best.data_ptr()} if len(entropy) else places


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
