"""Batches of preference pairs, and the packing of documents into a PackedBatch.

A packed batch has tokens end to end, common prefixes once, and the rows of each answer.
"""

from __future__ import annotations

import bisect
import dataclasses
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dph.data.labels import EncodedAnswers
from dph.errors import UserError
from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix
from dph_kernels.transfer import all_to_device

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.formats import Record
    from dph.data.sampler import Sampler


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A layout, its tokens, and the rows and targets of each of A answers.

    Attributes:
        tokens: [T] int64, documents end to end, each its common prefix followed by its branches.
        layout: visibility of keys to queries.
        rows: [R] int64, the rows of hidden state that predict a target, answer after answer.
        targets: [R] int64 tokens that they predict.
        answers: [R] int64, the answer of each row, ascending.
        trained: [R] bool, counts in the answer's summed log-probability (``loss_mask``).
        scored: [R] bool, counts in the answer's mean log-probability (``score_mask``).
        reward_rows: [A] int64, row of the end-of-turn token, whose hidden state gives the reward; -1 for a cut-off
            answer.
        documents: [A] int64, the document of each answer.
    """

    tokens: Tensor
    layout: PackedLayout
    rows: Tensor
    targets: Tensor
    answers: Tensor
    trained: Tensor
    scored: Tensor
    reward_rows: Tensor
    documents: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same batch on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        names, tensors = [], []
        for field in dataclasses.fields(self):
            if field.name != "layout":
                names.append(field.name)
                tensors.append(getattr(self, field.name))
        *moved, queries, keys = all_to_device(
            [*tensors, self.layout.query_positions, self.layout.key_positions], device
        )
        return PackedBatch(layout=self.layout.placed(queries, keys), **dict(zip(names, moved, strict=True)))


def pack(documents: Sequence[Sequence[Encoded]]) -> PackedBatch:
    """Concatenate documents; the alternatives of each share their longest common prefix.

    Args:
        documents: each inner list holds alternatives (``dph.chat.encode``): two for a preference pair, the choices of a
            question, the candidates of a prompt, or one.

    Raises ValueError for a document without alternatives, and for an alternative without tokens, with lists of
    different lengths, or with a reward position outside of them.
    """
    # The answers' lists end to end, and how each document divides into its prefix and branches.
    tokens, targets, loss_mask, score_mask = [], [], bytearray(), bytearray()
    lengths, reward_positions, alternative_counts, prefixes, branches = [], [], [], [], []
    for d, alternatives in enumerate(documents):
        sequences = [answer.tokens for answer in alternatives]
        if not sequences or not all(sequences):
            raise ValueError(f"documents[{d}]: expected alternatives of at least one token each, got {alternatives!r}")
        for answer in alternatives:
            length, position = len(answer.tokens), answer.reward_position
            if not length == len(answer.targets) == len(answer.loss_mask) == len(answer.score_mask):
                got = f"{length}, {len(answer.targets)}, {len(answer.loss_mask)} and {len(answer.score_mask)}"
                raise ValueError(f"documents[{d}]: expected tokens, targets and two masks of one length, got {got}")
            if position is not None and not 0 <= position < length:
                raise ValueError(f"documents[{d}]: expected 0 <= reward_position < {length}, got {position}")
            tokens += answer.tokens
            targets += answer.targets
            loss_mask += bytes(answer.loss_mask)
            score_mask += bytes(answer.score_mask)
            lengths.append(length)
            reward_positions.append(-1 if position is None else position)
        prefix = common_prefix(sequences)
        prefixes.append(prefix)
        branches.append([len(sequence) - prefix for sequence in sequences])
        alternative_counts.append(len(sequences))
    layout = PackedLayout.shared_prefix(prefixes, branches)

    # Row of every token of every answer: first in the prefix of its document, then in its own segment. In the layout's
    # table the segment of a prefix is followed by those of its branches.
    counts = _int64(alternative_counts)
    prefix_segments = (counts + 1).cumsum() - (counts + 1)
    own_start, own_end, _, _, prefix_start, prefix_end, _ = np.delete(
        layout.segments.numpy(), prefix_segments, axis=0
    ).T
    starts = np.stack([prefix_start, own_start], 1).ravel()
    spans = np.stack([prefix_end - prefix_start, own_end - own_start], 1).ravel()
    rows = np.arange(spans.sum()) + np.repeat(starts - (spans.cumsum() - spans), spans)

    packed_tokens = np.empty(layout.queries, dtype=np.int64)
    packed_tokens[rows] = _int64(tokens)
    trained = np.frombuffer(loss_mask, dtype=np.uint8) != 0
    scored = np.frombuffer(score_mask, dtype=np.uint8) != 0
    counted = np.flatnonzero(trained | scored)
    sizes, positions = _int64(lengths), _int64(reward_positions)
    reward_rows = np.where(positions < 0, -1, rows[sizes.cumsum() - sizes + positions])
    return PackedBatch(
        layout=layout,
        tokens=torch.from_numpy(packed_tokens),
        rows=torch.from_numpy(rows[counted]),
        targets=torch.from_numpy(_int64(targets)[counted]),
        answers=torch.from_numpy(np.repeat(np.arange(len(lengths)), sizes)[counted]),
        trained=torch.from_numpy(trained[counted]),
        scored=torch.from_numpy(scored[counted]),
        reward_rows=torch.from_numpy(reward_rows),
        documents=torch.from_numpy(np.repeat(np.arange(len(documents)), counts)),
    )


def _int64(values: list[int]) -> np.ndarray:
    """Return an array of ``values``; ``struct`` takes a third of the time that NumPy takes."""
    array = np.empty(len(values), dtype=np.int64)
    struct.pack_into(f"{len(values)}q", array, 0, *values)
    return array


def packed_length(alternatives: Sequence[Encoded]) -> int:
    """Return the number of tokens of a document, with its common prefix counted once."""
    sequences, total = [], 0
    for answer in alternatives:
        sequences.append(answer.tokens)
        total += len(answer.tokens)
    return total - (len(sequences) - 1) * common_prefix(sequences)


def fill(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Distribute the indices of ``sizes`` over bins of at most ``room``: best-fit decreasing.

    Bins and the indices in them ascend; the same sizes give the same bins. ValueError for a size above ``room``.
    """
    if sizes and max(sizes) > room:
        raise ValueError(f"sizes: expected at most {room} each, got {max(sizes)}")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left in each bin and the bin's number, ascending
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # equal sizes in their order
        fitting = bisect.bisect_left(rooms, (sizes[index], -1))
        left, number = rooms.pop(fitting) if fitting < len(rooms) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        bisect.insort(rooms, (left - sizes[index], number))
    return sorted(sorted(indices) for indices in bins)


def batches(documents: Iterable[Sequence[Encoded]], max_tokens: int) -> Iterator[list[Sequence[Encoded]]]:
    """Group documents in their order, up to ``max_tokens`` before sharing; a larger document is a group alone."""
    batch: list[Sequence[Encoded]] = []
    room = max_tokens
    for document in documents:
        size = sum(len(answer.tokens) for answer in document)
        if batch and size > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(document)
        room -= size
    if batch:
        yield batch


class PairBatches:
    """Lists of N encoded pairs (chosen, rejected), or labelled answers; the last one is shorter if the records end.

    A pair is left out, and counted in ``refused`` by its reason, if a side is longer than ``max_length`` tokens (a cut
    answer has no reward), if the pair takes more than ``max_tokens`` with its prompt shared, if both sides are the
    same, if the record has no wrong answer, or no label for any of ``heads``.

    ``cut`` returns a further record that is made from a pair's answers (``dph.data.prefixes``), or None. It follows
    the pair in the batch, if that has room and the record is not one to leave out.
    """

    def __init__(
        self,
        records: Sampler,
        encode: Callable[[Record], tuple[Encoded, Encoded]],
        pairs: int,
        max_length: int | None = None,
        max_tokens: int | None = None,
        heads: Sequence[str] = (),
        cut: Callable[[Any], Any] | None = None,
    ) -> None:
        if pairs < 1:
            raise UserError(f"pairs: expected at least 1, got {pairs}")
        self.records, self.encode, self.pairs = records, encode, pairs
        self.max_length, self.max_tokens, self.heads, self.cut = max_length, max_tokens, heads, cut
        self.refused: Counter[str] = Counter()
        self._before: tuple[int | None, dict[str, int]] = (None, {})  # records and refused pairs before the last batch

    def __iter__(self) -> Iterator[list[tuple[Encoded, Encoded]]]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> list[tuple[Encoded, Encoded]]:
        """Return the next N pairs. Raises UserError if two whole passes over the records give no pair."""
        batch, refused_in_a_row = [], 0
        self._before = self.records.position, dict(self.refused)
        while len(batch) < self.pairs:
            try:
                record = next(self.records)
            except StopIteration:
                break
            pair = None if record is None else self.encode(record)
            reason = self._reason_to_refuse(pair)
            if reason is None:
                batch.append(pair)
                refused_in_a_row = 0
                if self.cut is not None and len(batch) < self.pairs:
                    shorter = self.cut(pair)
                    if shorter is not None and self._reason_to_refuse(shorter) is None:
                        batch.append(shorter)
                continue
            self.refused[reason] += 1
            refused_in_a_row += 1
            if refused_in_a_row > 2 * self.records.size:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in self.refused.items())
                raise UserError(f"pairs: expected some to train on, got none in two passes over the records: {reasons}")
        if not batch:
            raise StopIteration
        return batch

    def _reason_to_refuse(self, pair: tuple[Encoded, Encoded] | None) -> str | None:
        """Return the reason why a pair is left out, or None."""
        if pair is None:
            return "no wrong answer"
        if isinstance(pair, EncodedAnswers):
            if (reason := self._reason_of_labels(pair)) is not None:
                return reason
        elif pair[0].tokens == pair[1].tokens:
            return "identical"
        longest = total = 0
        for answer in pair:
            length = len(answer.tokens)
            longest, total = max(longest, length), total + length
        if self.max_length is not None and longest > self.max_length:
            return f"longer than {self.max_length} tokens"
        # The common prefix is searched only if all answers in full exceed the limit.
        limit = self.max_tokens
        if limit is not None and total > limit and packed_length(pair) > limit:
            return f"more than {limit} tokens together"
        return None

    def _reason_of_labels(self, answers: EncodedAnswers) -> str | None:
        """Return the reason why labelled answers are left out, or None."""
        if not answers.labels:
            return "equal scores"
        used = False
        for label in answers.labels:
            if label.is_pair and answers[label.better].tokens == answers[label.worse].tokens:
                return "identical"
            used |= label.head is None or label.head in self.heads
        return None if used else f"no label for {' or '.join(self.heads)}"

    def undo(self) -> dict[str, Any]:
        """Return the state before the last batch, which may have failed; this object must not be used afterwards."""
        position, refused = self._before
        return {"records": self.records.state_dict(position), "refused": refused}

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state and the counts of refused pairs."""
        return {"records": self.records.state_dict(), "refused": dict(self.refused)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.records.load_state_dict(state["records"])
        self.refused = Counter(state["refused"])
