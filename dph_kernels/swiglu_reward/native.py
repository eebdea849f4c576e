"""Pooler and reward heads by csrc/cpu/swiglu_reward.cpp: fp32, or bf16 with fp32 arithmetic."""

from collections.abc import Sequence
from typing import Any

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
    arguments = _arguments(hidden, reward, w1, w2, row_ids, projected, pooled, dropout, input_dropout, seed)
    arguments.b1, arguments.b2 = _matrix(b1, kernels.RewardMatrix), _matrix(b2, kernels.RewardMatrix)
    arguments.rewards = rewards.data_ptr()
    kernels.swiglu_reward_forward_cpu(arguments, native.threads())
    return rewards, projected, pooled


def backward(
    grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None, row_ids: Tensor | None,
    projected: Tensor, pooled: Tensor, dropout: float, input_dropout: float, seed: int, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same results as ``reference.backward``."""
    kernels = native.module()
    like = hidden, reward, w1, None if w1 is None else w1[:, 0], w2, None if w2 is None else w2[:, 0]
    grads = []
    for x, need in zip(like, needs, strict=True):
        grads.append(hidden.new_empty(x.shape if need else 0))
    row_ids = None if row_ids is None else row_ids.contiguous()
    arguments = _arguments(hidden, reward, w1, w2, row_ids, projected, pooled, dropout, input_dropout, seed)
    arguments.grad = grad.data_ptr()
    arguments.grad_row, arguments.grad_column = grad.stride()
    for name, value, need in zip(("hidden", "reward", "w1", "b1", "w2", "b2"), grads, needs, strict=True):
        if need:
            setattr(arguments, f"d_{name}", value.data_ptr())
    kernels.swiglu_reward_backward_cpu(arguments, native.threads())
    return tuple(grads)


def _arguments(
    hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None, row_ids: Tensor | None,
    projected: Tensor, pooled: Tensor, dropout: float, input_dropout: float, seed: int,
) -> Any:  # fmt: skip
    """Return the argument of both kernels, which holds addresses: the tensors have to outlive it."""
    kernels = native.module()
    matrix = kernels.RewardMatrix
    dropouts = []
    for fraction, stream in ((input_dropout, philox.INPUT), (dropout, philox.POOLED)):
        threshold = philox.threshold(fraction) if fraction else 0  # keeps every column
        dropouts.append(kernels.RewardDropout(threshold, stream, 1 - fraction))
    return kernels.SwigluRewardArguments(
        rows=hidden.shape[0],
        columns=hidden.shape[1],
        width=0 if w1 is None else w1.shape[0] // 2,
        heads=reward.shape[0],
        bf16=hidden.dtype == torch.bfloat16,
        hidden=_matrix(hidden, matrix),
        reward=_matrix(reward, matrix),
        w1=_matrix(w1, matrix),
        w2=_matrix(w2, matrix),
        row_ids=native.pointer(row_ids),
        seed=seed % 2**64,
        input=dropouts[0],
        pooled=dropouts[1],
        kept_projected=projected.data_ptr(),
        kept_pooled=pooled.data_ptr(),
    )


def _matrix(x: Tensor | None, matrix: type) -> Any:
    """Return the address and strides of a matrix, of a vector as its only column, or of None."""
    return matrix() if x is None else matrix(x.data_ptr(), *x.stride())
