"""Interface between the trainer and a training stage: batches and losses.

The loss of a micro-batch is a sum over its items (targets or pairs), so that gradient accumulation over micro-batches
gives the gradient of the undivided batch.
"""

import difflib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from dph.errors import UserError, shown
from dph.train.adapters import is_adapter
from dph.train.distributed import SINGLE_PROCESS, World
from dph.train.recipe import Recipe


class MicroBatch(ABC):
    """Sequences or pairs that go through the model in one forward and backward pass."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Largest number of rows of hidden state that the backbone computes at a time."""

    @abstractmethod
    def describe_nonfinite(self, values: Tensor, tokenizer: Any) -> str:
        """Return a description of the first item with a value in ``LossSum.values`` that is not finite."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Data of one optimizer step.

    Attributes:
        micro_batches: of this rank; every rank has the same number, and stage head has one.
        weight: number of items, over all ranks, that the loss is a mean of: targets, or pairs.
        tokens: tokens that go through the model, over all ranks.
        records: positions of the records in the data, for messages.
        pairs: encoded pairs of all ranks; empty for streams.
        memory: tokens of Transformer-XL memory that each stream has seen, at most the memory's length.
        targets: targets of all ranks; 0 for pairs, whose masks hold them.
        refused: pairs left out since the start of the run; None for streams, which use every record.
    """

    micro_batches: Sequence[MicroBatch]
    weight: float
    tokens: int
    records: str
    pairs: Sequence[Any] = ()
    memory: int = 0
    targets: int = 0
    refused: int | None = None


class LossSum(NamedTuple):
    """Loss of one micro-batch.

    Attributes:
        total: sum over the items, with gradient.
        sums: sums over the items of the quantities that ``Stage.metrics`` names.
        values: one or more values of each item, which have to be finite.
    """

    total: Tensor
    sums: Tensor
    values: Tensor


class Stage(ABC):
    """Batches and losses of one training stage.

    Args:
        recipe: the stage's recipe.
        model: trained model (``dph.Model``); the trainer replaces it by its shards if there are several ranks.
        tokenizer: for padding and error messages.
        world: the ranks that share every step.

    Attributes:
        metrics: names of ``LossSum.sums``.
        needs_reference: whether the loss compares with a frozen copy of the starting model.
        reference: that copy, set by the trainer.
        memories: Transformer-XL memories of this rank's streams.
        batches: iterator over the data of all ranks (``Streams`` or ``PairBatches`` of ``dph.data``).
        held_out: metrics on held-out records (``dph.train.stages.held_out``).
        rank_size: sequences or pairs of a step on this rank.
        micro_size: sequences or pairs that go through the backbone at a time.
        notes: messages about the setup, printed when training starts.
        memory_place: "device" or "host", for the Transformer-XL memory.
        frozen_names: names of the parameters that the patterns ``recipe.train.frozen`` match.
        frozen_blocks: number of the first blocks, below all that is trained (``recipe.train``).

    Raises UserError if the batch size is not divisible by the number of ranks and the size of a micro-batch, for more
    trained blocks than the model has, and for patterns that match no parameter, or all that would be trained.
    """

    metrics: tuple[str, ...]
    needs_reference = False
    memories: Sequence[Any] = ()
    batches: Any
    held_out: Any

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Any, world: World = SINGLE_PROCESS) -> None:
        self.recipe, self.model, self.tokenizer, self.world = recipe, model, tokenizer, world
        self.reference: nn.Module | None = None
        self.notes: tuple[str, ...] = ()
        self.memory_place = "device"
        size, ranks = recipe.batch.size, world.world_size
        if size % ranks:
            raise UserError(f"batch.size: expected a multiple of the {ranks} processes, got {size}")
        self.rank_size = size // ranks
        self.micro_size = min(recipe.batch.micro or self.rank_size, self.rank_size)
        if self.rank_size % self.micro_size:
            raise UserError(
                f"batch.micro: expected a divisor of {self.rank_size}, the batch of each of {ranks} ranks, "
                f"got {self.micro_size}"
            )
        blocks, last = model.config.num_hidden_layers, recipe.train.last_layers
        if last is not None and last > blocks:
            raise UserError(f"train.last_layers: expected at most the {blocks} blocks of the model, got {last}")
        self.frozen_blocks = 0 if last is None else blocks - last
        self.frozen_names: frozenset[str] = frozenset()
        if recipe.train.frozen:
            names = [name for name, _ in model.named_parameters()]
            self.frozen_names = matching_names(recipe.train.frozen, names)
            trained = list(filter(self.trains, names))
            if not trained:
                raise UserError(
                    f"train.frozen: expected a parameter to train, got none besides {len(names)} frozen ones"
                )
            if recipe.stage in ("pretrain", "sft", "align"):
                self.frozen_blocks = max(self.frozen_blocks, count_frozen_blocks(trained, blocks))

    def trains_backbone(self, name: str) -> bool:
        """Return whether the parameter ``name``, of no reward head, is trained in stages pretrain, sft and align."""
        if self.recipe.lora.rank is not None:
            return is_adapter(name)
        if self.recipe.train.last_layers is None or name.startswith("backbone.output_norm."):
            return True
        return name.startswith("backbone.blocks.") and int(name.split(".")[2]) >= self.frozen_blocks

    def trains(self, name: str) -> bool:
        """Return whether the parameter ``name`` is trained."""
        return name not in self.frozen_names and self.trains_by_stage(name)

    @abstractmethod
    def trains_by_stage(self, name: str) -> bool:
        """Return whether the parameter ``name`` is trained unless a pattern of the recipe freezes it."""

    @abstractmethod
    def next_batch(self) -> StepBatch:
        """Return the data of the next step."""

    @abstractmethod
    def prepare(self, micro_batch: Any, step: int) -> Any:
        """Return the inputs of :meth:`loss` for a micro-batch of ``step``, on the model's device.

        Called after the backward pass of the previous micro-batch.
        """

    @abstractmethod
    def loss(self, inputs: Any) -> LossSum:
        """Return the loss of a micro-batch. Must not wait for the device."""

    @abstractmethod
    def state(self, undo_batch: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the position in the data as tensors and JSON, for a checkpoint.

        With ``undo_batch`` it is the position before the last call of :meth:`next_batch`, which may have failed. The
        stage must not be used for further steps then.
        """

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from a state."""

    def close(self) -> None:
        """Stop the data workers, if there are any."""
        if hasattr(self.batches.records, "close"):  # a pool of workers
            self.batches.records.close()

    def left_out(self) -> str | None:
        """Return a message about the training records that were left out so far, or None."""
        return None

    def reset_memory(self) -> None:
        """Clear the memory of all streams, which may hold numbers that are not finite."""
        for memory in self.memories:
            if memory is not None:
                memory.reset()


def matching_names(patterns: Sequence[str], names: Sequence[str]) -> frozenset[str]:
    """Return the names of parameters that ``recipe.train.frozen`` matches; UserError for a pattern without one."""
    matched: set[str] = set()
    for i, pattern in enumerate(patterns):
        own = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not own:
            near = ", ".join(difflib.get_close_matches(pattern, names, 3, 0.0))
            raise UserError(f"train.frozen.{i}: expected a pattern of parameters, such as {near}, got {shown(pattern)}")
        matched.update(own)
    return frozenset(matched)


def count_frozen_blocks(trained: Sequence[str], blocks: int) -> int:
    """Return the number of the first of ``blocks`` blocks below all parameters named in ``trained``, but the heads'.

    The last block never counts: states are computed up to a block.
    """
    first = blocks - 1
    for name in trained:
        if name.startswith("backbone.blocks."):
            first = min(first, int(name.split(".")[2]))
        elif name.startswith("backbone.") and not name.startswith("backbone.output_norm."):
            return 0  # the embedding or its projection
    return first


def excerpt(tokenizer: Any, tokens: Sequence[int], length: int = 80) -> str:
    """Return the first characters of the decoded text, on one line."""
    text = " ".join(tokenizer.decode(list(tokens)[:length]).split())
    return repr(text if len(text) <= length else text[:length] + "...")
