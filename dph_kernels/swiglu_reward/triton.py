"""Pooler and reward heads on the GPU: what ``triton_kernels.py`` is launched with, and in which configuration.

Forward: one launch for the gate, one for the rest. Backward: a launch each for what lies above and below W2, and
PyTorch's matrix products for the gradients of the weights and of hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels import philox
from dph_kernels.cublas import readable
from dph_kernels.launches import Launch, cdiv, next_power_of_2, signature
from dph_kernels.native import device_guard
from dph_kernels.strides import last_contiguous
from dph_kernels.swiglu_reward import triton_kernels as kernels
from dph_kernels.swiglu_reward.reference import B1, B2, HIDDEN, REWARD, W1, W2, kept_shapes

__all__ = ["backward", "forward", "kept_shapes", "launches"]


class Config(NamedTuple):
    """A tile of results is ``rows`` x ``columns``, taken in steps of ``step`` along the sums."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


HALF, SINGLE = 2, 4  # bytes of an element

# By kernel, bytes of an element and rows of a tile: few answers in one tile, and as many programs as keep every
# processor's loads in flight. Columns of the gate count twice, for x and for g. On an H200 128 answers take 24 us in
# two tiles of 64, and 33 in one; numbers between that and MANY were not measured. That the second launch begins early
# (programmatic dependent launch) saves at most 3 % there, and costs 10 to 30 % where it has its weights brought to the
# cache meanwhile.
CONFIGS: dict[str, dict[tuple[int, int], Config]] = {
    "gate": {
        (HALF, 16): Config(16, 16, 128, 4, 4), (HALF, 32): Config(32, 16, 128, 4, 4),
        (HALF, 64): Config(64, 32, 64, 4, 5),
        (SINGLE, 16): Config(16, 16, 64, 4, 4), (SINGLE, 32): Config(32, 16, 64, 4, 3),
        (SINGLE, 64): Config(64, 32, 32, 4, 3),
    },
    "pool": {
        (HALF, 16): Config(16, 32, 128, 4, 4), (HALF, 32): Config(32, 32, 128, 4, 4),
        (HALF, 64): Config(64, 32, 128, 4, 4),
        (SINGLE, 16): Config(16, 32, 64, 4, 4), (SINGLE, 32): Config(32, 32, 64, 4, 3),
        (SINGLE, 64): Config(64, 32, 32, 4, 3),
    },
    "gate_backward": {
        (HALF, 16): Config(16, 32, 128, 4, 4), (HALF, 32): Config(32, 32, 128, 4, 4),
        (HALF, 64): Config(64, 32, 64, 4, 4), (HALF, 128): Config(128, 32, 64, 8, 4),
        (SINGLE, 16): Config(16, 32, 64, 4, 4), (SINGLE, 32): Config(32, 32, 64, 4, 3),
        (SINGLE, 64): Config(64, 32, 32, 4, 3),
    },
}  # fmt: skip
MANY = 512  # answers from which on arithmetic is the limit, and not the reading of the weights
WIDE = {"gate": Config(128, 64, 64, 8, 4), "pool": Config(128, 64, 64, 8, 4)}
ELEMENTWISE = Config(32, 64, 0, 4, 1)
BLOCK_BACKWARD = Config(32, 32, 0, 4, 1)
INTERPRETED = Config(32, 16, 16, 1, 1)
LEAST = 2  # steps of a share of a sum
PRECISION = "tf32x3"  # of fp32 products: three on tensor cores, whose error is that of fp32; half precision is exact


# Launches


class _Machine:
    """What kernels are launched on; capability 0 is Triton's interpreter."""

    def __init__(self, device: torch.device, capability: int, processors: int) -> None:
        self.device, self.capability, self.processors = device, capability, processors

    def config(self, kernel: str, rows: int, x: Tensor) -> Config:
        """The configuration of a product for ``rows`` answers."""
        if not self.capability:
            return INTERPRETED
        size = x.element_size()
        if rows >= MANY and size == HALF:
            return WIDE[kernel]
        known = sorted(tile for bytes_, tile in CONFIGS[kernel] if bytes_ == size)
        return CONFIGS[kernel][size, next((tile for tile in known if tile >= rows), known[-1])]

    def run(
        self, kernel: Any, grid: tuple[int, ...], config: Config, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Launch it, unless the grid is empty."""
        if 0 in grid:
            return
        options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        with device_guard(self.device):
            kernel[grid](**arguments, **constants, **options)


@functools.cache
def _machine(device: torch.device) -> _Machine:
    if device.type == "cpu":
        return _Machine(device, 0, 16)
    properties = torch.cuda.get_device_properties(device)
    return _Machine(device, properties.major * 10 + properties.minor, properties.multi_processor_count)


def forward(
    hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None,
    row_ids: Tensor | None, dropout: float, input_dropout: float, seed: int, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``reference.forward`` gives."""
    draw = _Draw(row_ids, dropout, input_dropout, seed)
    return _run_forward(_machine(hidden.device), hidden, reward, w1, b1, w2, b2, draw, save)


def backward(
    grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None, row_ids: Tensor | None,
    projected: Tensor, pooled: Tensor, dropout: float, input_dropout: float, seed: int, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What ``reference.backward`` gives."""
    draw = _Draw(row_ids, dropout, input_dropout, seed)
    return _run_backward(_machine(hidden.device), grad, hidden, reward, w1, w2, projected, pooled, draw, needs)


class _Draw:
    """Both dropouts of a call, as the kernels take them."""

    def __init__(self, row_ids: Tensor | None, pooled: float, given: float, seed: int) -> None:
        self.row_ids = None if row_ids is None else row_ids.contiguous()
        self.seed_low, self.seed_high = philox.split(seed)
        self.shares = {philox.POOLED: pooled, philox.INPUT: given}

    def arguments(self, stream: int, like: Tensor) -> dict[str, Any]:
        """What a kernel that draws from ``stream`` takes; ``like`` stands for row ids where they are counted."""
        return {
            "row_ids": like if self.row_ids is None else self.row_ids,
            "seed_low": self.seed_low, "seed_high": self.seed_high,
            "threshold": philox.threshold(self.shares[stream]),
            "kept": torch.ones((), dtype=torch.float32, device="cpu").div(1 - self.shares[stream]).item(),
        }  # fmt: skip

    def constants(self, stream: int) -> dict[str, Any]:
        """What it is compiled for."""
        return {"STREAM": stream, "NUMBERED": self.row_ids is not None}


def _run_drop(machine: _Machine, x: Tensor, draw: _Draw) -> Tensor:
    """``x`` [R, C] times the dropout of the input: itself where there is none."""
    if not draw.shares[philox.INPUT]:
        return x
    config, (rows, columns) = ELEMENTWISE, x.shape
    dropped = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = {"x": x, "out": dropped, "x_row": x.stride(0), "R": rows, **draw.arguments(philox.INPUT, x)}
    constants = {"C": columns, "BR": config.rows, "BC": config.columns, **draw.constants(philox.INPUT)}
    grid = cdiv(rows, config.rows), cdiv(columns, config.columns)
    machine.run(kernels.drop, grid, config, arguments, constants)
    return dropped


def _run_forward(
    machine: _Machine, hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None,
    b2: Tensor | None, draw: _Draw, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns = hidden.shape
    state, reward = _run_drop(machine, last_contiguous(hidden), draw), reward.contiguous()
    like = {"dtype": torch.float32, "device": hidden.device}
    if w2 is None:
        return _run_score(machine, state, reward, draw), torch.empty(0, **like), torch.empty(0, **like)
    config = machine.config("pool", rows, w2)
    tiles, blocks = cdiv(rows, config.rows), cdiv(columns, config.columns)
    shares = _shares(tiles * blocks, w2.shape[1], config, machine)
    counted = tiles * (blocks + 1)
    if w1 is None:
        projected = torch.empty(0, **like)
        counters = torch.zeros(counted, dtype=torch.int32, device=hidden.device)
    else:
        counters = torch.empty(counted, dtype=torch.int32, device=hidden.device)
        state, projected = _run_gate(machine, state, w1, b1, counters, save)

    w2 = last_contiguous(w2)
    rewards = torch.empty((rows, len(reward)), **like)
    pooled = torch.empty((rows, columns) if save else 0, **like)
    arguments = {
        "state": state, "w2": w2, "b2": w2 if b2 is None else b2.contiguous(), "reward": reward,
        "parts": torch.empty((shares, rows, columns) if shares > 1 else 0, **like),
        "scores": torch.empty((blocks, rows, len(reward)), **like),
        "counters": counters, "pooled": pooled, "rewards": rewards,
        "state_row": state.stride(0), "w2_row": w2.stride(0), "R": rows, **draw.arguments(philox.POOLED, w2),
    }  # fmt: skip
    constants = {
        "C": columns, "DEPTH": w2.shape[1], "K": len(reward), "BR": config.rows, "BC": config.columns,
        "BK": config.step, "BP": next_power_of_2(blocks), "SHARES": shares, "BIAS": b2 is not None,
        "DROP": draw.shares[philox.POOLED] > 0, "SAVE": save, "PRECISION": PRECISION,
        **draw.constants(philox.POOLED),
    }  # fmt: skip
    machine.run(kernels.pool, (tiles, blocks, shares), config, arguments, constants)
    return rewards, projected, pooled


def _run_gate(
    machine: _Machine, state: Tensor, w1: Tensor, b1: Tensor | None, counters: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """x silu(g) [R, F] and, where kept, [x | g] [R, 2F] in fp32; sets ``counters`` to 0."""
    rows, width = len(state), len(w1) // 2
    config, w1 = machine.config("gate", rows, w1), last_contiguous(w1)
    gated = torch.empty((rows, width), dtype=state.dtype, device=state.device)
    projected = torch.empty((rows, 2 * width) if save else 0, dtype=torch.float32, device=state.device)
    arguments = {
        "hidden": state, "w1": w1, "b1": w1 if b1 is None else b1.contiguous(), "gated": gated,
        "projected": projected, "counters": counters, "hidden_row": state.stride(0), "w1_row": w1.stride(0),
        "R": rows, "counted": len(counters),
    }  # fmt: skip
    constants = {
        "C": state.shape[1], "F": width, "BR": config.rows, "BF": config.columns, "BK": config.step,
        "BIAS": b1 is not None, "SAVE": save, "PRECISION": PRECISION,
    }  # fmt: skip
    grid = cdiv(rows, config.rows), cdiv(width, config.columns)
    machine.run(kernels.gate, grid, config, arguments, constants)
    return gated, projected


def _run_score(machine: _Machine, state: Tensor, reward: Tensor, draw: _Draw) -> Tensor:
    """Rewards [R, K] without a pooler."""
    (rows, columns), config = state.shape, ELEMENTWISE
    rewards = torch.empty((rows, len(reward)), dtype=torch.float32, device=state.device)
    arguments = {
        "state": state, "reward": reward, "rewards": rewards, "state_row": state.stride(0), "R": rows,
        **draw.arguments(philox.POOLED, state),
    }  # fmt: skip
    constants = {
        "C": columns, "K": len(reward), "BR": config.rows, "BC": config.columns,
        "DROP": draw.shares[philox.POOLED] > 0, **draw.constants(philox.POOLED),
    }  # fmt: skip
    machine.run(kernels.score, (cdiv(rows, config.rows), len(reward)), config, arguments, constants)
    return rewards


def _run_backward(
    machine: _Machine, grad: Tensor, hidden: Tensor, reward: Tensor, w1: Tensor | None, w2: Tensor | None,
    projected: Tensor, pooled: Tensor, draw: _Draw, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    need_hidden, need_reward, need_w1, need_b1, need_w2, need_b2 = needs
    grads = [hidden.new_empty(0) for _ in needs]
    hidden, w1, w2 = (None if x is None else last_contiguous(x) for x in (hidden, w1, w2))
    reads = w2 is None or (need_w1 if w1 is not None else need_w2)  # whether a gradient sums over hidden
    state = _run_drop(machine, hidden, draw) if reads else hidden
    below, grads[REWARD], grads[B2] = _run_pool_backward(
        machine, grad, state if w2 is None else pooled, reward.contiguous(), draw, hidden.dtype,
        w2 is not None, need_reward, need_b2,
    )  # fmt: skip
    if w1 is not None:
        above, need_input = below, need_hidden or need_w1 or need_b1
        below, gated, bias = _run_gate_backward(machine, above, w2, projected, need_input, need_w2)
        if need_w1:
            grads[W1] = below.T @ readable(state)
        if need_b1:
            grads[B1] = bias.sum(0).to(hidden.dtype)
        if need_w2:
            grads[W2] = above.T @ gated
    elif need_w2:
        grads[W2] = below.T @ readable(state)
    if need_hidden:
        factor = w2 if w1 is None else w1
        grads[HIDDEN] = _run_drop(machine, below if factor is None else below @ factor, draw)
    return tuple(grads)


def _run_pool_backward(
    machine: _Machine, grad: Tensor, state: Tensor, reward: Tensor, draw: _Draw, dtype: torch.dtype, pooled: bool,
    need_reward: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the state [R, C] (before tanh, where it is the pooled one), of reward and of b2."""
    (rows, columns), heads, config = state.shape, len(reward), BLOCK_BACKWARD
    like = {"dtype": dtype, "device": state.device}
    d_state = torch.empty((rows, columns), **like)
    d_reward = torch.empty((heads, columns) if need_reward else 0, **like)
    d_bias = torch.empty(columns if need_bias else 0, **like)
    arguments = {
        "grad": grad, "state": state, "reward": reward, "d_state": d_state, "d_reward": d_reward, "d_bias": d_bias,
        "grad_row": grad.stride(0), "grad_head": grad.stride(1), "state_row": state.stride(0), "R": rows,
        **draw.arguments(philox.POOLED, state),
    }  # fmt: skip
    constants = {
        "C": columns, "K": heads, "BR": config.rows, "BC": config.columns, "BH": next_power_of_2(heads),
        "DROP": draw.shares[philox.POOLED] > 0, "POOLED": pooled, "NEED_REWARD": need_reward,
        "NEED_BIAS": need_bias, **draw.constants(philox.POOLED),
    }  # fmt: skip
    machine.run(kernels.pool_backward, (cdiv(columns, config.columns),), config, arguments, constants)
    return d_state, d_reward, d_bias


def _run_gate_backward(
    machine: _Machine, grad: Tensor, w2: Tensor, projected: Tensor, need_input: bool, need_gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of [x | g] [R, 2F], x silu(g) [R, F], and the gradient's sums over tiles of rows [tiles, 2F]."""
    (rows, columns), width = grad.shape, w2.shape[1]
    multiply = rows < MANY  # else arithmetic is the limit, and cuBLAS the better tool
    config = machine.config("gate_backward", rows, w2) if multiply else ELEMENTWISE
    if need_input and not multiply:
        grad = grad @ w2
    tiles = cdiv(rows, config.rows)
    like = {"dtype": grad.dtype, "device": grad.device}
    d_projected = torch.empty((rows, 2 * width) if need_input else 0, **like)
    gated = torch.empty((rows, width) if need_gated else 0, **like)
    d_bias = torch.empty((tiles, 2 * width) if need_input else 0, dtype=torch.float32, device=grad.device)
    arguments = {
        "grad": grad, "w2": w2, "projected": projected, "d_projected": d_projected, "gated": gated,
        "d_bias": d_bias, "w2_row": w2.stride(0), "R": rows,
    }  # fmt: skip
    constants = {
        "C": columns, "F": width, "BR": config.rows, "BF": config.columns, "BK": config.step,
        "MULTIPLY": multiply, "NEED_INPUT": need_input, "NEED_GATED": need_gated, "PRECISION": PRECISION,
    }  # fmt: skip
    if need_input or need_gated:
        grid = tiles, cdiv(width, config.columns)
        machine.run(kernels.gate_backward, grid, config, arguments, constants)
    return d_projected, gated, d_bias


def _shares(programs: int, depth: int, config: Config, machine: _Machine) -> int:
    """Into how many shares the sums of so many tiles are split, so that there are programs for all processors."""
    busy = machine.processors * (2 if config.rows <= 64 else 1)  # small tiles leave room for two on a processor
    return max(1, min(busy // max(programs, 1), cdiv(depth, config.step) // LEAST))


# For the audit


class _Recorder(_Machine):
    """Keeps every launch instead of doing it."""

    def __init__(self, capability: int, processors: int) -> None:
        super().__init__(torch.device("meta"), capability, processors)
        self.found: list[Launch] = []

    def run(
        self, kernel: Any, grid: tuple[int, ...], config: Config, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Describe it."""
        multiplies = kernel in (kernels.gate, kernels.pool) or constants.get("MULTIPLY", False)
        half = multiplies and arguments["w2" if "w2" in arguments else "w1"].element_size() == HALF
        wide = self.capability >= 90 and config.rows >= 64
        dtype = next(arguments[name].dtype for name in ("w1", "w2", "reward", "x") if name in arguments)
        words = [f"{config.rows}x{config.columns}", str(dtype).removeprefix("torch.")]
        words += [
            f"{name.lower()}={constants[name]}" for name in ("DEPTH", "SHARES", "K") if constants.get(name, 1) > 1
        ]
        words += [name.lower() for name in ("DROP", "SAVE", "POOLED", "NUMBERED") if constants.get(name)]
        aligned = [
            n for n, v in arguments.items() if isinstance(v, Tensor) or (n not in kernels.NUMBERS and v % 16 == 0)
        ]
        self.found.append(
            Launch(
                name=" ".join([f"swiglu_reward.{kernel.__name__}", *words]),
                kernel=kernel,
                signature=signature(kernel, arguments, constants),
                constants=constants,
                aligned=tuple(aligned),
                num_warps=config.warps,
                num_stages=config.stages,
                matrix="" if not half else "HGMMA" if wide else "HMMA",
                copies=multiplies,
            )
        )


class _Case(NamedTuple):
    """A forward pass, and the backward pass where something is kept for it."""

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
    """Every kernel in every configuration, at the paper's sizes: bf16; fp16 and fp32 where they differ."""
    found: dict[tuple, Launch] = {}
    for case in CASES:
        for each in _record(capability, case):
            found.setdefault(each.key(), each)
    return list(found.values())


def _record(capability: int, case: _Case) -> list[Launch]:
    machine = _Recorder(capability, {80: 108, 90: 132}[capability])
    columns, width = 1536, 4096

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device=machine.device)

    w1, b1, w2, b2 = {
        "swiglu": (make(2 * width, columns), make(2 * width), make(columns, width), make(columns)),
        "bert": (None, None, make(columns, columns), make(columns)),
        "identity": (None,) * 4,
    }[case.pooler]
    hidden, reward = make(case.rows, columns), make(case.heads, columns)
    row_ids = torch.empty(case.rows, dtype=torch.int64, device=machine.device) if case.input_dropout else None
    draw = _Draw(row_ids, case.dropout, case.input_dropout, 0)
    rewards, *kept = _run_forward(machine, hidden, reward, w1, b1, w2, b2, draw, case.save)
    if case.save:
        needs = [x is not None for x in (hidden, reward, w1, b1, w2, b2)]
        _run_backward(machine, rewards, hidden, reward, w1, w2, *kept, draw, needs)
    return machine.found
