"""What a stage of training needs: which weights train, what one update takes, and the loss of a part of it.

The loop (``dph.train.trainer``) knows nothing else. A loss is a sum over what it is a mean of (targets or pairs), so that an
update that is cut into parts equals one that is not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from dph.data.formats import Record
from dph.data.sampler import Order
from dph.data.workers import Readers
from dph.errors import UserError
from dph.model.model import Model
from dph.train.distributed import SINGLE, World
from dph.train.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """What one update takes, in all processes together.

    Attributes:
        parts: micro-batches, in the stage's own form, of this process: as many as every other's; one in stage head.
        weight: what the loss is a mean over: targets, or pairs.
        tokens: how many go through the model.
        records: their places in the order of the data, for people.
        flops: arithmetic that it needs (``dph.train.budget.flops``).
    """

    parts: list[Any]
    weight: float
    tokens: int
    records: str
    flops: float


class Loss(NamedTuple):
    """Loss of one part: its sum, with gradient; sums of what ``metrics`` names; what has to be finite, item by item."""

    total: Tensor
    sums: Tensor
    values: Tensor


class Stage(Protocol):
    """What the loop asks of a stage."""

    model: Model
    world: World  # the processes that share every update
    share: int  # sequences or pairs of an update that are this process's
    metrics: tuple[str, ...]  # what the sums of a loss are called
    needs_reference: bool
    reference: Model | None  # a frozen copy of the starting model, put here by the loop
    notes: tuple[str, ...]  # what people are to know of how it was set up
    place: str  # "device" or "host": where the memory of streams lies

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` trains."""

    def next(self) -> Work:
        """The next update's work."""

    def given(self, part: Any, step: int) -> Any:
        """What the loss of one part of the work of ``step`` is computed from, on the device as far as it is to be.

        Asked for when the backward pass of the part before is over.
        """

    def loss(self, given: Any) -> Loss:
        """The loss of a part."""

    def rows(self, part: Any) -> int:
        """Rows of hidden state that the backbone computes of a part at a time, at most."""

    def describe(self, part: Any, values: Tensor) -> str:
        """The first item of a part that has a value which is not finite."""

    def counts(self) -> dict[str, int]:
        """What has been counted since the stage began, for the log."""

    def left_out(self) -> dict[str, str]:
        """Of the records taken so far, by where they come from, how many were left out and why: lines for people."""

    def forget(self) -> None:
        """Drop what is remembered of the data so far, where a step has left there what is not finite."""

    def figures(self) -> list[str]:
        """Names of what ``evaluate`` gives."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out records; none where there are none."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the data stand, as tensors and JSON."""

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Stand there again."""

    def close(self) -> None:
        """End what the stage keeps running."""


@dataclass(kw_only=True)
class Material:
    """What both kinds of stage are made of.

    Attributes:
        recipe: of the stage.
        model: that trains.
        tokenizer: for fillers, and for what an error shows.
        encode: from a record to tokens (``dph.data.formats.encoder``).
        records: training records in their order.
        held_out: records for evaluation, by name.
        reference, notes, place: see :class:`Stage`.
        world: the processes that share every update.
    """

    recipe: Recipe
    model: Model
    tokenizer: Any
    encode: Callable[[Record], Any]
    records: Order
    held_out: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    reference: Model | None = None
    notes: tuple[str, ...] = ()
    place: str = "device"
    world: World = SINGLE

    def check_share(self) -> None:
        """Raise UserError where an update does not come out even among the processes."""
        size, processes = self.recipe.batch.size, self.world.size
        if size % processes:
            raise UserError(f"batch.size: expected a multiple of the {processes} processes, got {size}")
        if self.share % self.micro:
            raise UserError(
                f"batch.micro: expected a divisor of {self.share}, the share of each of {processes} processes, "
                f"got {self.micro}"
            )

    @property
    def share(self) -> int:
        """Sequences or pairs of an update that are this process's."""
        return self.recipe.batch.size // self.world.size

    @property
    def micro(self) -> int:
        """Sequences or pairs that go through the backbone at a time."""
        return min(self.recipe.batch.micro or self.share, self.share)

    def position(self) -> int:
        """How many records have been taken."""
        return self.records.state_dict()["position"]

    def figures(self) -> list[str]:
        """Names of what ``evaluate`` gives: of each figure that is ``judged``, as ``merge`` has them."""
        return list(merge({name: (dict.fromkeys(self.judged, 0.0), 1) for name in self.held_out}))

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""
        if isinstance(self.records, Readers):
            self.records.close()


def merge(found: Mapping[str, tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of all sources together, and, where there are several, of each; ``found`` has sums and counts."""
    merged = {}
    for key in dict.fromkeys(key for sums, _ in found.values() for key in sums):
        merged[key] = sum(sums.get(key, 0.0) for sums, _ in found.values()) / max(1, sum(n for _, n in found.values()))
    if len(found) > 1:
        for name, (sums, count) in found.items():
            merged |= {f"{key}/{name}": value / max(1, count) for key, value in sums.items()}
    return merged


def excerpt(tokenizer: Any, tokens: Sequence[int], length: int = 80) -> str:
    """The first characters of the text, on one line."""
    text = " ".join(tokenizer.decode(list(tokens)[:length]).split())
    return repr(text if len(text) <= length else text[:length] + "...")
