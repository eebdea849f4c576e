"""Documents -> PackedBatch: tokens end to end, shared beginnings once, and what each answer is judged by."""

from __future__ import annotations

import bisect
import dataclasses
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix
from dph_kernels.transfer import all_to_device

if TYPE_CHECKING:
    from dph.chat import Encoded

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A layout, its tokens, and for each of A answers where it is predicted and judged.

    Attributes:
        tokens: [T] int64, documents end to end, each its common prefix and then its branches.
        layout: who may look at what.
        rows: [R] int64, the rows of hidden state that predict a target, answer after answer.
        targets: [R] int64 tokens that they predict.
        answers: [R] int64, the answer of each row, ascending.
        trained: [R] bool, counts in the answer's summed log-probability (``loss_mask``).
        scored: [R] bool, counts in the answer's mean log-probability (``score_mask``).
        reward_rows: [A] int64 row of the judged ``<|im_end|>``; -1 where the answer was cut off.
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
        """The same batch on ``device``."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        layout: PackedLayout = own.pop("layout")
        tensors = [*own.values(), layout.query_positions, layout.key_positions]
        *moved, queries, keys = all_to_device(tensors, device)
        return PackedBatch(layout=layout.placed(queries, keys), **dict(zip(own, moved, strict=True)))


def pack(documents: Sequence[Sequence[Encoded]]) -> PackedBatch:
    """Lay documents end to end; the alternatives of each share their longest common prefix.

    Args:
        documents: each inner list holds alternatives (``dph.chat.encode``): two for a preference pair, the choices of a
            question, the candidates of a prompt, or one.

    Raises ValueError for a document without alternatives, and for an alternative without tokens, whose lists are not
    of one length, or whose reward position is not one of them.
    """
    _check(documents)
    prefixes = [common_prefix([a.tokens for a in alternatives]) for alternatives in documents]
    rests = [[len(a) - prefix for a in alternatives] for prefix, alternatives in zip(prefixes, documents, strict=True)]
    layout = PackedLayout.shared_prefix(prefixes, rests)
    answers = list(chain.from_iterable(documents))
    counts, sizes = _integers([map(len, documents)]), _integers([map(len, answers)])
    rows = _rows(layout, counts)
    tokens = np.empty(layout.queries, dtype=np.int64)
    tokens[rows] = _integers(a.tokens for a in answers)
    targets = _integers(a.targets for a in answers)
    trained, scored = _flags(a.loss_mask for a in answers), _flags(a.score_mask for a in answers)
    asked = np.flatnonzero(trained | scored)
    judged = _integers([[-1 if a.reward_position is None else a.reward_position for a in answers]])
    arrays = {
        "tokens": tokens,
        "rows": rows[asked],
        "targets": targets[asked],
        "answers": np.repeat(np.arange(len(answers)), sizes)[asked],
        "trained": trained[asked],
        "scored": scored[asked],
        "reward_rows": np.where(judged < 0, -1, rows[sizes.cumsum() - sizes + judged]),
        "documents": np.repeat(np.arange(len(documents)), counts),
    }
    return PackedBatch(layout=layout, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def _rows(layout: PackedLayout, counts: Array) -> Array:
    """Where the tokens of every answer lie, answer after answer: in its prefix, then in its own segment.

    ``counts``: answers of each document, whose segments come behind that of their prefix.
    """
    prefixes = (counts + 1).cumsum() - (counts + 1)
    own_start, own_end, _, _, start, end, _ = np.delete(layout.segments.numpy(), prefixes, axis=0).T
    starts = np.stack([start, own_start], 1).ravel()
    lengths = np.stack([end - start, own_end - own_start], 1).ravel()
    return np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)


def _check(documents: Sequence[Sequence[Encoded]]) -> None:
    for d, alternatives in enumerate(documents):
        if not alternatives or any(not a.tokens for a in alternatives):
            raise ValueError(f"documents[{d}]: expected alternatives of at least one token each, got {alternatives!r}")
        for a in alternatives:
            if not len(a.tokens) == len(a.targets) == len(a.loss_mask) == len(a.score_mask):
                got = f"{len(a.tokens)}, {len(a.targets)}, {len(a.loss_mask)} and {len(a.score_mask)}"
                raise ValueError(f"documents[{d}]: expected tokens, targets and two masks of one length, got {got}")
            at = a.reward_position
            if at is not None and not 0 <= at < len(a.tokens):
                raise ValueError(f"documents[{d}]: expected 0 <= reward_position < {len(a.tokens)}, got {at}")


def _integers(lists: Iterable[Iterable[int]]) -> Array:
    """Lists end to end, int64; ``struct`` takes a third of the time that NumPy takes."""
    values: list[int] = []
    for each in lists:
        values += each
    array = np.empty(len(values), dtype=np.int64)
    struct.pack_into(f"{len(values)}q", array, 0, *values)
    return array


def _flags(lists: Iterable[list[bool]]) -> Array:
    """Lists end to end, bool; by way of bytes in a third of NumPy's time, too."""
    return np.frombuffer(b"".join(map(bytes, lists)), dtype=np.uint8) != 0


def packed_length(alternatives: Sequence[Encoded]) -> int:
    """Tokens of a document, its shared beginning counted once."""
    tokens = [a.tokens for a in alternatives]
    return sum(map(len, tokens)) - (len(tokens) - 1) * common_prefix(tokens)


def fill(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of ``sizes`` in bins of at most ``room``: the longest first, each where it leaves the least room.

    Bins and the indices in them ascend; the same sizes give the same bins. ValueError for a size above ``room``.
    """
    if sizes and max(sizes) > room:
        raise ValueError(f"sizes: expected at most {room} each, got {max(sizes)}")
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # of each bin: room that is left, and which; ascending
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # equal ones in their order
        at = bisect.bisect_left(left, (sizes[index], -1))
        free, which = left.pop(at) if at < len(left) else (room, len(bins))
        if which == len(bins):
            bins.append([])
        bins[which].append(index)
        bisect.insort(left, (free - sizes[index], which))
    return sorted(sorted(found) for found in bins)


def batches(documents: Iterable[Sequence[Encoded]], max_tokens: int) -> Iterator[list[Sequence[Encoded]]]:
    """Documents in order, as many at a time as have ``max_tokens`` before sharing; a larger one goes alone."""
    batch: list[Sequence[Encoded]] = []
    room = max_tokens
    for document in documents:
        size = sum(len(alternative.tokens) for alternative in document)
        if batch and size > room:
            yield batch
            batch, room = [], max_tokens
        batch.append(document)
        room -= size
    if batch:
        yield batch
