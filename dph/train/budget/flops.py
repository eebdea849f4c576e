"""The arithmetic that a training step needs at least: what "useful" means in logs and benchmarks.

Counted are matrix products (2 operations a weight and row forward; backward as many again for the gradient of the rows,
and for that of the weights) and attention (2 products of query and key that see each other forward, 4 backward). Not
counted is what nobody need compute: the embedding's look-up, padding, a prompt's second copy, logits of rows without a
target, hidden pairs of query and key, gradients of what is frozen and that of the detached memory, recomputation; and
what is no product: norms, activations, softmax, the optimiser.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.model.config import ModelConfig


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


def of_pairs(pairs: Sequence[Sequence[Encoded]]) -> Amounts:
    """The amounts of pairs, their prompts shared; how they are packed changes nothing."""
    sides = [side for pair in pairs for side in pair]
    targets = sum(sum(map(operator.or_, side.loss_mask, side.score_mask)) for side in sides)
    judged = sum(side.reward_position is not None for side in sides)
    tokens = seen = 0
    for pair in pairs:
        again, shared = len(pair) - 1, common_prefix([side.tokens for side in pair])
        lengths = [len(side.tokens) for side in pair]
        tokens += sum(lengths) - again * shared
        seen += sum(map(_causal, lengths)) - again * _causal(shared)
    return Amounts(tokens, seen, 0, targets, judged)


def _causal(tokens: int) -> int:
    """Pairs of query and key in a sequence, each of whose tokens sees itself and those before it."""
    return tokens * (tokens + 1) // 2


def of_streams(streams: int, context: int, memory: int, targets: int) -> Amounts:
    """The amounts of a segment of every stream, each of which remembers ``memory`` tokens."""
    return replace(_of_streams(streams, context, memory), targets=targets)


@functools.cache
def _of_streams(streams: int, context: int, memory: int) -> Amounts:
    return of_layout(PackedLayout.with_memory([context] * streams, [memory] * streams, memory))


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


PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A10": 125e12}
"""Dense bf16 operations per second of GPUs, from their makers' data sheets, by a part of their names."""


def peak(device: torch.device) -> float | None:
    """What a device can do in bf16 by its data sheet, or None where that is not known here."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((rate for name, rate in PEAKS.items() if name in words), None)


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
