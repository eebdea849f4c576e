"""Padded batches [B, S] and their packed rows [T], which the backbone computes; checks of the arguments of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dph.losses import IGNORED
from dph_kernels import checks, dispatch
from dph_kernels.layout import PackedLayout, first_true

HOST = "the layout of a batch is computed on the host, from its numbers of tokens"


def check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a token outside of the vocabulary; only on the CPU, and not under tracing or transforms."""
    checks.dtype(name, tokens, checks.INTEGERS)
    if not dispatch.needs_dispatcher((tokens,)):
        checks.indices(name, tokens, vocabulary, "tokens")


def check_labels(labels: Tensor, inputs: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless labels are [B, S] as the inputs [B, S, ..] and (on the CPU) targets in the vocabulary."""
    checks.shape("labels", labels, *inputs.shape[:2])
    checks.dtype("labels", labels, torch.int64)
    if labels.device.type == "cpu":  # saves a GPU the copy
        targets = labels[:, 1:]
        check_tokens("labels", targets.masked_fill(targets == IGNORED, 0), vocabulary)


def checked_inputs(embedding: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
    """Return tokens [B, S] or embeddings [B, S, E], checked against the embedding [V, E]; exactly one is expected."""
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


def document_positions(bounds: Tensor, inputs: Tensor) -> Tensor:
    """Return the positions [1, S] of the tokens of a single row, from the bounds [D + 1] of its documents."""
    checks.shape("cu_seq_lens_q", bounds, "D + 1")
    checks.dtype("cu_seq_lens_q", bounds, checks.INTEGERS)
    ends, columns = bounds.tolist(), inputs.shape[1]
    if len(inputs) != 1 or ends[0] != 0 or ends[-1] != columns or ends != sorted(ends):
        raise ValueError(
            f"cu_seq_lens_q: expected rising bounds from 0 to {columns} of documents in 1 row, got {ends[:8]} for "
            f"{len(inputs)} rows"
        )
    lengths = bounds.diff().long()
    starts = bounds[:-1].long().repeat_interleave(lengths)
    return (torch.arange(columns, device=bounds.device) - starts)[None]


def last_positions(inputs: Tensor, mask: Tensor | None, end: int | None, behind: int = 0) -> Tensor:
    """Return the columns [B] of the last tokens that are not padding, each of which has to be the end-of-turn token.

    Args:
        inputs: tokens [B, S]; of embeddings [B, S, E] no token is known, and any is taken.
        mask: [B, S], False for padding.
        end: id of the end-of-turn token.
        behind: number of tokens allowed behind it, in place of those of the chat format, such as a newline.

    Raises ValueError if a row ends otherwise, or its end cannot be known.
    """
    columns = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
    if mask is not None:
        columns = columns.masked_fill(~mask, -1)
    last = columns.amax(1) if columns.shape[1] else columns.new_full(columns.shape[:1], -1)
    if inputs.is_floating_point():
        is_end = last >= 0
    elif end is None:
        raise ValueError(
            "reward_positions: expected positions, since config.im_end_token_id is not set "
            "(dph.chat.end_of_turn(tokenizer) gives it)"
        )
    else:
        is_end = _is_token(inputs, last, end)
        column = last
        for _ in range(min(behind, columns.shape[1])):
            column = columns.masked_fill(columns >= column[:, None], -1).amax(1)
            takes_previous = ~is_end & _is_token(inputs, column, end)
            last, is_end = torch.where(takes_previous, column, last), is_end | takes_previous
    wrong = (~is_end).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"input_ids: expected the end-of-turn token (id {end}) as the last token that is not padding, got another "
            f"in rows {wrong[:8]}: the answer was cut off, or give reward_positions"
        )
    return last


def _is_token(tokens: Tensor, columns: Tensor, token: int) -> Tensor:
    """Whether the token in each row's column [B], if that is one, is ``token``."""
    if not tokens.shape[1]:
        return columns >= 0
    return (tokens.gather(1, columns.clamp(min=0)[:, None]).flatten() == token) & (columns >= 0)


@dataclass(frozen=True)
class PaddedBatch:
    """The padding mask of a batch, and its documents.

    Attributes:
        shape: (B, S).
        device: of the inputs.
        mask: [B, S] bool, False for padding; None without padding.
        counts: [B] tokens of each row.
        documents: tokens of each document, row after row.
    """

    shape: tuple[int, int]
    device: torch.device
    mask: Tensor | None
    counts: list[int]
    documents: list[int]

    @classmethod
    def from_inputs(cls, inputs: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> PaddedBatch:
        """Tokens or embeddings [B, S, ..] with an attention mask [B, S'] and positions [B or 1, S].

        The last S columns of the mask count. Without positions each row is one document.
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
            if counts != ones:  # an additive mask, or document numbers
                raise ValueError("attention_mask: expected 1 for tokens and 0 for padding, got other values too")
            mask = None if sum(counts) == batch * length else tokens
        padded = cls(shape, inputs.device, mask, counts, counts)
        return padded if position_ids is None else replace(padded, documents=padded._documents(position_ids))

    @torch.compiler.disable  # uses NumPy
    def _documents(self, position_ids: Tensor) -> list[int]:
        """Tokens of each document: positions increase by one within it, and start at 0 after another document."""
        checks.tensor("position_ids", position_ids)
        checks.dtype("position_ids", position_ids, checks.INTEGERS)
        shape = position_ids.shape
        if len(shape) != 2 or shape[1] != self.shape[1] or shape[0] not in (1, self.shape[0]):
            raise ValueError(f"position_ids: expected shape {list(self.shape)}, got {list(shape)}")
        positions = self.rows(position_ids.expand(self.shape)).cpu().numpy()
        starts = positions == 0
        counts = np.array(self.counts, dtype=np.int64)
        starts[(counts.cumsum() - counts)[counts > 0]] = True
        for i in first_true(~starts[1:] & (positions[1:] != positions[:-1] + 1)):
            raise ValueError(
                f"position_ids: expected each to be its predecessor's plus 1, or 0 at the start of a document, got "
                f"{positions[i + 1]} after {positions[i]}"
            )
        return np.diff(np.flatnonzero(starts), append=len(positions)).tolist()

    def layout(self) -> PackedLayout:
        """Return the layout of the documents, on the inputs' device."""
        if torch.compiler.is_exporting():
            raise ValueError(
                f"torch.export: expected to export dph.Model.backbone with a layout, got padded tokens: {HOST}"
            )
        return self._layout()

    @torch.compiler.disable(reason=HOST)
    def _layout(self) -> PackedLayout:
        return PackedLayout.documents(self.documents).to(self.device)

    def check_one_document(self) -> None:
        """Raise ValueError if a row holds several documents: the streams of a memory are one document each."""
        rows = list(filter(None, self.counts))
        documents = list(filter(None, self.documents))
        if rows != documents:
            raise ValueError(
                f"position_ids: expected one document in each row with a memory, got {len(documents)} in "
                f"{len(rows)} rows"
            )

    def token_columns(self, name: str, values: Tensor | Sequence[int]) -> Tensor:
        """Return columns [B] int64, checked to be those of a token in each row."""
        batch, length = self.shape
        columns = torch.as_tensor(values, device=self.device)
        if columns.dtype not in checks.INTEGERS:
            raise ValueError(f"{name}: expected int64, got {str(columns.dtype).removeprefix('torch.')}")
        columns = columns.long()
        if columns.shape != (batch,) or bool(((columns < 0) | (columns >= length)).any()):
            raise ValueError(f"{name}: expected {batch} columns in [0, {length}), got {columns.tolist()}")
        if self.mask is not None and not bool(self.mask.gather(1, columns[:, None]).all()):
            raise ValueError(f"{name}: expected tokens that are not padding")
        return columns

    def rows(self, grid: Tensor) -> Tensor:
        """[B, S, ..] -> [T, ..], without the padding."""
        return grid.flatten(0, 1) if self.mask is None else grid[self.mask]

    def scatter(self, rows: Tensor) -> Tensor:
        """[T, X] -> [B, S, X], with zeros in the padding: the inverse of ``rows``."""
        if self.mask is None:
            return rows.view(*self.shape, rows.shape[1])
        return rows.new_zeros(*self.shape, rows.shape[1]).masked_scatter(self.mask[..., None], rows)

    def select(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[T, X] -> [B, X], the rows of one column [B] of each sequence."""
        return self.scatter(rows)[torch.arange(self.shape[0], device=rows.device), columns]
