"""The arithmetic that a training step needs at least: what "useful" means in benchmarks and logs.

Counted are matrix products (2 operations a weight and row forward; backward as many again for the gradient of the rows,
and for that of the weights) and attention (2 products of query and key that see each other forward, 4 backward). Not
counted is what nobody need compute: the embedding's look-up, padding, a prompt's second copy, logits of rows without a
target, hidden pairs of query and key, gradients of what is frozen and that of the detached memory, recomputation; and
what is no product: norms, activations, softmax, the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dph_kernels import PackedLayout

if TYPE_CHECKING:
    from dph.config import ModelConfig
    from dph.packing import PackedBatch


@dataclass(frozen=True)
class Amounts:
    """What goes through the model in one update.

    Attributes:
        tokens: each distinct one once, no padding.
        seen: pairs of query and key that see each other, in one layer and head.
        detached: of these, the pairs whose key is memory.
        targets: rows that predict one.
        judged: rows that a reward is read from.
    """

    tokens: int = 0
    seen: int = 0
    detached: int = 0
    targets: int = 0
    judged: int = 0

    def __add__(self, other: Amounts) -> Amounts:
        """Both together."""
        return Amounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def of_layout(layout: PackedLayout, targets: int = 0, judged: int = 0) -> Amounts:
    """The amounts of a packed layout."""
    q0, q1, k0, k1, p0, p1, _ = layout.segments.unbind(1)
    n, own, prefix = q1 - q0, k1 - k0, p1 - p0
    seeing = torch.minimum(n, own)
    causal, full = seeing * own - seeing * (seeing - 1) // 2, n * prefix
    detached = causal[k0 < layout.memory].sum() + full[p0 < layout.memory].sum()
    return Amounts(int(n.sum()), int((causal + full).sum()), int(detached), targets, judged)


def of_pairs(batches: Iterable[PackedBatch]) -> Amounts:
    """The amounts of packed pairs, their prompts shared."""
    counts = ((b.layout, len(b.rows), int((b.reward_rows >= 0).sum())) for b in batches)
    return sum((of_layout(*count) for count in counts), Amounts())


def of_streams(streams: int, context: int, memory: int, targets: int) -> Amounts:
    """The amounts of a segment of every stream, their memories full."""
    layout = PackedLayout.with_memory([context] * streams, [memory] * streams, memory)
    return of_layout(layout, targets)


def backbone_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the up-projection and the blocks."""
    width, ffn = config.hidden_size, config.intermediate_size
    return config.embedding_size * width + config.num_hidden_layers * (4 * width**2 + 3 * width * ffn)


def head_weights(config: ModelConfig) -> int:
    """Weights that every target's row is multiplied with: the down-projection and the tied head."""
    return config.embedding_size * (config.hidden_size + config.vocab_size)


def pooler_weights(config: ModelConfig) -> tuple[int, int]:
    """Weights that every judged row is multiplied with: of the first layer, which the hidden state enters; all."""
    width, ffn = config.hidden_size, config.intermediate_size
    vectors = width * len(config.reward_heads)
    layers = {"swiglu": [2 * width * ffn, ffn * width], "identity": []}
    sizes = [*layers.get(config.reward_pooler.partition("_")[0], [width * width]), vectors]
    return sizes[0], sum(sizes)


def step_flops(config: ModelConfig, stage: str, amounts: Amounts, *, reference: bool = True) -> float:
    """Floating-point operations that one update of ``stage`` (pretrain, vocab, sft, align or head) needs.

    ``reference``: whether stage align computes the reference's log-probabilities in the step. Memory is of kind "kv".
    """
    blocks, head = backbone_weights(config) * amounts.tokens, head_weights(config) * amounts.targets
    first, pooler = pooler_weights(config)
    attention = 2 * config.hidden_size * config.num_hidden_layers  # of one product: all layers and heads
    forward = 2 * (blocks + head) + 2 * attention * amounts.seen
    backward_attention = attention * (4 * amounts.seen - 2 * amounts.detached)
    if stage == "head":  # the frozen backbone runs forward, without the language-model head
        frozen = 2 * blocks + 2 * attention * amounts.seen
        return frozen + 2 * amounts.judged * (3 * pooler - first)
    if stage == "vocab":  # of the weights only the embedding's, which is the tied head's, have a gradient
        tied = 2 * config.embedding_size * config.vocab_size * amounts.targets
        return forward + 2 * (blocks + head) + tied + backward_attention
    total = 3 * 2 * (blocks + head) + 2 * attention * amounts.seen + backward_attention
    if stage == "align":
        total += 3 * 2 * pooler * amounts.judged + (forward if reference else 0)
    return total
