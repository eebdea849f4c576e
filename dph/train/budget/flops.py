"""Arithmetic that a training step needs at least: the "useful" operations in logs and benchmarks.

Counted are matrix products (2 operations per weight and row in the forward pass; in the backward pass as many for the
gradient of the rows, and again for that of the weights) and attention (2 products per visible pair of query and key in
the forward pass, 4 in the backward pass).

Not counted: the embedding's look-up, padding, second copies of a prompt, logits of rows without a target, invisible
pairs of query and key, gradients of frozen weights and of the detached memory, recomputation; and everything that is no
product: norms, activations, softmax, the optimizer.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

import torch

from dph.train.adapters import count_adapted
from dph.train.stages.base import Stage, StepBatch
from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.model.config import ModelConfig


@dataclass(frozen=True)
class Workload:
    """Counts, on which the arithmetic of a step depends.

    Attributes:
        tokens: distinct tokens that go through the model, without padding.
        visible: visible pairs of query and key, in one layer and head.
        detached: visible pairs whose key is in the memory.
        targets: rows that predict a target.
        judged: rows that a reward is computed from.
    """

    tokens: int = 0
    visible: int = 0
    detached: int = 0
    targets: int = 0
    judged: int = 0

    def __add__(self, other: Workload) -> Workload:
        """Return the sum of two workloads."""
        return Workload(*map(operator.add, astuple(self), astuple(other)))


def layout_workload(layout: PackedLayout, targets: int = 0, judged: int = 0) -> Workload:
    """Return the workload of a packed layout."""
    q0, q1, k0, k1, p0, p1, _ = layout.segments.unbind(1)
    queries, keys, prefix = q1 - q0, k1 - k0, p1 - p0
    causal_queries = torch.minimum(queries, keys)
    causal = causal_queries * keys - causal_queries * (causal_queries - 1) // 2
    full = queries * prefix
    detached = causal[k0 < layout.memory].sum() + full[p0 < layout.memory].sum()
    return Workload(int(queries.sum()), int((causal + full).sum()), int(detached), targets, judged)


def pairs_workload(pairs: Sequence[Sequence[Encoded]]) -> Workload:
    """Return the workload of pairs with shared prompts, which does not depend on their packing."""
    tokens = visible = targets = judged = 0
    for pair in pairs:
        shared = common_prefix([side.tokens for side in pair])
        copies = len(pair) - 1
        tokens -= copies * shared
        visible -= copies * _causal_pairs(shared)
        for side in pair:
            length = len(side.tokens)
            tokens += length
            visible += _causal_pairs(length)
            targets += sum(map(operator.or_, side.loss_mask, side.score_mask))
            judged += side.reward_position is not None
    return Workload(tokens, visible, 0, targets, judged)


def _causal_pairs(tokens: int) -> int:
    """Return the visible pairs of query and key in a sequence under a causal mask."""
    return tokens * (tokens + 1) // 2


def streams_workload(streams: int, context: int, memory: int, targets: int) -> Workload:
    """Return the workload of a segment of every stream, each with ``memory`` tokens of memory."""
    return replace(_segments_workload(streams, context, memory), targets=targets)


@functools.cache
def _segments_workload(streams: int, context: int, memory: int) -> Workload:
    return layout_workload(PackedLayout.with_memory([context] * streams, [memory] * streams, memory))


def batch_flops(stage: Stage, batch: StepBatch) -> float:
    """Return the operations that the step of a batch needs, without those that cached outputs replace."""
    recipe, config, reference = stage.recipe, stage.model.config, stage.needs_reference
    if recipe.kind != "preference":
        workload = streams_workload(recipe.batch.size, recipe.data.context, batch.memory, batch.targets)
    elif stage.frozen.cached and recipe.stage == "head":
        workload = Workload(judged=sum(map(len, batch.pairs)))  # cached states: pooler and heads alone
    else:
        workload = pairs_workload(batch.pairs)
        reference = reference and not stage.frozen.cached
    needed = step_flops(config, recipe.stage, workload, reference=reference)
    if recipe.lora.rank is None and recipe.train.last_layers is None and not stage.frozen_blocks:
        return needed
    return needed - _spared_flops(stage, workload, reference and stage.shares_states)


def _spared_flops(stage: Stage, workload: Workload, shared: bool) -> float:
    """Return the operations of training all of the backbone that the part which the recipe trains does not need.

    Parameters above the frozen blocks that only a pattern freezes (``recipe.train.frozen``) count as trained.

    Args:
        stage: stage pretrain, sft or align.
        workload: of a step.
        shared: whether the reference takes the frozen blocks' results from the trained model.
    """
    recipe, config = stage.recipe, stage.model.config
    blocks = config.num_hidden_layers * config.block_weights * workload.tokens
    others = config.projection_weights * workload.tokens + head_weights(config) * workload.targets
    backward = 2 * config.num_attention_heads * config.head_dim * (4 * workload.visible - 2 * workload.detached)
    frozen = stage.frozen_blocks / config.num_hidden_layers
    # No gradient of frozen weights, and below the trained part none of rows and of attention.
    spared = 2 * config.projection_weights * workload.tokens + frozen * 4 * blocks + stage.frozen_blocks * backward
    if recipe.lora.rank is not None or recipe.train.last_layers is not None:
        spared += 2 * others
    if shared:
        attention = 2 * config.num_attention_heads * config.head_dim
        spared += 2 * frozen * blocks + stage.frozen_blocks * 2 * attention * workload.visible
    if recipe.lora.rank is not None:
        spared += 2 * (1 - frozen) * blocks - 6 * count_adapted(stage.model, recipe) * workload.tokens
    return spared


def backbone_weights(config: ModelConfig) -> int:
    """Return the weights that every token is multiplied with: the up-projection and the blocks."""
    return config.projection_weights + config.num_hidden_layers * config.block_weights


def head_weights(config: ModelConfig) -> int:
    """Return the weights that every target's row is multiplied with: down-projection and language-model head."""
    return config.projection_weights + config.embedding_size * config.vocab_size


def pooler_weights(config: ModelConfig) -> tuple[int, int]:
    """Return the weights that every judged row is multiplied with: of the pooler's first layer, and in all."""
    width, ffn = config.hidden_size, config.intermediate_size
    rewards = width * len(config.reward_heads)
    kind = config.reward_pooler.partition("_")[0]
    if kind == "swiglu":
        return 2 * width * ffn, 3 * width * ffn + rewards
    if kind == "identity":
        return rewards, rewards
    return width * width, width * width + rewards


# Dense bf16 operations per second of GPUs, from the makers' data sheets, by a word of the device's name.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A10": 125e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 operations per second of a device's data sheet, or None for other devices."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((rate for name, rate in PEAKS.items() if name in words), None)


def step_flops(config: ModelConfig, stage: str, workload: Workload, *, reference: bool = True) -> float:
    """Return the floating-point operations that a step of ``stage`` (pretrain, vocab, sft, align or head) needs.

    Args:
        reference: whether stage align computes the reference's log-probabilities in the step.

    The memory is of kind "kv".
    """
    blocks, head = backbone_weights(config) * workload.tokens, head_weights(config) * workload.targets
    first_layer, pooler = pooler_weights(config)
    attention = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # of one product, all heads
    forward = 2 * (blocks + head) + 2 * attention * workload.visible
    backward_attention = attention * (4 * workload.visible - 2 * workload.detached)
    if stage == "head":  # only the forward pass of the frozen backbone, without the language-model head
        frozen = 2 * blocks + 2 * attention * workload.visible
        return frozen + 2 * workload.judged * (3 * pooler - first_layer)
    if stage == "vocab":  # of the weights only the embedding and the language-model head have gradients
        table = 2 * config.embedding_size * config.vocab_size * workload.targets
        return forward + 2 * (blocks + head) + table + backward_attention
    total = 3 * 2 * (blocks + head) + 2 * attention * workload.visible + backward_attention
    if stage == "align":
        total += 3 * 2 * pooler * workload.judged + (forward if reference else 0)
    return total
