"""Launcher of the Triton kernels of pooler and reward heads.

Forward: one launch for the gate, one for the rest. Backward: one launch each for the operations above and below W2, and
PyTorch's matrix products for the gradients of the weights and of hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels import philox
from dph_kernels.checks import last_contiguous, readable_by_cublas
from dph_kernels.launcher import (
    Launch,
    LaunchConfig,
    LaunchRecorder,
    TritonDevice,
    cdiv,
    distinct,
    matrix,
    next_power_of_2,
    strided,
    triton_device,
)
from dph_kernels.swiglu_reward import triton_kernels as kernels
from dph_kernels.swiglu_reward.reference import B1, B2, HIDDEN, REWARD, W1, W2, kept_shapes

__all__ = ["backward", "forward", "kept_shapes", "launches"]

# Configurations

HALF, SINGLE = 2, 4  # bytes of an element

# By kernel, bytes of an element and rows of a tile: few answers in one tile, and as many programs as keep the loads of
# every SM in flight. Columns of the gate count twice, for x and for g. On an H200 128 answers take 24 us in two tiles
# of 64, and 33 in one; numbers between that and MANY were not measured. Beginning the second launch early (programmatic
# dependent launch) saves at most 3 % there, and costs 10 to 30 % if it prefetches its weights meanwhile.
CONFIGS: dict[str, dict[tuple[int, int], LaunchConfig]] = {
    "gate": {
        (HALF, 16): LaunchConfig(16, 16, 128, 4, 4), (HALF, 32): LaunchConfig(32, 16, 128, 4, 4),
        (HALF, 64): LaunchConfig(64, 32, 64, 4, 5),
        (SINGLE, 16): LaunchConfig(16, 16, 64, 4, 4), (SINGLE, 32): LaunchConfig(32, 16, 64, 4, 3),
        (SINGLE, 64): LaunchConfig(64, 32, 32, 4, 3),
    },
    "pool": {
        (HALF, 16): LaunchConfig(16, 32, 128, 4, 4), (HALF, 32): LaunchConfig(32, 32, 128, 4, 4),
        (HALF, 64): LaunchConfig(64, 32, 128, 4, 4),
        (SINGLE, 16): LaunchConfig(16, 32, 64, 4, 4), (SINGLE, 32): LaunchConfig(32, 32, 64, 4, 3),
        (SINGLE, 64): LaunchConfig(64, 32, 32, 4, 3),
    },
    "gate_backward": {
        (HALF, 16): LaunchConfig(16, 32, 128, 4, 4), (HALF, 32): LaunchConfig(32, 32, 128, 4, 4),
        (HALF, 64): LaunchConfig(64, 32, 64, 4, 4), (HALF, 128): LaunchConfig(128, 32, 64, 8, 4),
        (SINGLE, 16): LaunchConfig(16, 32, 64, 4, 4), (SINGLE, 32): LaunchConfig(32, 32, 64, 4, 3),
        (SINGLE, 64): LaunchConfig(64, 32, 32, 4, 3),
    },
}  # fmt: skip
MANY = 512  # answers from which on arithmetic is the limit, not reading the weights
WIDE = {"gate": LaunchConfig(128, 64, 64, 8, 4), "pool": LaunchConfig(128, 64, 64, 8, 4)}
ELEMENTWISE = LaunchConfig(32, 64, 0, 4, 1)
BLOCK_BACKWARD = LaunchConfig(32, 32, 0, 4, 1)
INTERPRETED = LaunchConfig(32, 16, 16, 1, 1)
MIN_STEPS = 2  # along the depth in a split of a sum
INTERPRETER_SMS = 16
PRECISION = "tf32x3"  # fp32 products as three on tensor cores, with the error of fp32; half precision is exact


def _config(gpu: TritonDevice, kernel: str, rows: int, x: Tensor) -> LaunchConfig:
    """Configuration of a product for ``rows`` answers and weights of the dtype of ``x``."""
    if not gpu.capability:
        return INTERPRETED
    size = x.element_size()
    if rows >= MANY and size == HALF:
        return WIDE[kernel]
    tiles = sorted(tile for element_size, tile in CONFIGS[kernel] if element_size == size)
    return CONFIGS[kernel][size, next((tile for tile in tiles if tile >= rows), tiles[-1])]


# Launches


def forward(
    hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    row_ids: Tensor | None, dropout: float, input_dropout: float, seed: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Same results as ``reference.forward``."""
    dropouts = _Dropouts(row_ids, dropout, input_dropout, seed)
    gpu = triton_device(hidden.device, INTERPRETER_SMS)
    return _forward(gpu, hidden, reward, w1, b1, w2, b2, dropouts, save)


def backward(
    grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None, row_ids: Tensor | None,
    projected: Tensor, pooled: Tensor, dropout: float, input_dropout: float, seed: int, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Same results as ``reference.backward``."""
    dropouts = _Dropouts(row_ids, dropout, input_dropout, seed)
    gpu = triton_device(hidden.device, INTERPRETER_SMS)
    return _backward(gpu, grad, hidden, reward, w1, w2, projected, pooled, dropouts, needs)


class _Dropouts:
    """Both dropouts of a call, as arguments of the kernels.

    Args:
        row_ids: [R] int64, or None for the numbers of the rows.
        dropout, input_dropout: probabilities of dropping elements of the pooled state and of hidden.
        seed: int64.
    """

    def __init__(self, row_ids: Tensor | None, dropout: float, input_dropout: float, seed: int) -> None:
        self.row_ids = None if row_ids is None else row_ids.contiguous()
        self.seed_low, self.seed_high = philox.split(seed)
        self.dropped = {philox.POOLED: dropout, philox.INPUT: input_dropout}

    def arguments(self, stream: int, like: Tensor) -> dict[str, Any]:
        """Arguments of a kernel that draws from ``stream``; ``like`` is any address, for row ids that are None."""
        return {
            "row_ids": like if self.row_ids is None else self.row_ids,
            "seed_low": self.seed_low, "seed_high": self.seed_high,
            "threshold": philox.threshold(self.dropped[stream]),
            "kept": torch.ones((), dtype=torch.float32, device="cpu").div(1 - self.dropped[stream]).item(),
        }  # fmt: skip

    def constants(self, stream: int) -> dict[str, Any]:
        """Constants of such a kernel."""
        return {"STREAM": stream, "NUMBERED": self.row_ids is not None}


def _drop(gpu: TritonDevice, x: Tensor, dropouts: _Dropouts) -> Tensor:
    """``x`` [R, C] times the dropout of the input, or ``x`` itself if there is none."""
    if not dropouts.dropped[philox.INPUT]:
        return x
    config, (rows, columns) = ELEMENTWISE, x.shape
    dropped = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = {"x": matrix(x), "out": dropped, "R": rows, **dropouts.arguments(philox.INPUT, x)}
    constants = {"C": columns, "BR": config.block_m, "BC": config.block_n, **dropouts.constants(philox.INPUT)}
    grid = cdiv(rows, config.block_m), cdiv(columns, config.block_n)
    gpu.launch(kernels.drop, grid, config, arguments, constants)
    return dropped


def _forward(
    gpu: TritonDevice, hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None,
    b2: Tensor | None, dropouts: _Dropouts, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = hidden.shape
    state, reward = _drop(gpu, last_contiguous(hidden), dropouts), reward.contiguous()
    like = {"dtype": torch.float32, "device": hidden.device}
    if w2 is None:
        return _score(gpu, state, reward, dropouts), torch.empty(0, **like), torch.empty(0, **like)
    config = _config(gpu, "pool", rows, w2)
    tiles, blocks = cdiv(rows, config.block_m), cdiv(columns, config.block_n)
    splits = _splits(tiles * blocks, w2.shape[1], config, gpu)
    counted = tiles * (blocks + 1)
    if w1 is None:
        projected = torch.empty(0, **like)
        counters = torch.zeros(counted, dtype=torch.int32, device=hidden.device)
    else:
        counters = torch.empty(counted, dtype=torch.int32, device=hidden.device)
        state, projected = _gate(gpu, state, w1, b1, counters, save)

    w2 = last_contiguous(w2)
    parts = torch.empty((splits, rows, columns) if splits > 1 else 0, **like)
    scores = torch.empty((blocks, rows, len(reward)), **like)
    rewards = torch.empty((rows, len(reward)), **like)
    pooled = torch.empty((rows, columns) if save else 0, **like)
    arguments = {
        "state": matrix(state), "w2": matrix(w2), "b2": w2 if b2 is None else b2.contiguous(), "reward": reward,
        "workspace": (parts, scores, counters), "pooled": pooled, "rewards": rewards, "R": rows,
        **dropouts.arguments(philox.POOLED, w2),
    }  # fmt: skip
    constants = {
        "C": columns, "DEPTH": w2.shape[1], "K": len(reward), "BR": config.block_m, "BC": config.block_n,
        "BK": config.block_k, "BP": next_power_of_2(blocks), "SPLITS": splits, "BIAS": b2 is not None,
        "DROP": dropouts.dropped[philox.POOLED] > 0, "SAVE": save, "PRECISION": PRECISION,
        **dropouts.constants(philox.POOLED),
    }  # fmt: skip
    gpu.launch(kernels.pool, (tiles, blocks, splits), config, arguments, constants)
    return rewards, projected, pooled


def _gate(
    gpu: TritonDevice, state: Tensor, w1: Tensor, b1: Tensor | None, counters: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """x silu(g) [R, F] and, if ``save``, [x | g] [R, 2F] in fp32; sets ``counters`` to 0."""
    rows, width = len(state), len(w1) // 2
    config, w1 = _config(gpu, "gate", rows, w1), last_contiguous(w1)
    gated = torch.empty((rows, width), dtype=state.dtype, device=state.device)
    projected = torch.empty((rows, 2 * width) if save else 0, dtype=torch.float32, device=state.device)
    arguments = {
        "hidden": matrix(state), "w1": matrix(w1), "b1": w1 if b1 is None else b1.contiguous(), "gated": gated,
        "projected": projected, "counters": counters, "R": rows, "counted": len(counters),
    }  # fmt: skip
    constants = {
        "C": state.shape[1], "F": width, "BR": config.block_m, "BF": config.block_n, "BK": config.block_k,
        "BIAS": b1 is not None, "SAVE": save, "PRECISION": PRECISION,
    }  # fmt: skip
    grid = cdiv(rows, config.block_m), cdiv(width, config.block_n)
    gpu.launch(kernels.gate, grid, config, arguments, constants)
    return gated, projected


def _score(gpu: TritonDevice, state: Tensor, reward: Tensor, dropouts: _Dropouts) -> Tensor:
    """Rewards [R, K] without a pooler."""
    (rows, columns), config = state.shape, ELEMENTWISE
    rewards = torch.empty((rows, len(reward)), dtype=torch.float32, device=state.device)
    arguments = {
        "state": matrix(state), "reward": reward, "rewards": rewards, "R": rows,
        **dropouts.arguments(philox.POOLED, state),
    }  # fmt: skip
    constants = {
        "C": columns, "K": len(reward), "BR": config.block_m, "BC": config.block_n,
        "DROP": dropouts.dropped[philox.POOLED] > 0, **dropouts.constants(philox.POOLED),
    }  # fmt: skip
    gpu.launch(kernels.score, (cdiv(rows, config.block_m), len(reward)), config, arguments, constants)
    return rewards


def _backward(
    gpu: TritonDevice, grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None,
    projected: Tensor, pooled: Tensor, dropouts: _Dropouts, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    need_hidden, need_reward, need_w1, need_b1, need_w2, need_b2 = needs
    grads = [hidden.new_empty(0) for _ in needs]
    hidden, w1, w2 = (None if x is None else last_contiguous(x) for x in (hidden, w1, w2))
    reads = w2 is None or (need_w1 if w1 is not None else need_w2)  # whether a gradient sums over hidden
    state = _drop(gpu, hidden, dropouts) if reads else hidden
    below, grads[REWARD], grads[B2] = _pool_backward(
        gpu, grad, state if w2 is None else pooled, reward.contiguous(), dropouts, hidden.dtype,
        w2 is not None, need_reward, need_b2,
    )  # fmt: skip
    if w1 is not None:
        above, need_input = below, need_hidden or need_w1 or need_b1
        below, gated, bias = _gate_backward(gpu, above, w2, projected, need_input, need_w2)
        if need_w1:
            grads[W1] = below.T @ readable_by_cublas(state)
        if need_b1:
            grads[B1] = bias.sum(0).to(hidden.dtype)
        if need_w2:
            grads[W2] = above.T @ gated
    elif need_w2:
        grads[W2] = below.T @ readable_by_cublas(state)
    if need_hidden:
        factor = w2 if w1 is None else w1
        grads[HIDDEN] = _drop(gpu, below if factor is None else below @ factor, dropouts)
    return tuple(grads)


def _pool_backward(
    gpu: TritonDevice, grad: Tensor, state: Tensor, reward: Tensor, dropouts: _Dropouts, dtype: torch.dtype,
    pooled: bool, need_reward: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the state [R, C] (before tanh if it is the pooled one), of reward and of b2."""
    (rows, columns), heads, config = state.shape, len(reward), BLOCK_BACKWARD
    like = {"dtype": dtype, "device": state.device}
    d_state = torch.empty((rows, columns), **like)
    d_reward = torch.empty((heads, columns) if need_reward else 0, **like)
    d_bias = torch.empty(columns if need_bias else 0, **like)
    arguments = {
        "grad": strided(grad), "state": matrix(state), "reward": reward, "d_state": d_state, "d_reward": d_reward,
        "d_bias": d_bias, "R": rows,
        **dropouts.arguments(philox.POOLED, state),
    }  # fmt: skip
    constants = {
        "C": columns, "K": heads, "BR": config.block_m, "BC": config.block_n, "BH": next_power_of_2(heads),
        "DROP": dropouts.dropped[philox.POOLED] > 0, "POOLED": pooled, "NEED_REWARD": need_reward,
        "NEED_BIAS": need_bias, **dropouts.constants(philox.POOLED),
    }  # fmt: skip
    gpu.launch(kernels.pool_backward, (cdiv(columns, config.block_n),), config, arguments, constants)
    return d_state, d_reward, d_bias


def _gate_backward(
    gpu: TritonDevice, grad: Tensor, w2: Tensor, projected: Tensor, need_input: bool, need_gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of [x | g] [R, 2F], x silu(g) [R, F], and the gradient's sums over tiles of rows [tiles, 2F]."""
    (rows, columns), width = grad.shape, w2.shape[1]
    multiply = rows < MANY  # else arithmetic is the limit, and cuBLAS is faster
    config = _config(gpu, "gate_backward", rows, w2) if multiply else ELEMENTWISE
    if need_input and not multiply:
        grad = grad @ w2
    tiles = cdiv(rows, config.block_m)
    like = {"dtype": grad.dtype, "device": grad.device}
    d_projected = torch.empty((rows, 2 * width) if need_input else 0, **like)
    gated = torch.empty((rows, width) if need_gated else 0, **like)
    d_bias = torch.empty((tiles, 2 * width) if need_input else 0, dtype=torch.float32, device=grad.device)
    arguments = {
        "grad": grad, "w2": matrix(w2), "projected": projected, "d_projected": d_projected, "gated": gated,
        "d_bias": d_bias, "R": rows,
    }  # fmt: skip
    constants = {
        "C": columns, "F": width, "BR": config.block_m, "BF": config.block_n, "BK": config.block_k,
        "MULTIPLY": multiply, "NEED_INPUT": need_input, "NEED_GATED": need_gated, "PRECISION": PRECISION,
    }  # fmt: skip
    if need_input or need_gated:
        grid = tiles, cdiv(width, config.block_n)
        gpu.launch(kernels.gate_backward, grid, config, arguments, constants)
    return d_projected, gated, d_bias


def _splits(programs: int, depth: int, config: LaunchConfig, gpu: TritonDevice) -> int:
    """Number of splits of the sums of ``programs`` tiles, so that there are programs for all SMs."""
    concurrent = gpu.sm_count * (2 if config.block_m <= 64 else 1)  # two programs of small tiles fit on an SM
    return max(1, min(concurrent // max(programs, 1), cdiv(depth, config.block_k) // MIN_STEPS))


# Audit


def _product_rows(kernel: Any, constants: Mapping[str, Any]) -> int:
    return constants["BR"] if constants.get("MULTIPLY", "BK" in constants) else 0


class _Case(NamedTuple):
    """A forward pass, with the backward pass if ``save``."""

    pooler: str
    dtype: torch.dtype
    rows: int
    heads: int = 1
    dropout: float = 0.1
    input_dropout: float = 0.0
    save: bool = True


CASES = [
    *(_Case("swiglu", torch.bfloat16, rows) for rows in (16, 32, 64, 128, 1024)),
    *(_Case("swiglu", torch.bfloat16, rows, dropout=0.0, save=False) for rows in (16, 128)),
    *(_Case("swiglu", torch.float32, rows) for rows in (16, 32, 64)),
    _Case("swiglu", torch.float16, 128),
    *(_Case(pooler, torch.bfloat16, 128, heads=3, input_dropout=0.1) for pooler in ("swiglu", "bert", "identity")),
]


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: all configurations at the paper's sizes, for bf16; for fp16 and fp32 if they differ."""
    gpu = LaunchRecorder(capability, {80: 108, 90: 132}[capability], _product_rows)
    for case in CASES:
        _record(gpu, case)
    return distinct(gpu.launches)


def _record(gpu: LaunchRecorder, case: _Case) -> None:
    columns, width = 1536, 4096

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device=gpu.device)

    w1, b1, w2, b2 = {
        "swiglu": (make(2 * width, columns), make(2 * width), make(columns, width), make(columns)),
        "bert": (None, None, make(columns, columns), make(columns)),
        "identity": (None,) * 4,
    }[case.pooler]
    hidden, reward = make(case.rows, columns), make(case.heads, columns)
    row_ids = torch.empty(case.rows, dtype=torch.int64, device=gpu.device) if case.input_dropout else None
    dropouts = _Dropouts(row_ids, case.dropout, case.input_dropout, 0)
    rewards, *saved = _forward(gpu, hidden, reward, w1, b1, w2, b2, dropouts, case.save)
    if case.save:
        needs = [x is not None for x in (hidden, reward, w1, b1, w2, b2)]
        _backward(gpu, rewards, hidden, reward, w1, w2, *saved, dropouts, needs)
