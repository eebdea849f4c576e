"""Alignment and head training: preference pairs, packed."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.batching import PairBatches
from dph.data.formats import Record
from dph.data.packing import PackedBatch, fill, pack, packed_length
from dph.data.sampler import InOrder, Order, draw
from dph.errors import UserError
from dph.train.budget import flops
from dph.train.distributed import computes_in, whole
from dph.train.precompute.pairs import PairCache, directory
from dph.train.shares import deal
from dph.train.stages.base import Loss, Material, Work, excerpt, merge
from dph_kernels import preference_loss
from dph_kernels.preference_loss import metric_names
from dph_kernels.transfer import to_device

# What a reason of ``PairBatches`` begins with, and the key of the recipe that changes whom it refuses.
KEYS = {"longer than": "data.context", "more than": "batch.tokens"}

Part = TypeVar("Part", bound="PairPart")  # typing.Self, which Python 3.10 lacks


@dataclass(frozen=True)
class PairPart:
    """Pairs of one part.

    Attributes:
        places: of the pairs in the whole work.
        sizes: of its bins: how many pairs go through the backbone together.
    """

    pairs: list[tuple[Encoded, Encoded]]
    places: list[int]
    sizes: list[int]

    @classmethod
    def of(cls: type[Part], pairs: Sequence[tuple[Encoded, Encoded]], bins: Sequence[list[int]]) -> Part:
        """Of an update's ``pairs`` those whose places are in ``bins``."""
        places = list(itertools.chain.from_iterable(bins))
        return cls([pairs[place] for place in places], places, [len(each) for each in bins])

    @property
    def finished(self) -> bool:
        """Whether every answer has a reward: none was cut off."""
        return all(side.reward_position is not None for pair in self.pairs for side in pair)

    @cached_property
    def packed(self) -> PackedBatch:
        """Chosen and rejected in turn as the answers; made when asked for, which cached states need not."""
        return pack(self.pairs)

    def bins(self: Part) -> Iterator[Part]:
        """Each bin as a part: itself where it is the only one."""
        if len(self.sizes) == 1:
            yield self
            return
        ends = itertools.accumulate(self.sizes)
        for size, end in zip(self.sizes, ends, strict=True):
            own = slice(end - size, end)
            yield type(self)(self.pairs[own], self.places[own], [size])


class Given(NamedTuple):
    """What the loss of N pairs is computed from, on the model's device.

    Attributes:
        answers: [2N] int64 keys of their dropout, chosen and rejected in turn.
        frozen: what the frozen model says of them, if it is asked: reference log-probabilities [2N] fp32 or, in stage
            head, states [2N, C].
        packed: what goes through the model that trains; None in stage head, where only its heads do.
    """

    answers: Tensor
    frozen: Tensor | None
    packed: PackedBatch | None


@dataclass(kw_only=True)
class PairStage(Material):
    """Alignment and head training: preference pairs, their prompts shared."""

    part: ClassVar[type[PairPart]] = PairPart
    length: ClassVar[Callable[[tuple[Encoded, Encoded]], int]] = staticmethod(packed_length)  # of a pair, in tokens

    def __post_init__(self) -> None:
        """Set up the batches. UserError for a missing head, no loss, no held-out pair that fits, an uneven share."""
        self.check_share()
        objective = self.recipe.objective
        self.rewarded = objective.dph_weight > 0
        self.needs_reference = self.recipe.stage == "align" and objective.dpo_weight > 0
        if not (self.rewarded or self.needs_reference):
            raise UserError("objective: expected a weight above 0 for a part that the stage trains, got none")
        there = self.model.head_names
        if not objective.heads or not set(objective.heads) <= set(there):
            got = ", ".join(name for name in objective.heads if name not in there) or "none"
            raise UserError(f"objective.heads: expected at least one name, of {', '.join(there)}, got {got}")
        self.cached = self._cached()
        self.found = metric_names(objective.heads if self.rewarded else ())
        self.metrics = tuple(name for name in self.found if name != "finite")
        self.batches = self._pairs(self.records, self.recipe.batch.size)
        self.dropout_seed = draw(2**31, self.recipe.seed, "dropout")
        self.told: dict[str, int] = {}  # held-out pairs of each source that a frozen backbone's log-probabilities tell
        self.judged_of: dict[str, PairBatches] = {}  # the batches of each source that the last evaluation took
        for name, records in self.held_out.items():  # an error now rather than at the first evaluation
            held_out = self._pairs(InOrder(records), 1)
            if next(held_out, None) is None:
                raise UserError(f"{name}: expected held-out pairs, got none: {_left_out(held_out)}")

    def _cached(self) -> str | None:
        """What is kept on disk of what a frozen model says: "reference" log-probabilities, "states" or nothing."""
        if self.needs_reference and self.recipe.objective.reference == "cache":
            return "reference"
        return "states" if self.recipe.stage == "head" and self.recipe.data.cache_states else None

    @cached_property
    def cache(self) -> PairCache:
        """Made when first asked for: by then the weights, which it is named after, have the precision of the run."""
        config, width, model = self.model.config, 2, self.reference
        if self.cached == "states":
            model, width = self.model.backbone, 2 * config.hidden_size
        named = () if model is None else model.named_parameters()
        weights = {name: self._as_used(weight) for name, weight in named if not name.startswith("heads.")}
        where, agree = directory(self.recipe), self.world.any
        return PairCache(where, self.cached, weights, config, self.tokenizer, width, agree)

    def _as_used(self, weight: Tensor) -> Tensor:
        """Whole and as the model computes with it, of a weight that may lie in shards."""
        return weight if self.world.size == 1 else whole(weight, computes_in(self.model)).cpu()

    def _pairs(self, records: Order, size: int) -> PairBatches:
        return PairBatches(records, self.encode, size, self.recipe.data.context, self.recipe.batch.tokens)

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
        """The next pairs, of which this process's are cut into bins."""
        first = self.position()
        pairs = next(self.batches)
        for pair in pairs if self.rewarded else []:
            if any(side.reward_position is None for side in pair):
                raise UserError(f"pairs: expected finished answers, got one that was cut off: {self._show(pair)}")
        sizes = [self.length(pair) for pair in pairs]
        share = deal(self._places(sizes), sizes, self.world.rank, self.world.size)
        # In stage head one part of all bins: what the backbone says of them is small, and always as much.
        bins = [share] if self.recipe.stage == "head" else [[places] for places in share]
        taken = f"records {first} to {self.position() - 1}"
        return Work([self.part.of(pairs, of) for of in bins], len(pairs), sum(sizes), taken, self._flops(pairs))

    def _flops(self, pairs: Sequence[tuple[Encoded, Encoded]]) -> float:
        """By what is not cached; of cached states, pooler and heads alone."""
        amounts = flops.Amounts(judged=2 * len(pairs)) if self.cached == "states" else flops.of_pairs(pairs)
        reference = self.needs_reference and self.cached is None
        return flops.step_flops(self.model.config, self.recipe.stage, amounts, reference=reference)

    def _places(self, sizes: Sequence[int]) -> list[list[int]]:
        """Which pairs, of so many tokens each, go through the model together: ``batch.micro`` of them, or what
        ``batch.tokens`` has room for.
        """
        if self.recipe.batch.tokens is not None:
            return fill(sizes, self.recipe.batch.tokens)
        everyone = list(range(len(sizes)))
        return [everyone[i : i + self.micro] for i in range(0, len(sizes), self.micro)]

    def given(self, part: PairPart, step: int) -> Given:
        """A part's tensors; an answer's key is of the step and of its place in the update, whatever its part."""
        first = 2 * self.recipe.batch.size * step
        answers = torch.tensor([first + 2 * place + side for place in part.places for side in range(2)])
        answers = to_device(answers, self.model.device)
        if self.recipe.stage == "head":
            return Given(answers, self.frozen(part), None)
        packed = (part.packed if self.needs_reference else _judged_only(part.packed)).to(self.model.device)
        return Given(answers, self.frozen(part, packed) if self.needs_reference else None, packed)

    def loss(self, given: Given) -> Loss:
        """The joint objective."""
        dropout = {"dropout_seed": self.dropout_seed, "answer_ids": given.answers}
        if given.packed is None:
            return self._objective(self.model.rewards_of(given.frozen, **dropout), None, None)
        out = self.model.forward_packed(given.packed, **dropout)
        return self._objective(out.rewards, out.logprobs, given.frozen)

    def rows(self, part: PairPart) -> int:
        """The tokens of its largest bin."""
        return max(sum(map(self.length, each.pairs)) for each in part.bins())

    @torch.no_grad()
    def frozen(self, part: PairPart, packed: PackedBatch | None = None) -> Tensor:
        """What the frozen model says of a part: reference log-probabilities [2N] or, in stage head, states [2N, C].

        ``packed`` is that of the only bin on the model's device, where it is there already.
        """
        bins = list(part.bins())
        if self.cached is None:
            return torch.cat([self._frozen(each, packed) for each in bins])
        rows = torch.cat([self.cache.rows(each.pairs, partial(self._frozen, each, packed)) for each in bins])
        if self.cached == "reference":
            return to_device(rows.flatten(), self.model.device)
        return to_device(rows.view(2 * len(rows), -1), self.model.device).to(self.model.dtype)

    def _frozen(self, part: PairPart, packed: PackedBatch | None) -> Tensor:
        packed = part.packed.to(self.model.device) if packed is None else packed
        if self.recipe.stage == "head":
            return self.model.reward_states(packed)
        return self.reference.forward_packed(packed).logprobs

    def _objective(self, rewards: dict[str, Tensor], logprobs: Tensor | None, reference: Tensor | None) -> Loss:
        objective = self.recipe.objective
        inputs: list[Tensor | None] = [None] * 6
        if self.rewarded:
            inputs[:2] = _sides(torch.stack([rewards[name] for name in objective.heads], 1))
        if reference is not None:
            inputs[2:] = *_sides(logprobs), *_sides(reference)
        count = next(len(side) for side in inputs if side is not None)
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
        return f"pair {part.places[at]} of the batch, {self._show(part.pairs[at])}"

    def _show(self, pair: tuple[Encoded, Encoded]) -> str:
        return f"which begins {excerpt(self.tokenizer, pair[0].tokens)}"

    def counts(self) -> dict[str, int]:
        """Pairs that were left out: too long, identical, or without a wrong answer."""
        return {"refused": sum(self.batches.refused.values())}

    def left_out(self) -> dict[str, str]:
        """Of the training records, and of held-out ones, how many gave no pair, and why."""
        found = {"records": self.batches} | {f"records of {name}": of for name, of in self.judged_of.items()}
        return {name: _left_out(of, name) for name, of in found.items() if of.refused}

    def forget(self) -> None:
        """Nothing: a pair knows of no other."""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of held-out pairs told right, by each reward and by mean log-probability; a tie or NaN is wrong."""
        return merge({name: self._evaluate(name, records) for name, records in self.held_out.items()})

    def _evaluate(self, name: str, records: Sequence[Record]) -> tuple[dict[str, int], int]:
        """How many pairs are told right, by each figure, and how many there are.

        Where states are cached, what the frozen backbone says is found once: by log-probability in the first
        evaluation, and the states in the second, which rewards are read from then on.
        """
        told = self.told.get(name)
        figures = self.judged if told is None else self.judged[:-1]  # all but that of log-probabilities
        right: Counter[str] = Counter()
        count, finished = 0, True
        for part in self._held_out_parts(name, records):
            if told is not None:
                found = self._rewards(self.model.rewards_of(self.frozen(part)))
            else:
                out = self.model.forward_packed(part.packed.to(self.model.device))
                found = [*self._rewards(out.rewards), out.mean_logprobs]
            for key, (chosen, rejected) in zip(figures, map(_sides, found), strict=True):
                right[key] += int((chosen > rejected).sum())
            count += len(part.pairs)
            finished &= part.finished
        if told is not None:
            right["logprob_accuracy"] = told
        elif self.cached == "states" and finished:
            self.told[name] = right["logprob_accuracy"]
        return {key: right[key] for key in self.judged}, count

    def _held_out_parts(self, name: str, records: Sequence[Record]) -> Iterator[PairPart]:
        self.judged_of[name] = self._pairs(InOrder(records), self.micro)
        for pairs in self.judged_of[name]:
            for places in self._places([self.length(pair) for pair in pairs]):
                yield self.part.of(pairs, [places])

    @property
    def judged(self) -> tuple[str, ...]:
        """The figures of one held-out source: of each reward, and of the mean log-probability."""
        heads = self.recipe.objective.heads if self.rewarded else ()
        names = (f"_{head}" if len(heads) > 1 else "" for head in heads)
        return (*(f"reward_accuracy{name}" for name in names), "logprob_accuracy")

    def _rewards(self, rewards: dict[str, Tensor]) -> list[Tensor]:
        """Of the heads that are trained."""
        return [rewards[head] for head in self.recipe.objective.heads] if self.rewarded else []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The place in the data. What the cache has gathered goes to the disk: a checkpoint follows.

        Of several processes each then sees what all have gathered: in the next epoch a pair may be another's.
        """
        with self.world.together():
            self.flush()
        if self.world.size > 1 and self._caches:
            self.cache.store.look()
        return {}, self.batches.state_dict()

    def flush(self) -> None:
        """Write what the cache has gathered."""
        if self._caches:
            self.cache.store.flush()

    @property
    def _caches(self) -> bool:
        """Whether the cache has been asked for."""
        return "cache" in self.__dict__

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Stand there again."""
        self.batches.load_state_dict(state)


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """[2N, ...] -> chosen and rejected [N, ...]."""
    return values[0::2], values[1::2]


def _left_out(batches: PairBatches, name: str = "records") -> str:
    """How many of the records taken were left out, for each reason, with the key of the recipe where there is one."""
    reasons = []
    for reason, count in batches.refused.most_common():
        key = next((f" ({key})" for start, key in KEYS.items() if reason.startswith(start)), "")
        reasons.append(f"{count:,} {reason}{key}")
    taken = batches.records.state_dict()["position"]
    return f"{batches.refused.total():,} of {taken:,} {name} were left out: {', '.join(reasons)}"


def _judged_only(packed: PackedBatch) -> PackedBatch:
    """Without the targets: no log-probability is computed."""
    names = ("rows", "targets", "answers", "trained", "scored")
    return dataclasses.replace(packed, **{name: getattr(packed, name)[:0] for name in names})
