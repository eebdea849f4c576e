"""Alignment and head training: preference pairs, packed."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dph.batches import PairBatches
from dph.chat import Encoded
from dph.errors import UserError
from dph.model import PackedOutput
from dph.order import InOrder, Order, draw
from dph.packing import PackedBatch, pack
from dph.records import Record
from dph.stages import Loss, Material, Work, excerpt, merge
from dph_kernels import preference_loss
from dph_kernels.preference_loss import metric_names


@dataclass(frozen=True)
class PairPart:
    """Pairs of one part, with chosen and rejected in turn as the answers of ``packed``; ``first`` of the whole work."""

    pairs: list[tuple[Encoded, Encoded]]
    packed: PackedBatch
    first: int


@dataclass(kw_only=True)
class PairStage(Material):
    """Alignment and head training: preference pairs, their prompts shared."""

    def __post_init__(self) -> None:
        """Set up the batches. UserError for a missing head, no loss, and no held-out pair that fits."""
        objective = self.recipe.objective
        self.rewarded = objective.dph_weight > 0
        self.needs_reference = self.recipe.stage == "align" and objective.dpo_weight > 0
        if not (self.rewarded or self.needs_reference):
            raise UserError("objective: expected a weight above 0 for a part that the stage trains, got none")
        if unknown := [name for name in objective.heads if name not in self.model.head_names] or not objective.heads:
            raise UserError(f"objective.heads: expected some of {self.model.head_names}, got {unknown or 'none'}")
        self.found = metric_names(objective.heads if self.rewarded else ())
        self.metrics = tuple(name for name in self.found if name != "finite")
        self.batches = self._pairs(self.records, self.recipe.batch.size)
        for name, records in self.held_out.items():  # an error now rather than at the first evaluation
            held_out = self._pairs(InOrder(records), 1)
            if next(held_out, None) is None:
                raise UserError(f"{name}: expected held-out pairs, got none: {dict(held_out.refused)} refused")

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
        kept = torch.stack([m for m, name in zip(metrics, self.found, strict=True) if name != "finite"])
        return Loss(loss * count, kept * count, values)

    def describe(self, part: PairPart, values: Tensor) -> str:
        """The first pair that went wrong."""
        at = int((~torch.isfinite(values)).nonzero()[0])
        return f"pair {part.first + at} of the batch, {self._show(part.pairs[at])}"

    def _show(self, pair: tuple[Encoded, Encoded]) -> str:
        return f"which begins {excerpt(self.tokenizer, pair[0].tokens)}"

    def counts(self) -> dict[str, int]:
        """Pairs that were left out: too long, identical, or without a wrong answer."""
        return {"refused": sum(self.batches.refused.values())}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of held-out pairs told right, by each reward and by mean log-probability; a tie or NaN is wrong."""
        return merge({name: self._evaluate(records) for name, records in self.held_out.items()})

    def _evaluate(self, records: Sequence[Record]) -> tuple[dict[str, int], int]:
        right: Counter[str] = Counter()
        count = 0
        for pairs in self._pairs(InOrder(records), self.micro):
            out = self.model.forward_packed(pack(pairs).to(self.model.device))
            for key, (chosen, rejected) in self._judgements(out):
                right[key] += int((chosen > rejected).sum())
            count += len(pairs)
        return right, count

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
