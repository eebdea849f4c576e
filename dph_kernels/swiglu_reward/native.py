"""Pooler and reward heads by csrc/cpu/swiglu_reward.cpp: fp32, or bf16 with fp32 arithmetic."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native, philox

LANES = 16  # answers are padded to a multiple of it: REWARD_LANES of csrc/swiglu_reward.h


def kept_shapes(rows: int, columns: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of [x | g] and the pooled state as ``forward`` keeps them: [features, answers], padded."""
    lanes = -(-rows // LANES) * LANES
    return (2 * width, lanes), (columns, lanes)


def forward(
    hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    row_ids: Tensor | None, dropout: float, input_dropout: float, seed: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.forward``, the last two in the kernels' layout."""
    kernels = native.module()
    rows, width = hidden.shape[0], 0 if w1 is None else w1.shape[0] // 2
    projected, pooled = kept_shapes(rows, hidden.shape[1], width)
    rewards = hidden.new_empty(rows, reward.shape[0], dtype=torch.float32)
    projected = rewards.new_empty(projected if save and w1 is not None else 0)
    pooled = rewards.new_empty(pooled if save and w2 is not None else 0)
    row_ids = None if row_ids is None else row_ids.contiguous()
    weights, dropouts = (w1, b1, w2, b2), _dropouts(input_dropout, dropout)
    results = rewards, projected, pooled
    kernels.swiglu_reward_forward_cpu(
        hidden, reward, *weights, row_ids, dropouts, seed % 2**64, *results, native.threads()
    )
    return rewards, projected, pooled


def backward(
    grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None, row_ids: Tensor | None,
    projected: Tensor, pooled: Tensor, dropout: float, input_dropout: float, seed: int, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same results as ``reference.backward``."""
    kernels = native.module()
    shapes = [hidden.shape, reward.shape]
    for weight in (w1, w2):
        shapes += [(0,), (0,)] if weight is None else [weight.shape, weight.shape[:1]]
    grads = []
    for shape, need in zip(shapes, needs, strict=True):
        grads.append(hidden.new_empty(shape if need else 0))
    row_ids = None if row_ids is None else row_ids.contiguous()
    inputs, saved = (grad, hidden, reward, w1, w2, row_ids), (projected, pooled)
    masks = _dropouts(input_dropout, dropout), seed % 2**64
    kernels.swiglu_reward_backward_cpu(*inputs, *masks, *saved, tuple(grads), native.threads())
    return tuple(grads)


@functools.lru_cache(maxsize=64)
def _dropouts(input_dropout: float, dropout: float) -> tuple[tuple[int, int, float], tuple[int, int, float]]:
    """Return threshold, stream and kept fraction of both dropouts; a threshold of 0 keeps every column."""
    dropouts = []
    for fraction, stream in ((input_dropout, philox.INPUT), (dropout, philox.POOLED)):
        threshold = philox.threshold(fraction) if fraction else 0
        dropouts.append((threshold, stream, 1 - fraction))
    return tuple(dropouts)
