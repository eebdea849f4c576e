"""Dense batches [B, S], and the packed rows [T] that the backbone takes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dph.losses import IGNORED
from dph_kernels import checks, dispatch
from dph_kernels.layout import first_true


def check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Name a token that the vocabulary lacks, on the CPU, where nobody records or transforms the call."""
    checks.dtype(name, tokens, checks.INTEGERS)
    if not dispatch.observed((tokens,)):
        checks.indices(name, tokens, vocabulary, "tokens")


def check_labels(labels: Tensor, inputs: Tensor, vocabulary: int) -> None:
    """Labels [B, S] as the inputs' [B, S, ..]; those that are targets are to be in the vocabulary (on the CPU)."""
    checks.shape("labels", labels, *inputs.shape[:2])
    checks.dtype("labels", labels, torch.int64)
    if labels.device.type == "cpu":  # a copy that a GPU need not make
        targets = labels[:, 1:]
        check_tokens("labels", targets.masked_fill(targets == IGNORED, 0), vocabulary)


def chosen_inputs(embedding: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
    """Tokens [B, S], or embeddings [B, S, E], whichever is given, such as an embedding [V, E] knows."""
    vocabulary, width = embedding.shape
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"input_ids, inputs_embeds: expected one, got {'none' if input_ids is None else 'both'}")
    if inputs_embeds is not None:
        checks.shape("inputs_embeds", inputs_embeds, "B", "S", width)
        checks.dtype("inputs_embeds", inputs_embeds, checks.FLOATS)
        return inputs_embeds
    checks.shape("input_ids", input_ids, "B", "S")
    check_tokens("input_ids", input_ids, vocabulary)
    return input_ids


def last_positions(input_ids: Tensor, mask: Tensor | None, end: int | None) -> Tensor:
    """Columns [B] of the last tokens that are no padding, each of which has to be ``<|im_end|>``."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    last = (columns if mask is None else columns.masked_fill(~mask, -1)).amax(1)
    tokens = input_ids.gather(1, last.clamp(min=0)[:, None]).flatten()
    if end is None:
        raise ValueError("reward_positions: expected positions, since config.im_end_token_id is not set")
    wrong = ((tokens != end) | (last < 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"input_ids: expected <|im_end|> (id {end}) as the last token that is not padding, got another in rows "
            f"{wrong[:8]}: the answer was cut off, or give reward_positions"
        )
    return last


@dataclass(frozen=True)
class Dense:
    """Which places of a dense batch hold tokens, and which of those make a document.

    Attributes:
        shape: (B, S).
        device: where the inputs are.
        mask: [B, S] bool, False for padding; None where there is none.
        counts: [B] tokens of each row.
        documents: tokens of each document, row after row.
    """

    shape: tuple[int, int]
    device: torch.device
    mask: Tensor | None
    counts: list[int]
    documents: list[int]

    @classmethod
    def of(cls, inputs: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Dense:
        """Tokens or embeddings [B, S, ..] under an attention mask [B, S'] and positions [B or 1, S].

        The last S columns of the mask count. Without positions a row is one document.
        """
        batch, length = shape = tuple(inputs.shape[:2])
        counts = [length] * batch
        if mask is not None:
            checks.tensor("attention_mask", mask)
            if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
                raise ValueError(f"attention_mask: expected shape [{batch}, {length}] or wider, got {list(mask.shape)}")
            mask = mask[:, mask.shape[1] - length :]
            tokens = mask.bool()
            counts, ones = torch.stack([tokens.sum(1), (mask == 1).sum(1)]).tolist()
            if counts != ones:  # what is added to scores, or numbers of documents
                raise ValueError("attention_mask: expected 1 for tokens and 0 for padding, got other values too")
            mask = None if sum(counts) == batch * length else tokens
        dense = cls(shape, inputs.device, mask, counts, counts)
        return dense if position_ids is None else replace(dense, documents=dense._documents(position_ids))

    @torch.compiler.disable  # NumPy in it is not for PyTorch's compiler
    def _documents(self, positions: Tensor) -> list[int]:
        """Tokens of each document: positions go up by one in it, and begin with 0 where another precedes it."""
        checks.tensor("position_ids", positions)
        checks.dtype("position_ids", positions, checks.INTEGERS)
        if positions.ndim != 2 or positions.shape[1] != self.shape[1] or positions.shape[0] not in (1, self.shape[0]):
            raise ValueError(f"position_ids: expected shape {list(self.shape)}, got {list(positions.shape)}")
        places = self.rows(positions.expand(self.shape)).cpu().numpy()
        begins = places == 0
        begins[[end - count for end, count in zip(np.cumsum(self.counts), self.counts, strict=True) if count]] = True
        for i in first_true(~begins[1:] & (places[1:] != places[:-1] + 1)):
            raise ValueError(
                f"position_ids: expected each to be its predecessor's plus 1, or 0 where a document begins, got "
                f"{places[i + 1]} after {places[i]}"
            )
        return np.diff(np.flatnonzero(begins), append=len(places)).tolist()

    def check_one_document(self) -> None:
        """ValueError where a row holds several: what a memory has seen belongs to one."""
        rows, documents = ([count for count in counts if count] for counts in (self.counts, self.documents))
        if rows != documents:
            raise ValueError(
                f"position_ids: expected one document in each row where there is a memory, got {len(documents)} in "
                f"{len(rows)} rows"
            )

    def token_columns(self, name: str, given: Tensor | Sequence[int]) -> Tensor:
        """Columns [B] int64, one of a token in each row."""
        batch, length = self.shape
        columns = torch.as_tensor(given, device=self.device)
        if columns.dtype not in checks.INTEGERS:
            raise ValueError(f"{name}: expected int64, got {str(columns.dtype).removeprefix('torch.')}")
        columns = columns.long()
        if columns.shape != (batch,) or bool(((columns < 0) | (columns >= length)).any()):
            raise ValueError(f"{name}: expected {batch} columns in [0, {length}), got {columns.tolist()}")
        if self.mask is not None and not bool(self.mask.gather(1, columns[:, None]).all()):
            raise ValueError(f"{name}: expected tokens that are not padding")
        return columns

    def rows(self, grid: Tensor) -> Tensor:
        """What [B, S, ..] holds for the tokens, [T, ..]."""
        return grid.flatten(0, 1) if self.mask is None else grid[self.mask]

    def spread(self, rows: Tensor) -> Tensor:
        """Rows [T, X] back to their places [B, S, X], zeros in the padding."""
        if self.mask is None:
            return rows.view(*self.shape, rows.shape[1])
        return rows.new_zeros(*self.shape, rows.shape[1]).masked_scatter(self.mask[..., None], rows)
