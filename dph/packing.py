"""Documents -> PackedBatch: tokens end to end, shared beginnings once, and what each answer is judged by."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix
from dph_kernels.transfer import to_device

if TYPE_CHECKING:
    from dph.chat import Encoded


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
        layout = own.pop("layout").to(device)
        return PackedBatch(layout=layout, **{name: to_device(tensor, device) for name, tensor in own.items()})


def pack(documents: Sequence[Sequence[Encoded]]) -> PackedBatch:
    """Lay documents end to end; the alternatives of each share their longest common prefix.

    Args:
        documents: each inner list holds alternatives (``dph.chat.encode``): two for a preference pair, the choices of a
            question, the candidates of a prompt, or one.

    Raises ValueError for a document without alternatives and for an alternative without tokens.
    """
    for d, alternatives in enumerate(documents):
        if not alternatives or any(not a.tokens for a in alternatives):
            raise ValueError(f"documents[{d}]: expected alternatives of at least one token each, got {alternatives!r}")
    layout = PackedLayout.from_sequences([[a.tokens for a in alternatives] for alternatives in documents])
    tokens: list[int] = []
    columns: dict[str, list] = {name: [] for name in ("rows", "targets", "answers", "trained", "scored")}
    reward_rows, owners = [], []
    for d, alternatives in enumerate(documents):
        start, shared = len(tokens), common_prefix([a.tokens for a in alternatives])
        tokens += alternatives[0].tokens[:shared]
        for alternative in alternatives:
            shift = len(tokens) - shared  # row of token i: start + i within the prefix, shift + i behind it
            tokens += alternative.tokens[shared:]
            _add_targets(columns, alternative, len(owners), shared, start, shift)
            at = alternative.reward_position
            reward_rows.append(-1 if at is None else at + (start if at < shared else shift))
            owners.append(d)
    as_tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    for name in ("trained", "scored"):
        as_tensors[name] = as_tensors[name].bool()
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64), layout=layout, **as_tensors,
        reward_rows=torch.tensor(reward_rows, dtype=torch.int64), documents=torch.tensor(owners, dtype=torch.int64),
    )  # fmt: skip


def _add_targets(columns: dict[str, list], a: Encoded, answer: int, shared: int, start: int, shift: int) -> None:
    """Append the predicted rows of one alternative."""
    marks = zip(a.loss_mask, a.score_mask, strict=True)
    places = [i for i, (trained, scored) in enumerate(marks) if trained or scored]
    columns["rows"] += [i + (start if i < shared else shift) for i in places]
    columns["targets"] += [a.targets[i] for i in places]
    columns["answers"] += [answer] * len(places)
    columns["trained"] += [a.loss_mask[i] for i in places]
    columns["scored"] += [a.score_mask[i] for i in places]


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
