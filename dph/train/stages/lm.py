"""Pretraining, vocabulary and SFT: parallel streams with Transformer-XL memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.batching import IGNORED, Streams, documents, padded, similar_lengths
from dph.data.formats import Record
from dph.data.sampler import Sampler
from dph.model.memory import Memory
from dph.train.distributed import slice_memory_state
from dph.train.stages.base import LossSum, MicroBatch, Stage, StepBatch, excerpt
from dph.train.stages.held_out import HeldOutStreams
from dph_kernels.transfer import to_device


@dataclass(frozen=True)
class StreamMicroBatch(MicroBatch):
    """Segments of B streams that share a memory.

    Attributes:
        memory: of these streams; None without Transformer-XL memory.
        tokens: [B, S] int64.
        targets: [B, S] int64 on the CPU; -100 is ignored.
    """

    memory: Memory | None
    tokens: Tensor
    targets: Tensor

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.tokens.numel()

    def describe_nonfinite(self, values: Tensor, tokenizer: Any) -> str:
        """Return the beginning of the first segment with a log-probability that is not finite."""
        streams = (self.targets != IGNORED).nonzero()[:, 0]
        first = int(streams[~torch.isfinite(values).cpu()][0])
        return f"a segment that begins {excerpt(tokenizer, self.tokens[first].tolist())}"


class LanguageModelStage(Stage):
    """Stages pretrain, vocab and sft: every step takes the next segment of every stream.

    Args:
        encode: from a record to tokens, for ``data.repeat_system`` false an ``Encoder`` of ``dph.data.formats``.
        records: training records.
        held_out: records for evaluation, by name.
        others: see :class:`Stage`.

    Attributes:
        batches: segments of all streams.
        memories: of this rank's streams, one for each micro-batch.
    """

    metrics = ("loss", "token_accuracy", "entropy")

    def __init__(
        self,
        *,
        encode: Callable[[Record], Encoded],
        records: Sampler,
        held_out: Mapping[str, Sequence[Record]],
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.encode = encode
        padding = self.tokenizer.pad_token_id
        if padding is None:
            padding = self.tokenizer.eos_token_id
        data = self.recipe.data
        joined = None if data.repeat_system else self.encode.joined
        self.batches = Streams(records, encode, self.recipe.batch.size, data.context, padding, joined)
        self.first_stream = self.world.rank * self.rank_size
        self.memories = self.new_memories(self.rank_size)
        self.held_out = HeldOutStreams(self, held_out)
        size, run, count = self.recipe.batch.size, records.run, records.size
        if count < size * run:
            taken = f"batch.size: {size} streams take {run} of {count:,} records at a time"
            self.notes += (f"{taken}, so that some read the same",)

    def document_segments(self, records: Sequence[Record]) -> Iterator[StreamMicroBatch]:
        """Yield the segments of all documents, in groups of similar lengths, for evaluation.

        Each document has a row of its own and sees no memory of another one: neither its neighbours nor the size of a
        batch change its loss.
        """
        data, padding = self.recipe.data, self.batches.pad_token
        for group in similar_lengths(documents(records, self.encode), self.micro_size):
            longest, memory = len(group[0][0]), None
            if longest > data.context and data.memory:  # from one segment of a document to the next
                memory = Memory(data.memory, data.memory_kind, self.memory_place)
            for start in range(0, longest, data.context):
                segment = slice(start, min(start + data.context, longest))
                tokens = padded([tokens[segment] for tokens, _ in group], padding)
                yield StreamMicroBatch(memory, tokens, padded([targets[segment] for _, targets in group], IGNORED))

    def new_memories(self, streams: int) -> list[Memory | None]:
        """Return empty memories for ``streams`` streams, one for each micro-batch."""
        data, memories = self.recipe.data, []
        for _ in range(0, streams, self.micro_size):
            memories.append(Memory(data.memory, data.memory_kind, self.memory_place) if data.memory else None)
        return memories

    def set_memory_place(self, place: str) -> None:
        """Keep the memory on the "device" or the "host"; before the first step."""
        self.memory_place = place
        self.memories = self.new_memories(self.rank_size)

    def trains_by_stage(self, name: str) -> bool:
        """Return whether ``name`` is trained: embedding and untied output in stage vocab, else what the recipe trains.

        Reward heads are not trained.
        """
        if self.recipe.stage == "vocab":
            return name.startswith(("backbone.embedding.", "lm_head."))
        return not name.startswith("heads.") and self.trains_backbone(name)

    def next_batch(self) -> StepBatch:
        """Return the next segment of every stream."""
        memory, remembered = self.memories[0], 0
        if memory is not None and memory.seen:
            remembered = min(memory.length, memory.seen[0])  # equal for all streams
        first_record = self.batches.records.position
        tokens, targets = next(self.batches)
        own = slice(self.first_stream, self.first_stream + self.rank_size)
        count = int((targets != IGNORED).sum())
        return StepBatch(
            micro_batches=self.micro_batches(self.memories, tokens[own], targets[own]),
            weight=max(1, count),
            tokens=tokens.numel(),
            records=f"segments after records {first_record} to {self.batches.records.position}",
            memory=remembered,
            targets=count,
        )

    def micro_batches(
        self, memories: Sequence[Memory | None], tokens: Tensor, targets: Tensor
    ) -> list[StreamMicroBatch]:
        """Return the micro-batches of streams ``tokens`` [B, S], one for each memory."""
        segments = zip(memories, tokens.split(self.micro_size), targets.split(self.micro_size), strict=True)
        return [StreamMicroBatch(*segment) for segment in segments]

    def prepare(self, micro_batch: StreamMicroBatch, step: int) -> StreamMicroBatch:
        """Return the micro-batch with its tokens on the device; the model moves the targets that count.

        At most one micro-batch keeps new rows for its memory on the device: the others' are written first.
        """
        self.commit_others(self.memories, micro_batch.memory)
        tokens = to_device(micro_batch.tokens, self.model.device)
        return StreamMicroBatch(micro_batch.memory, tokens, micro_batch.targets)

    @staticmethod
    def commit_others(memories: Sequence[Memory | None], current: Memory | None) -> None:
        """Write the new rows of all ``memories`` but the current one, whose backward passes are over."""
        for memory in memories:
            if memory is not None and memory is not current:
                memory.commit()

    def loss(self, inputs: StreamMicroBatch) -> LossSum:
        """Return the negative log-probability of the targets, and its sums of ``metrics``, entropy in nats."""
        logprobs, entropy, correct = self.model.stream_logprobs(
            inputs.tokens, inputs.targets, inputs.memory, statistics=True
        )
        total = -logprobs.sum()
        return LossSum(total, torch.stack([total.detach(), correct.sum(), entropy.sum()]), logprobs.detach())

    def state(self, undo_batch: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this rank's memories, named by their first streams, and the remaining tokens of all streams."""
        tensors = {}
        for number, memory in enumerate(self.memories):
            if memory is not None:
                first = self.first_stream + number * self.micro_size
                tensors |= {f"{first}/{key}": tensor for key, tensor in memory.state_dict().items()}
        return tensors, self.batches.undo() if undo_batch else self.batches.state_dict()

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from a state: the memories of all streams, divided in any way, of which this rank takes its own."""
        self.batches.load_state_dict(state)
        device = self.model.device if self.memory_place == "device" else "cpu"
        for number, memory in enumerate(self.memories):
            if memory is not None:
                own = slice_memory_state(tensors, self.first_stream + number * self.micro_size, self.micro_size)
                memory.load_state_dict({key: tensor.to(device) for key, tensor in own.items()})
