"""Pre-training, vocabulary and SFT: Transformer-XL streams."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dph import devices
from dph.data.batching import IGNORED, Streams
from dph.data.formats import Record
from dph.data.sampler import InOrder, Order
from dph.model.memory import Memory
from dph.train.budget import flops
from dph.train.budget import memory as footprint
from dph.train.shares import memory_state
from dph.train.stages.base import Loss, Material, Work, excerpt, merge
from dph_kernels.transfer import to_device


@dataclass(kw_only=True)
class StreamStage(Material):
    """Pre-training, vocabulary and SFT: parallel streams, each with its Transformer-XL memory."""

    metrics = ("loss", "token_accuracy", "entropy")
    needs_reference = False

    def __post_init__(self) -> None:
        """Set up all streams, and memories of this process's, one for each part.

        UserError for an uneven share, or where the host has no room.
        """
        self.check_share()
        footprint.check_update(self)
        self.batches = self._streams(self.records, self.recipe.batch.size)
        size, run, count = self.recipe.batch.size, self.records.run, self.records.size
        if count < size * run:
            each = f"batch.size: {size} streams take {run} of {count:,} records at a time"
            self.notes += (f"{each}, so that some read the same",)
        if footprint.remembers(self.recipe):
            self.place = self._choose_place()
        self.first = self.world.rank * self.share  # of this process's streams
        self.memories = [self._memory() for _ in range(self.share // self.micro)]

    def _choose_place(self) -> str:
        device = torch.device(devices.choose(self.recipe.device))
        place = footprint.choose_place(self, device)
        if place == "host" or device.type != "cpu":
            self.notes += (footprint.explain(self, device, place),)
        return place

    def _streams(self, records: Order, size: int) -> Streams:
        filler = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return Streams(records, self.encode, size, self.recipe.data.context, filler)

    def _memory(self) -> Memory | None:
        data = self.recipe.data
        return Memory(data.memory, data.memory_kind, self.place) if data.memory else None

    @property
    def judged(self) -> tuple[str, ...]:
        """The figures of one held-out source."""
        return self.metrics

    def trains(self, name: str) -> bool:
        """The embedding alone in stage vocab, else all but the reward heads."""
        return "embedding" in name if self.recipe.stage == "vocab" else not name.startswith("heads.")

    def next(self) -> Work:
        """The next segment of every stream."""
        first = self.position()
        remembered = self.remembered
        tokens, targets = next(self.batches)
        own = (rows[self.first : self.first + self.share].split(self.micro) for rows in (tokens, targets))
        parts = list(zip(self.memories, *own, strict=True))
        taken = f"segments after records {first} to {self.position()}"
        count = int((targets != IGNORED).sum())
        amounts = flops.of_streams(*tokens.shape, remembered, count)
        needed = flops.step_flops(self.model.config, self.recipe.stage, amounts)
        return Work(parts, max(1, count), tokens.numel(), taken, needed)

    @property
    def remembered(self) -> int:
        """Tokens that each stream's memory holds: all of them see as many."""
        memory = self.memories[0]
        return 0 if memory is None or not memory.seen else min(memory.length, memory.seen[0])

    def given(self, part: tuple[Memory | None, Tensor, Tensor], step: int) -> tuple[Memory | None, Tensor, Tensor]:
        """The part with its tokens on the device; of the targets the model takes up those that count."""
        memory, tokens, targets = part
        self._commit(self.memories, memory)
        return memory, to_device(tokens, self.model.device), targets

    def loss(self, given: tuple[Memory | None, Tensor, Tensor]) -> Loss:
        """Minus the log-probabilities of the targets; how many were the most probable token; entropy in nats."""
        memory, tokens, targets = given
        logprobs, entropy, right = self.model.stream_logprobs(tokens, targets, memory, statistics=True)
        total = -logprobs.sum()
        return Loss(total, torch.stack([total.detach(), right.sum(), entropy.sum()]), logprobs.detach())

    def rows(self, part: tuple[Memory | None, Tensor, Tensor]) -> int:
        """The tokens of its segments."""
        return part[1].numel()

    @staticmethod
    def _commit(memories: Sequence[Memory | None], but: Memory | None) -> None:
        """Let no part's new rows wait on the device while another one computes; its backward pass is over."""
        for memory in memories:
            if memory is not None and memory is not but:
                memory.commit()

    def describe(self, part: tuple[Memory | None, Tensor, Tensor], values: Tensor) -> str:
        """The first stream that went wrong."""
        _, tokens, targets = part
        rows = (targets != IGNORED).nonzero()[:, 0]
        row = int(rows[~torch.isfinite(values).cpu()][0])
        return f"a segment that begins {excerpt(self.tokenizer, tokens[row].tolist())}"

    def counts(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def left_out(self) -> dict[str, str]:
        """Nothing: streams take every record."""
        return {}

    def forget(self) -> None:
        """Every stream goes on without what it has read."""
        for memory in self.memories:
            if memory is not None:
                memory.reset()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """What ``metrics`` names, as means over the targets of each held-out source, and of all."""
        return merge({name: self._evaluate(records) for name, records in self.held_out.items()})

    def _evaluate(self, records: Sequence[Record]) -> tuple[dict[str, float], int]:
        """Sums, and targets; over as many streams as in training, so that the cut in parts changes nothing."""
        streams = min(self.recipe.batch.size, len(records))
        memories = [self._memory() for _ in range(0, streams, self.micro)]
        sums, count = torch.zeros(len(self.metrics), dtype=torch.float64, device=self.model.device), 0
        for tokens, targets in self._streams(InOrder(records), streams):
            for part in zip(memories, tokens.split(self.micro), targets.split(self.micro), strict=True):
                self._commit(memories, part[0])
                loss = self.loss(self.given(part, 0))
                sums, count = sums + loss.sums, count + len(loss.values)
        return dict(zip(self.metrics, sums.tolist(), strict=True)), count

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This process's memories, each by its first stream, and what all streams have left over."""
        kept = {first: memory.state_dict() for first, memory in self._by_stream()}
        tensors = {f"{first}/{key}": t for first, state in kept.items() for key, t in state.items()}
        return tensors, self.batches.state_dict()

    def _by_stream(self) -> Iterator[tuple[int, Memory]]:
        """The number of a memory's first stream, and the memory."""
        for i, memory in enumerate(self.memories):
            if memory is not None:
                yield self.first + i * self.micro, memory

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take both up again: of the memories of all streams, however they were cut, this process's."""
        self.batches.load_state_dict(state)
        device = self.model.device if self.place == "device" else "cpu"
        for first, memory in self._by_stream():
            own = memory_state(tensors, first, self.micro)
            memory.load_state_dict({key: t.to(device) for key, t in own.items()})
