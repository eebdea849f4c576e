"""Rotary attention on the GPU: what ``triton_kernels.py`` is launched with, and in which configuration."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dph_kernels.launches import Launch, cdiv, next_power_of_2, signature
from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.native import device_guard
from dph_kernels.rope_attention import schedule
from dph_kernels.rope_attention import triton_kernels as kernels
from dph_kernels.rope_attention.schedule import Schedule
from dph_kernels.strides import last_contiguous

# Configurations


class Config(NamedTuple):
    """How a kernel is launched.

    queries, keys: the block of scores (BM x BN).
    step: how many of the side that a program walks along are taken at once where a mask is needed.
    warps, stages: of a program, and of its software pipeline.
    registers: most that a thread may have: fewer let more programs share a processor. None: the compiler decides, and
        ptxas may spill a few bytes for one program more.
    """

    queries: int
    keys: int
    step: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launcher takes."""
        # Multiplications and additions are to fuse: exp2 gets its scaled argument from one instruction.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options | ({"maxnreg": self.registers} if self.registers else {})


# Of half precision, by architecture, kernel and head dimension, where RAGGED stands for all that are not 16, 32, 64 or
# 128. "few" is the forward kernel where no segment has more than FEW queries. Chosen by what the compiler makes of them
# (Triton 3.6 and 3.9): nothing spilled in the forward pass; where that is possible two programs or more share a
# processor, so that one computes its softmax while another multiplies. Measured on an H200 are "forward" and "queries"
# of 64 on 90: with 128 rows documents and pairs are up to 22 and 8 % slower, and with 128 keys everything is.
RAGGED = 0
CONFIGS: dict[int, dict[str, dict[int, Config]]] = {
    80: {
        "forward": {
            16: Config(128, 64, 32, 4, 3, 192), 32: Config(128, 64, 32, 4, 3, 192),
            64: Config(128, 64, 32, 4, 3), 128: Config(128, 64, 32, 8, 2, 255),
            RAGGED: Config(64, 64, 32, 8, 2),
        },
        "few": {
            16: Config(16, 64, 32, 1, 3), 32: Config(16, 64, 32, 1, 3),
            64: Config(16, 64, 32, 1, 3), 128: Config(16, 32, 32, 4, 3),
            RAGGED: Config(16, 32, 32, 4, 3, 168),
        },
        "queries": {
            16: Config(128, 64, 32, 8, 2), 32: Config(128, 64, 32, 8, 2),
            64: Config(128, 64, 32, 8, 2), 128: Config(64, 64, 32, 4, 2),
            RAGGED: Config(64, 64, 32, 8, 2),
        },
        "keys": {
            16: Config(64, 128, 64, 8, 2), 32: Config(64, 128, 64, 8, 2),
            64: Config(64, 128, 64, 8, 2), 128: Config(32, 64, 32, 4, 2),
            RAGGED: Config(64, 64, 32, 8, 2),
        },
    },
    90: {
        "forward": {
            16: Config(64, 64, 32, 4, 3), 32: Config(128, 64, 32, 8, 3, 128),
            64: Config(64, 64, 32, 4, 3), 128: Config(128, 64, 32, 8, 3, 255),
            RAGGED: Config(128, 64, 32, 8, 2),
        },
        "few": {
            16: Config(16, 64, 32, 1, 3), 32: Config(16, 64, 32, 1, 3),
            64: Config(16, 64, 32, 1, 3), 128: Config(16, 32, 32, 4, 3),
            RAGGED: Config(16, 32, 32, 4, 3, 168),
        },
        "queries": {
            16: Config(64, 64, 32, 4, 2), 32: Config(128, 64, 32, 8, 2, 128),
            64: Config(64, 64, 32, 4, 3), 128: Config(128, 64, 32, 8, 2),
            RAGGED: Config(128, 64, 32, 8, 2),
        },
        "keys": {
            16: Config(64, 64, 32, 4, 2), 32: Config(64, 64, 32, 4, 2),
            64: Config(64, 64, 32, 4, 2), 128: Config(64, 128, 64, 8, 2),
            RAGGED: Config(32, 64, 32, 8, 2),
        },
    },
}  # fmt: skip
# Single precision multiplies without tensor cores, which would round its numbers to 11 bits. By the largest head
# dimension; on all architectures.
PRECISE: dict[int, dict[str, Config]] = {
    64: {
        "forward": Config(64, 32, 16, 8, 2, 128), "few": Config(16, 32, 16, 8, 2, 128),
        "queries": Config(32, 32, 16, 4, 2), "keys": Config(32, 32, 16, 8, 2),
    },
    128: {
        "forward": Config(16, 32, 16, 8, 2, 128), "few": Config(16, 32, 16, 8, 2, 128),
        "queries": Config(32, 32, 16, 8, 2), "keys": Config(16, 32, 16, 8, 2, 168),
    },
}  # fmt: skip
INTERPRETED = {
    "forward": Config(32, 32, 16, 1, 1), "few": Config(16, 32, 16, 1, 1),
    "queries": Config(32, 32, 16, 1, 1), "keys": Config(32, 32, 16, 1, 1),
}  # fmt: skip
FEW = 16
ROTATE = Config(64, 0, 0, 4, 1)  # rows of the rotation kernel
LEAST = 4  # blocks of an item of split work
PROGRAMS = 2  # that a processor should have: with fewer, work is split
SPILLS = 64  # bytes that the backward kernels may spill, outside of their inner loops
TINY = 1e-30
PLANS = 64  # that are kept
CPU = torch.device("cpu")


# Launches


class _Machine:
    """What kernels are launched on; capability 0 is Triton's interpreter."""

    def __init__(self, device: torch.device, capability: int, processors: int) -> None:
        self.device, self.capability, self.processors = device, capability, processors

    def config(self, kernel: str, head_dim: int, dtype: torch.dtype) -> Config:
        """That of the nearest architecture which is not newer; for interpreted kernels, small tiles."""
        if not self.capability:
            return INTERPRETED[kernel]
        known = [capability for capability in CONFIGS if capability <= self.capability]
        if not known:
            raise RuntimeError(
                f"rope_attention: expected a GPU of compute capability {min(CONFIGS)} or higher, got {self.capability}"
            )
        if dtype == torch.float32:
            return PRECISE[64 if head_dim <= 64 else 128][kernel]
        return CONFIGS[max(known)][kernel][head_dim if head_dim == _padded(head_dim) else RAGGED]

    def warpgroups(self, rows: int, config: Config, dtype: torch.dtype) -> bool:
        """Whether matrix products of ``rows`` rows are Hopper's, of four warps together; interpreted ones count too."""
        hopper = self.capability // 10 == 9 and rows >= 64 and config.warps >= 4 and dtype != torch.float32
        return hopper or not self.capability

    def run(
        self, kernel: Any, grid: tuple[int, ...], config: Config, arguments: dict[str, Any], constants: dict[str, Any]
    ) -> None:
        """Launch it, unless the grid is empty."""
        if 0 in grid:
            return
        with device_guard(self.device):
            kernel[grid](**arguments, **constants, **config.options)


@functools.cache
def _machine(device: torch.device) -> _Machine:
    if device.type == "cpu":
        return _Machine(device, 0, 4)
    properties = torch.cuda.get_device_properties(device)
    return _Machine(device, properties.major * 10 + properties.minor, properties.multi_processor_count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [T, H, D] with its halves rotated by the angles of ``cos`` and ``sin`` [T, D/2] fp32; contiguous."""
    return _run_rotate(_machine(x.device), x, cos, sin)


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``reference.forward`` gives."""
    tensors = q, k, v, memory_k, memory_v, segments, q_cos, q_sin, k_cos, k_sin
    return _run_forward(_machine(q.device), *tensors, scale)


def backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What ``reference.backward`` gives."""
    found = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, v, v))
    tensors = grad, q, rotated, v, memory_k, memory_v, out, lse, segments, q_cos, q_sin, k_cos, k_sin
    backward_into(found, *tensors, scale)
    return found


def backward_into(found: Sequence[Tensor], grad: Tensor, q: Tensor, *others: Any) -> None:
    """Write what ``backward`` gives into ``found``: of one set of strides, rows and heads apart, the last is 1."""
    _run_backward(_machine(q.device), found, grad, q, *others)


def _run_rotate(machine: _Machine, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = last_contiguous(x)
    rows, heads, head_dim = x.shape
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit, strides = _strides(x=x.stride())
    arguments = {"x": x, "cos": cos, "sin": sin, "rotated": rotated, "rows": rows * heads, "H": heads, **strides}
    constants = {"D": head_dim, "BD": _padded(head_dim), "BM": ROTATE.queries, "UNIT": unit}
    machine.run(kernels.rotate, (cdiv(rows * heads, ROTATE.queries),), ROTATE, arguments, constants)
    return rotated


class _Plan(NamedTuple):
    """What follows from layout and sizes alone: one for all layers and steps that have them.

    Attributes:
        work, bounds: on the device.
        constants: of the kernel, but for the unit of its strides.
    """

    config: Config
    work: Schedule
    bounds: Tensor
    constants: dict[str, Any]


@functools.lru_cache(maxsize=PLANS)
def _plan(
    machine: _Machine, kernel: str, content: bytes, queries: int, keys: int, memory: int, heads: int, head_dim: int,
    dtype: torch.dtype,
) -> _Plan:  # fmt: skip
    """Of the kernel "forward" (or "few", where segments are short), "queries" or "keys"."""
    segments, device = schedule.table_of(content), machine.device
    if kernel == "forward" and _longest(segments) <= FEW:
        kernel = "few"
    config = machine.config(kernel, head_dim, dtype)
    constants = {"D": head_dim, "BD": _padded(head_dim), "BM": config.queries, "BN": config.keys, "STEP": config.step}
    if kernel == "keys":
        sizes = {"rows": config.keys, "block": config.queries}
        work = schedule.by_keys(segments, queries, keys, memory, **sizes, device=device)
    else:
        constants["MEMORY"] = memory > 0
        sizes, limit = {"rows": config.queries, "block": config.keys}, 0
        if kernel != "queries":
            whole = schedule.by_queries(segments, queries, memory, **sizes, device=CPU)
            limit = _limit(whole, heads, config, machine)
        work = schedule.by_queries(segments, queries, memory, **sizes, limit=limit, device=device)
    if kernel in ("forward", "few"):
        constants["SPLIT"] = work.split
    return _Plan(config, work, schedule.bounds(segments, queries, device=device), constants)


def _run_forward(
    machine: _Machine, q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rotated = _run_rotate(machine, k, k_cos, k_sin)
    q_cos, q_sin, scale = _positive(q_cos, q_sin, scale)
    q, v, memory_k, memory_v = (last_contiguous(x) for x in (q, v, memory_k, memory_v))
    (queries, heads, head_dim), memory, device = q.shape, len(memory_k), q.device
    sizes = queries, len(v), memory, heads, head_dim, q.dtype
    config, work, bounds, constants = _plan(machine, "forward", schedule.content_of(segments), *sizes)
    items = len(work.tiles)

    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty((queries, heads), dtype=torch.float32, device=device)
    parts, parts_lse = out, lse
    if work.split:
        parts_lse = torch.empty((items, heads, config.queries), dtype=torch.float32, device=device)
        parts = torch.empty((*parts_lse.shape, constants["BD"]), dtype=torch.float32, device=device)
    unit, strides = _strides(q=q.stride(), v=v.stride(), mk=memory_k.stride(), mv=memory_v.stride())
    arguments = {
        "q": q, "k": rotated, "v": v, "memory_k": memory_k, "memory_v": memory_v, "q_cos": q_cos, "q_sin": q_sin,
        "out": parts, "lse": parts_lse, "tiles": work.tiles, "runs": work.runs, "bounds": bounds,
        "scale": scale * kernels.LOG2_E.value, "memory": memory, "H": heads, **strides,
    }  # fmt: skip
    machine.run(kernels.forward, (items, heads), config, arguments, {**constants, "UNIT": unit})
    if work.split:
        arguments = {
            "parts": parts, "parts_lse": parts_lse, "out": out, "lse": lse, "tiles": work.tiles,
            "pieces": work.pieces, "order": work.order, "H": heads,
        }  # fmt: skip
        constants = {name: constants[name] for name in ("D", "BD", "BM")}
        machine.run(kernels.combine, (len(work.pieces) - 1, heads), config, arguments, constants)
    return out, lse, rotated


def _run_backward(
    machine: _Machine, found: Sequence[Tensor], grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor,
    memory_v: Tensor, out: Tensor, lse: Tensor, segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor,
    k_sin: Tensor, scale: float,
) -> None:  # fmt: skip
    dq, dk, dv = found
    q_cos, q_sin, scale = _positive(q_cos, q_sin, scale)
    grad, q, v, memory_k, memory_v, out = (last_contiguous(x) for x in (grad, q, v, memory_k, memory_v, out))
    rotated, lse = rotated.contiguous(), lse.contiguous()  # as the forward pass gave them
    (queries, heads, head_dim), memory, device = q.shape, len(memory_k), q.device
    content, sizes = schedule.content_of(segments), (queries, len(v), memory, heads, head_dim, q.dtype)
    common = {
        "grad": grad, "k": rotated, "v": v, "rotated": torch.empty(q.shape, dtype=q.dtype, device=device),
        "sums": torch.empty((heads, queries, 4), dtype=torch.float32, device=device),
        "scale": scale * kernels.LOG2_E.value, "factor": scale, "memory": memory, "T": queries, "H": heads,
    }  # fmt: skip

    config, work, bounds, constants = _plan(machine, "queries", content, *sizes)
    unit, strides = _strides(
        g=grad.stride(), q=q.stride(), o=out.stride(), v=v.stride(), d=dq.stride(), mk=memory_k.stride(),
        mv=memory_v.stride(),
    )  # fmt: skip
    arguments = {
        **common, "q": q, "memory_k": memory_k, "memory_v": memory_v, "out": out, "lse": lse, "q_cos": q_cos,
        "q_sin": q_sin, "dq": dq, "tiles": work.tiles, "runs": work.runs, "bounds": bounds, **strides,
    }  # fmt: skip
    grid = (len(work.tiles), heads)
    machine.run(kernels.backward_queries, grid, config, arguments, {**constants, "UNIT": unit})

    config, work, bounds, constants = _plan(machine, "keys", content, *sizes)
    unit, strides = _strides(g=grad.stride(), v=v.stride(), d=dk.stride())
    arguments = {
        **common, "k_cos": k_cos, "k_sin": k_sin, "dk": dk, "dv": dv, "tiles": work.tiles, "runs": work.runs,
        "bounds": bounds, **strides,
    }  # fmt: skip
    grid = (len(work.tiles), heads)
    machine.run(kernels.backward_keys, grid, config, arguments, {**constants, "UNIT": unit})


@functools.lru_cache(maxsize=PLANS)
def _strides(**strides: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """The largest power of two up to 16 that divides all row and head strides, and these in units of it."""
    steps = {f"{name}_{step}": own[i] for name, own in strides.items() for i, step in enumerate(("row", "head"))}
    unit = math.gcd(16, *steps.values())
    return unit, {name: step // unit for name, step in steps.items()}


def _padded(head_dim: int) -> int:
    """BD: the least tensor cores multiply is 16."""
    return max(16, next_power_of_2(head_dim))


def _longest(segments: Tensor) -> int:
    return int((segments[:, 1] - segments[:, 0]).max()) if len(segments) else 0


def _limit(work: Schedule, heads: int, config: Config, machine: _Machine) -> int:
    """How many blocks of keys an item may have, so that there are programs for all processors; 0 where there are."""
    shares = PROGRAMS * machine.processors // max(len(work.tiles) * heads, 1)
    if shares < 2 or not len(work.tiles):
        return 0
    first, _, last = work.tiles[0, 2:5].tolist()  # the tile with the most work comes first
    low, high = work.runs[first:last].unbind(1)
    blocks = int(((high - low + config.keys - 1) // config.keys).sum())
    limit = max(cdiv(blocks, shares), LEAST)
    return limit if limit < blocks else 0


def _positive(cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """Tables of the queries and a scale above zero that give the same scores: the kernels take it out of the maximum.

    A negative scale negates the rotated queries instead; zero becomes too small to matter.
    """
    return (cos, sin, max(scale, TINY)) if scale >= 0 else (-cos, -sin, -scale)


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
        dtype = next(arguments[name].dtype for name in ("v", "x", "out") if name in arguments)
        multiplies = kernel not in (kernels.rotate, kernels.combine)
        rows = config.keys if kernel is kernels.backward_keys else config.queries
        matrix = "HGMMA" if self.warpgroups(rows, config, dtype) else "HMMA"
        words = [str(dtype).removeprefix("torch."), f"D={constants['D']}", f"{config.queries}x{config.keys}"]
        words += [name.lower() for name in ("MEMORY", "SPLIT") if constants.get(name)]
        self.found.append(
            Launch(
                name=" ".join([f"rope_attention.{kernel.__name__}", *words]),
                kernel=kernel,
                signature=signature(kernel, arguments, constants),
                constants=constants,
                aligned=tuple(name for name, value in arguments.items() if isinstance(value, Tensor)),
                num_warps=config.warps,
                num_stages=config.stages,
                registers=config.registers,
                spill_budget=0 if kernel in (kernels.rotate, kernels.forward, kernels.combine) else SPILLS,
                matrix=matrix if multiplies and dtype != torch.float32 else "",
                copies=multiplies,
            )
        )


def launches(capability: int) -> list[Launch]:
    """Every kernel in every configuration for bf16, and for fp32; for fp16, which shares bf16's, at D = 64."""
    found: dict[tuple, Launch] = {}
    dims = {torch.bfloat16: (16, 32, 64, 100, 128), torch.float16: (64,), torch.float32: (64, 128)}
    for dtype, sizes in dims.items():
        for each in [each for head_dim in sizes for each in _record(capability, dtype, head_dim)]:
            found.setdefault(each.key(), each)
    _plan.cache_clear()  # of machines that there are not
    return list(found.values())


def _record(capability: int, dtype: torch.dtype, head_dim: int) -> list[Launch]:
    """The launches of long and short segments, with and without memory, split and whole."""
    found = []
    for layout in (
        PackedLayout.documents([1024]),
        PackedLayout.with_memory([1024], [1024], 1024),
        PackedLayout.aligned([1], [1024]),
        PackedLayout.decode([1024], [[1]], 1),
    ):
        for processors in (0, 1 << 20):
            machine = _Recorder(capability, processors)
            q, k, v, memory_k, memory_v = (
                torch.empty(n, 4, head_dim, dtype=dtype, device=machine.device)
                for n in (layout.queries, layout.keys, layout.keys, layout.memory, layout.memory)
            )
            rest = layout.segments, *layout.to(machine.device).tables(Rotary(), head_dim, torch.float32), 1.0
            out, lse, rotated = _run_forward(machine, q, k, v, memory_k, memory_v, *rest)
            _run_backward(machine, (q, k, v), out, q, rotated, v, memory_k, memory_v, out, lse, *rest)
            found += machine.found
    return found
