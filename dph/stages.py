"""What a stage of training needs: which weights train, what one update takes, and the loss of a part of it.

The loop in ``dph.trainer`` knows nothing else. A loss is a sum over what it is a mean of (targets or pairs), so that an
update that is cut into parts equals one that is not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dph.batches import IGNORED, PairBatches, Streams
from dph.chat import Encoded
from dph.errors import UserError
from dph.memory import Memory
from dph.model import Model, PackedOutput
from dph.order import InOrder, Order, draw
from dph.packing import PackedBatch, pack
from dph.recipe import Recipe
from dph.records import Record
from dph_kernels import preference_loss
from dph_kernels.preference_loss import PREFERENCE_METRICS


@dataclass(frozen=True)
class Work:
    """What one update takes.

    Attributes:
        parts: micro-batches, in the stage's own form.
        weight: what the loss is a mean over: targets, or pairs.
        tokens: how many go through the model.
        records: their places in the order of the data, for people.
    """

    parts: list[Any]
    weight: float
    tokens: int
    records: str


class Loss(NamedTuple):
    """Loss of one part: its sum, with gradient; sums of what ``metrics`` names; what has to be finite, item by item."""

    total: Tensor
    sums: Tensor
    values: Tensor


class Stage(Protocol):
    """What the loop asks of a stage."""

    model: Model
    metrics: tuple[str, ...]  # what the sums of a loss are called
    needs_reference: bool
    reference: Model | None  # a frozen copy of the starting model, put here by the loop

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` trains."""

    def next(self) -> Work:
        """The next update's work."""

    def loss(self, part: Any, step: int) -> Loss:
        """The loss of one part of the work of ``step``."""

    def describe(self, part: Any, values: Tensor) -> str:
        """The first item of a part that has a value which is not finite."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out records; none where there are none."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the data stand, as tensors and JSON."""

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Stand there again."""


@dataclass(kw_only=True)
class Material:
    """What both kinds of stage are made of.

    Attributes:
        recipe: of the stage.
        model: that trains.
        tokenizer: for fillers, and for what an error shows.
        encode: from a record to tokens (``dph.records.encoder``).
        records: training records in their order.
        held_out: records for evaluation, by name.
    """

    recipe: Recipe
    model: Model
    tokenizer: Any
    encode: Callable[[Record], Any]
    records: Order
    held_out: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    reference: Model | None = None

    @property
    def micro(self) -> int:
        """Sequences or pairs of one part."""
        return self.recipe.batch.micro or self.recipe.batch.size

    def position(self) -> int:
        """How many records have been taken."""
        return self.records.state_dict()["position"]


@dataclass(kw_only=True)
class StreamStage(Material):
    """Pre-training, vocabulary and SFT: parallel streams, each with its Transformer-XL memory."""

    metrics = ("loss",)
    needs_reference = False

    def __post_init__(self) -> None:
        """Set up streams and memories, one memory for each part."""
        self.batches = self._streams(self.records, self.recipe.batch.size)
        self.memories = [self._memory() for _ in range(self.recipe.batch.size // self.micro)]

    def _streams(self, records: Order, size: int) -> Streams:
        filler = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return Streams(records, self.encode, size, self.recipe.data.context, filler)

    def _memory(self) -> Memory | None:
        return Memory(self.recipe.data.memory, self.recipe.data.memory_kind) if self.recipe.data.memory else None

    def trains(self, name: str) -> bool:
        """The embedding alone in stage vocab, else all but the reward heads."""
        return "embedding" in name if self.recipe.stage == "vocab" else not name.startswith("heads.")

    def next(self) -> Work:
        """The next segment of every stream."""
        first = self.position()
        tokens, targets = next(self.batches)
        parts = list(zip(self.memories, tokens.split(self.micro), targets.split(self.micro), strict=True))
        taken = f"segments after records {first} to {self.position()}"
        return Work(parts, max(1, int((targets != IGNORED).sum())), tokens.numel(), taken)

    def loss(self, part: tuple[Memory | None, Tensor, Tensor], step: int) -> Loss:
        """Minus the log-probabilities of the targets."""
        memory, tokens, targets = part
        device = self.model.device
        logprobs = self.model.stream_logprobs(tokens.to(device), targets.to(device), memory)
        total = -logprobs.sum()
        return Loss(total, total.detach().reshape(1), logprobs.detach())

    def describe(self, part: tuple[Memory | None, Tensor, Tensor], values: Tensor) -> str:
        """The first stream that went wrong."""
        _, tokens, targets = part
        rows = (targets != IGNORED).nonzero()[:, 0]
        row = int(rows[~torch.isfinite(values).cpu()][0])
        return f"a segment that begins {_excerpt(self.tokenizer, tokens[row].tolist())}"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the targets of each held-out source, and of all."""
        found = {}
        for name, records in self.held_out.items():
            memory, total, count = self._memory(), 0.0, 0
            for tokens, targets in self._streams(InOrder(records), min(self.micro, len(records))):
                loss = self.loss((memory, tokens, targets), 0)
                total, count = total + float(loss.total), count + len(loss.values)
            found[name] = {"loss": total}, count
        return _merge(found)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Memories, and what the streams have left over."""
        kept = [memory.state_dict() for memory in self.memories if memory is not None]
        return {f"{i}/{key}": t for i, state in enumerate(kept) for key, t in state.items()}, self.batches.state_dict()

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take both up again."""
        self.batches.load_state_dict(state)
        for i, memory in enumerate(self.memories):
            own = {key.split("/")[1]: t for key, t in tensors.items() if key.startswith(f"{i}/")}
            if memory is not None:
                memory.load_state_dict({key: t.to(self.model.device) for key, t in own.items()})


@dataclass(frozen=True)
class PairPart:
    """Pairs of one part, with chosen and rejected in turn as the answers of ``packed``; ``first`` of the whole work."""

    pairs: list[tuple[Encoded, Encoded]]
    packed: PackedBatch
    first: int


@dataclass(kw_only=True)
class PairStage(Material):
    """Alignment and head training: preference pairs, their prompts shared."""

    metrics = tuple(name for name in PREFERENCE_METRICS if name != "finite")

    def __post_init__(self) -> None:
        """Set up the batches. UserError for a head that is not there, and where nothing is left to train on."""
        objective = self.recipe.objective
        self.rewarded = objective.dph_weight > 0
        self.needs_reference = self.recipe.stage == "align" and objective.dpo_weight > 0
        if not (self.rewarded or self.needs_reference):
            raise UserError("objective: expected a weight above 0 for a part that the stage trains, got none")
        if unknown := [name for name in objective.heads if name not in self.model.head_names] or not objective.heads:
            raise UserError(f"objective.heads: expected some of {self.model.head_names}, got {unknown or 'none'}")
        self.batches = self._pairs(self.records, self.recipe.batch.size)

    def _pairs(self, records: Order, size: int) -> PairBatches:
        return PairBatches(records, self.encode, size, self.recipe.data.context)

    def trains(self, name: str) -> bool:
        """The asked-for heads with their poolers, and in stage align the backbone."""
        if not name.startswith("heads."):
            return self.recipe.stage == "align"
        heads, place = self.recipe.objective.heads, name.split(".")
        if place[2] == "reward":
            return place[3] in heads
        owned = self.model.heads[place[1]].reward
        return any(head in owned for head in heads)

    def next(self) -> Work:
        """The next pairs, packed."""
        first = self.position()
        pairs = next(self.batches)
        parts = [self._part(pairs[i : i + self.micro], i) for i in range(0, len(pairs), self.micro)]
        tokens = sum(len(part.packed.tokens) for part in parts)
        return Work(parts, len(pairs), tokens, f"records {first} to {self.position() - 1}")

    def _part(self, pairs: list[tuple[Encoded, Encoded]], first: int) -> PairPart:
        for pair in pairs if self.rewarded else []:
            if any(side.reward_position is None for side in pair):
                raise UserError(f"pairs: expected finished answers, got one that was cut off: {self._show(pair)}")
        return PairPart(pairs, pack(pairs), first)

    def loss(self, part: PairPart, step: int) -> Loss:
        """The joint objective; a pair's dropout depends on the seed, the step and its place, not on its part."""
        packed = part.packed if self.needs_reference else _judged_only(part.packed)
        packed = packed.to(self.model.device)
        first = 2 * part.first
        ids = torch.arange(first, first + 2 * len(part.pairs), device=self.model.device)
        out = self.model.forward_packed(
            packed, dropout_seed=draw(2**31, self.recipe.seed, step, "dropout"), answer_ids=ids
        )
        return self._objective(out, self._reference(packed), len(part.pairs))

    @torch.no_grad()
    def _reference(self, packed: PackedBatch) -> Tensor | None:
        return None if self.reference is None else self.reference.forward_packed(packed).logprobs

    def _objective(self, out: PackedOutput, reference: Tensor | None, count: int) -> Loss:
        objective = self.recipe.objective
        inputs: list[Tensor | None] = [None] * 6
        if self.rewarded:
            inputs[:2] = _sides(torch.stack([out.rewards[name] for name in objective.heads], 1))
        if reference is not None:
            inputs[2:] = *_sides(out.logprobs), *_sides(reference)
        loss, metrics = preference_loss(
            *inputs,
            beta=objective.beta,
            dpo_epsilon=objective.dpo_epsilon,
            dph_epsilon=objective.dph_epsilon,
            objective=objective.objective,
            dpo_weight=objective.dpo_weight,
            dph_weight=objective.dph_weight,
        )
        values = sum(side.detach().reshape(count, -1).sum(1) for side in inputs if side is not None)
        kept = torch.stack([m for m, name in zip(metrics, PREFERENCE_METRICS, strict=True) if name != "finite"])
        return Loss(loss * count, kept * count, values)

    def describe(self, part: PairPart, values: Tensor) -> str:
        """The first pair that went wrong."""
        at = int((~torch.isfinite(values)).nonzero()[0])
        return f"pair {part.first + at} of the batch, {self._show(part.pairs[at])}"

    def _show(self, pair: tuple[Encoded, Encoded]) -> str:
        return f"which begins {_excerpt(self.tokenizer, pair[0].tokens)}"

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of held-out pairs told right, by each reward and by mean log-probability; a tie or NaN is wrong."""
        found = {}
        for name, records in self.held_out.items():
            right, count = {}, 0
            for pairs in self._pairs(InOrder(records), self.micro):
                out = self.model.forward_packed(pack(pairs).to(self.model.device))
                for key, (chosen, rejected) in self._judgements(out):
                    right[key] = right.get(key, 0) + int((chosen > rejected).sum())
                count += len(pairs)
            found[name] = right, count
        return _merge(found)

    def _judgements(self, out: PackedOutput) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        heads = self.recipe.objective.heads
        for name in heads if self.rewarded else ():
            yield "reward_accuracy" + (f"_{name}" if len(heads) > 1 else ""), _sides(out.rewards[name])
        yield "logprob_accuracy", _sides(out.mean_logprobs)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The place in the data."""
        return {}, self.batches.state_dict()

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Stand there again."""
        self.batches.load_state_dict(state)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """[2N, ...] -> chosen and rejected [N, ...]."""
    return values[0::2], values[1::2]


def _judged_only(packed: PackedBatch) -> PackedBatch:
    """Without the targets: no log-probability is computed."""
    names = ("rows", "targets", "answers", "trained", "scored")
    return dataclasses.replace(packed, **{name: getattr(packed, name)[:0] for name in names})


def _merge(found: Mapping[str, tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of all sources together, and, where there are several, of each; ``found`` has sums and counts."""
    merged = {}
    for key in dict.fromkeys(key for sums, _ in found.values() for key in sums):
        merged[key] = sum(sums.get(key, 0.0) for sums, _ in found.values()) / max(1, sum(n for _, n in found.values()))
    if len(found) > 1:
        for name, (sums, count) in found.items():
            merged |= {f"{key}/{name}": value / max(1, count) for key, value in sums.items()}
    return merged


def _excerpt(tokenizer: Any, tokens: Sequence[int], length: int = 80) -> str:
    """The first characters of the text, on one line."""
    text = " ".join(tokenizer.decode(list(tokens)[:length]).split())
    return repr(text if len(text) <= length else text[:length] + "...")
