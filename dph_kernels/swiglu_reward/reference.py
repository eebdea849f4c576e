"""Pooler and reward heads in plain PyTorch: the specification of `swiglu_reward` (paper, section 3.1)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dph_kernels import philox

HIDDEN, REWARD, W1, B1, W2, B2 = range(6)


def kept_shapes(rows: int, columns: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of [x | g] and of the pooled state, as ``forward`` keeps them for ``backward``."""
    return (rows, 2 * width), (rows, columns)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the precision of x."""
    product = x @ weight.to(x.dtype).T
    return product if bias is None else product + bias.to(x.dtype)


def gate(projected: Tensor) -> Tensor:
    """Return x silu(g) of [x | g]."""
    x, g = projected.chunk(2, dim=-1)
    return x * torch.nn.functional.silu(g)


def gate_backward(grad: Tensor, projected: Tensor) -> Tensor:
    """Return the gradient of [x | g] from that of x silu(g)."""
    x, g = projected.chunk(2, dim=-1)
    sigmoid = g.sigmoid()
    return torch.cat([grad * g * sigmoid, grad * x * sigmoid * (1 + g * (1 - sigmoid))], dim=-1)


def masks(
    hidden: Tensor, row_ids: Tensor | None, dropout: float, input_dropout: float, seed: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks of the input and of the pooled state, each [R, C], None if its dropout is 0."""
    if row_ids is None:
        row_ids = torch.arange(len(hidden), device=hidden.device)
    streams = ((input_dropout, philox.INPUT), (dropout, philox.POOLED))
    return tuple(
        philox.dropout_mask(row_ids, hidden.shape[1], p, seed, stream, dtype) if p else None for p, stream in streams
    )


def apply(mask: Tensor | None, x: Tensor) -> Tensor:
    """Return x times its mask, if there is one."""
    return x if mask is None else x * mask


def forward(
    hidden: Tensor,
    reward: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    row_ids: Tensor | None,
    dropout: float,
    input_dropout: float,
    seed: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rewards [R, K], [x | g] [R, 2F], pooled state [R, C]), the last two empty if absent or not saved."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    input_mask, pooled_mask = masks(hidden, row_ids, dropout, input_dropout, seed, dtype)
    state = apply(input_mask, hidden.to(dtype))
    projected, pooled = state.new_empty(0), state.new_empty(0)
    if w1 is not None:
        projected = linear(state, w1, b1)
        state = gate(projected)
    if w2 is not None:
        state = pooled = linear(state, w2, b2).tanh()
    rewards = linear(apply(pooled_mask, state), reward, None)
    return (rewards, projected, pooled) if save else (rewards, state.new_empty(0), state.new_empty(0))


def gradients(
    grad: Tensor,
    state: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor],
    drop: tuple[Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> Iterator[tuple[int, Tensor]]:
    """Yield (argument, gradient) from the rewards down to the hidden state, and stop after the last one needed."""
    (reward, w1, w2), (projected, pooled), (input_mask, pooled_mask) = weights, saved, drop
    if needs[REWARD]:
        yield REWARD, grad.T @ apply(pooled_mask, state if w2 is None else pooled)
    grad = apply(pooled_mask, grad @ reward.to(grad.dtype))
    if w2 is not None:
        grad = grad * (1 - pooled * pooled)
        if needs[W2]:
            yield W2, grad.T @ (state if w1 is None else gate(projected))
        if needs[B2]:
            yield B2, grad.sum(0)
        if not (needs[HIDDEN] or needs[W1] or needs[B1]):
            return
        grad = grad @ w2.to(grad.dtype)
    if w1 is not None:
        grad = gate_backward(grad, projected)
        if needs[W1]:
            yield W1, grad.T @ state
        if needs[B1]:
            yield B1, grad.sum(0)
        if needs[HIDDEN]:
            grad = grad @ w1.to(grad.dtype)
    if needs[HIDDEN]:
        yield HIDDEN, apply(input_mask, grad)


def backward(
    grad: Tensor,
    hidden: Tensor,
    reward: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    row_ids: Tensor | None,
    projected: Tensor,
    pooled: Tensor,
    dropout: float,
    input_dropout: float,
    seed: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of (hidden, reward, w1, b1, w2, b2), empty unless ``needs``; the masks are drawn again."""
    drop = masks(hidden, row_ids, dropout, input_dropout, seed, grad.dtype)
    state = apply(drop[0], hidden.to(grad.dtype))
    grads = [hidden.new_empty(0) for _ in needs]
    for argument, value in gradients(grad, state, (reward, w1, w2), (projected, pooled), drop, needs):
        grads[argument] = value.to(hidden.dtype)
    return tuple(grads)
