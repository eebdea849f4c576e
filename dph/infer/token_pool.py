"""Rows of the engine: the keys and values, token and log-probability of each, and the calls of the model on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dph.model.kv_pool import KVPool
from dph_kernels.layout import PackedLayout
from dph_kernels.linear import apply_linear
from dph_kernels.transfer import to_device

if TYPE_CHECKING:
    from dph.model.judging import JudgingModel

# PyTorch's products of matrices, where ours are not there, take another way for fewer rows, with other rounding.
LEAST_ROWS, ROW_MULTIPLE = 16, 8


class TokenPool(KVPool):
    """A pool of rows of one model; a prompt or candidate owns a range of them, a row for each of its tokens.

    Args:
        model: with a backbone of this package.
        rows: of the pool.

    Attributes:
        tokens, logprobs: [rows] of each row; a prompt's tokens have no log-probabilities.
        padding: row of padding tokens.
    """

    def __init__(self, model: JudgingModel, rows: int) -> None:
        super().__init__(rows)
        self._model = model
        self.tokens, self.logprobs = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
        self.padding = self.take(1)

    def copy_ranges(self, sources: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> None:
        """Copy ``counts`` [S] rows from each of ``sources`` [S] to ``targets`` [S], where they differ."""
        counts = np.where(sources == targets, 0, counts)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        if not len(within):
            return
        sources, targets = np.repeat(sources, counts) + within, np.repeat(targets, counts) + within
        self.tokens[targets], self.logprobs[targets] = self.tokens[sources], self.logprobs[sources]
        self.copy(*(to_device(torch.from_numpy(rows), self._model.device) for rows in (sources, targets)))

    def keep_logprobs(
        self, rows: np.ndarray, logits: Tensor, tokens: np.ndarray, after: np.ndarray | None = None
    ) -> None:
        """Store the log-probabilities of ``tokens`` [R] in ``rows`` [R], after rows ``after`` [R] of logits [S, V]."""
        after = np.arange(len(rows)) if after is None else after
        places = (to_device(torch.from_numpy(part), logits.device) for part in (after, tokens))
        logprobs = logits[tuple(places)].cpu().numpy() - logits.logsumexp(1).cpu().numpy()[after]
        self.logprobs[rows] = logprobs

    def forward(
        self, rows: np.ndarray, layout: PackedLayout, tokens: np.ndarray, *, decode: bool, **options: Any
    ) -> Tensor:
        """Read ``tokens`` [T], whose keys and values get ``rows`` [T]; return their hidden states [T, C].

        ``decode``: see :meth:`KVPool.call`; ``options`` of the backbone.
        """
        model = self._model
        memory = self.call(to_device(torch.from_numpy(rows), model.device), decode=decode)
        inputs = to_device(torch.from_numpy(tokens), model.device)
        return model.backbone(inputs, layout.to(model.device), memory, **options)

    def logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        """Return the logits [R, V] fp32 after ``rows`` [R] of hidden states [T, C]."""
        padded = np.concatenate([rows, np.repeat(rows[:1], padded_count(len(rows)) - len(rows))])
        return self.predict(hidden[to_device(torch.from_numpy(padded), hidden.device)])[: len(rows)]

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the logits [T, V] fp32 after hidden states [T, C]."""
        return apply_linear(self._model.lm_head, apply_linear(self._model.output_proj, hidden)).float()


def padded_count(rows: int) -> int:
    """Return the number of rows that a product of matrices gets in place of ``rows``."""
    return max(-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, LEAST_ROWS)
