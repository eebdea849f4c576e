"""Loops of the Triton launcher over tiles of the R x V logits, which an engine multiplies and reduces.

Blocks of the vocabulary are the outer loop, so that a block of weights is read (and converted) once and its gradient is
complete at the end of its iteration; with nearly square tiles the sums of both gradients seldom pass through memory.
"""

from typing import Protocol

import torch
from torch import Tensor

from dph_kernels.linear_logprob import empty_results, spans


class Engine(Protocol):
    """Tile sizes, products, and the passes over a tile of logits: single precision, and half precision.

    Attributes:
        rows: rows of a tile, at most.
        columns: columns of a tile (tokens of the vocabulary), at most.
        most_sums: elements of the fp32 sums for a gradient in half precision, at most.
    """

    rows: int
    columns: int
    most_sums: int

    def operand(self, x: Tensor) -> Tensor:
        """Return ``x`` in the layout of the products."""

    def reduce(
        self, hidden: Tensor, weight: Tensor, first: int, last: bool, targets: Tensor,
        normaliser: Tensor, logprobs: Tensor, entropy: Tensor, best: Tensor,
    ) -> None:  # fmt: skip
        """Add the tile ``hidden @ weight.T`` to its rows' results, and finish them if ``last``.

        Columns begin at token ``first``; tiles come in order. Until the last one, ``normaliser[1]`` holds
        sum exp(x - m), ``logprobs`` the target's logit, and ``entropy`` sum exp(x - m) (x - m). Without statistics
        ``entropy`` and ``best`` are empty.
        """

    def gradient(
        self, hidden: Tensor, weight: Tensor, first: int, upstream: Tensor, targets: Tensor, normaliser: Tensor
    ) -> Tensor:
        """Return upstream * (onehot(target) - softmax) of a tile, an operand; valid until the next call."""

    def add(self, total: Tensor, a: Tensor, b: Tensor, start: bool) -> None:
        """Compute ``total += a @ b``, or ``total = a @ b`` if ``start``."""

    def finish(self, sums: Tensor, result: Tensor) -> None:
        """Round a gradient's sums into its result; both may be the same tensor."""


def forward(
    engine: Engine, hidden: Tensor, weight: Tensor, targets: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    rows, vocabulary = len(hidden), len(weight)
    logprobs, normaliser, entropy, best = empty_results(hidden, targets, statistics)
    targets = targets.contiguous()
    for columns in spans(vocabulary, engine.columns, 16):
        w = engine.operand(weight[columns])
        for part in spans(rows, engine.rows, 16):
            h = engine.operand(hidden[part])
            results = targets[part], normaliser[:, part], logprobs[part], entropy[part], best[part]
            engine.reduce(h, w, columns.start, columns.stop == vocabulary, *results)
            del h  # its memory is reused by the next one
        del w
    return logprobs, normaliser, entropy, best


def backward(
    engine: Engine,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    hidden_needed: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Same results as ``reference.backward``; gradients are summed in fp32 and rounded once.

    If the fp32 sums for a gradient of hidden in half precision exceed ``most_sums``, that gradient is computed for some
    rows at a time, and the weights' separately: a fifth product instead of memory that grows with R.
    """
    grad, targets = grad.contiguous(), targets.contiguous()
    grad_hidden = hidden.new_empty(hidden.shape if hidden_needed else 0)
    grad_weight = weight.new_empty(weight.shape if weight_needed else 0)
    most = max(1, engine.most_sums // max(1, hidden.shape[1]))
    if hidden_needed and hidden.dtype != torch.float32 and len(hidden) > most:
        for part in spans(len(hidden), most, 16):
            rows = grad[part], hidden[part], weight, targets[part], normaliser[:, part]
            _joint(engine, *rows, grad_hidden[part], None)
        hidden_needed = False
    if hidden_needed or weight_needed:
        outputs = grad_hidden if hidden_needed else None, grad_weight if weight_needed else None
        _joint(engine, grad, hidden, weight, targets, normaliser, *outputs)
    return grad_hidden, grad_weight


def _joint(
    engine: Engine,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Compute the gradients that are not None, with each tile of logits computed once."""
    if not len(hidden) and grad_weight is not None:
        grad_weight.zero_()
    hidden_sums = None if grad_hidden is None else fp32_sums(grad_hidden)
    for columns in spans(len(weight), engine.columns, 16):
        w = engine.operand(weight[columns])
        weight_sums = None if grad_weight is None else fp32_sums(grad_weight[columns])
        for part in spans(len(hidden), engine.rows, 16):
            h = engine.operand(hidden[part])
            change = engine.gradient(h, w, columns.start, grad[part], targets[part], normaliser[:, part])
            if hidden_sums is not None:
                engine.add(hidden_sums[part], change, w, columns.start == 0)
            if weight_sums is not None:
                engine.add(weight_sums, change.T, h, part.start == 0)
            del h, change  # their memory is reused by the next ones
        if weight_sums is not None and len(hidden):
            engine.finish(weight_sums, grad_weight[columns])
        del w, weight_sums
    if hidden_sums is not None:
        engine.finish(hidden_sums, grad_hidden)


def fp32_sums(result: Tensor) -> Tensor:
    """Return the result itself if it is fp32, else new memory."""
    return result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)


def rounded(sums: Tensor, result: Tensor) -> None:
    """Round sums into their result, if that is another tensor."""
    if sums is not result:
        result.copy_(sums)
