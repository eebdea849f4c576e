"""Launcher of rotary attention's Triton kernels: configurations, grids and arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dph_kernels.checks import last_contiguous
from dph_kernels.launcher import (
    SPECIALIZED,
    Launch,
    LaunchConfig,
    LaunchRecorder,
    TritonDevice,
    cdiv,
    distinct,
    next_power_of_2,
    triton_device,
)
from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.rope_attention import schedule
from dph_kernels.rope_attention import triton_kernels as kernels
from dph_kernels.rope_attention.growing import GrowingLayout
from dph_kernels.rope_attention.schedule import Schedule
from dph_kernels.transfer import all_to_device

# Configurations

# block_m x block_n is the block of scores (queries x keys, BM x BN), block_k the step along the inner side in masked
# runs (STEP). Several heads of a group share the BM rows.
# For half precision, by architecture, kernel and head dimension; RAGGED: all that are not 16, 32, 64 or 128. "few" is
# the forward kernel if no segment has more than SHORT_SEGMENT rows. Chosen by the compiler's output (Triton 3.6 and
# 3.9): no spills in the forward pass and, if possible, two programs or more per SM, so that one computes its softmax
# while another multiplies. "forward" and "queries" of 64 on 90 are measured on an H200: with 128 rows documents and
# pairs are up to 22 and 8 % slower, and with 128 keys everything is.
RAGGED = 0
CONFIGS: dict[int, dict[str, dict[int, LaunchConfig]]] = {
    80: {
        "forward": {
            16: LaunchConfig(128, 64, 32, 4, 3, 192), 32: LaunchConfig(128, 64, 32, 4, 3, 192),
            64: LaunchConfig(128, 64, 32, 4, 3), 128: LaunchConfig(128, 64, 32, 8, 2, 255),
            RAGGED: LaunchConfig(64, 64, 32, 8, 2),
        },
        "few": {
            16: LaunchConfig(16, 64, 32, 1, 3), 32: LaunchConfig(16, 64, 32, 1, 3),
            64: LaunchConfig(16, 64, 32, 1, 3), 128: LaunchConfig(16, 32, 32, 4, 3),
            RAGGED: LaunchConfig(16, 32, 32, 4, 3, 168),
        },
        "queries": {
            16: LaunchConfig(128, 64, 32, 8, 2), 32: LaunchConfig(128, 64, 32, 8, 2),
            64: LaunchConfig(128, 64, 32, 8, 2), 128: LaunchConfig(64, 64, 32, 4, 2),
            RAGGED: LaunchConfig(64, 64, 32, 8, 2),
        },
        "keys": {
            16: LaunchConfig(64, 128, 64, 8, 2), 32: LaunchConfig(64, 128, 64, 8, 2),
            64: LaunchConfig(64, 128, 64, 8, 2), 128: LaunchConfig(32, 64, 32, 4, 2),
            RAGGED: LaunchConfig(64, 64, 32, 8, 2),
        },
    },
    90: {
        "forward": {
            16: LaunchConfig(64, 64, 32, 4, 3), 32: LaunchConfig(128, 64, 32, 8, 3, 128),
            64: LaunchConfig(64, 64, 32, 4, 3), 128: LaunchConfig(128, 64, 32, 8, 3, 255),
            RAGGED: LaunchConfig(128, 64, 32, 8, 2),
        },
        "few": {
            16: LaunchConfig(16, 64, 32, 1, 3), 32: LaunchConfig(16, 64, 32, 1, 3),
            64: LaunchConfig(16, 64, 32, 1, 3), 128: LaunchConfig(16, 32, 32, 4, 3),
            RAGGED: LaunchConfig(16, 32, 32, 4, 3, 168),
        },
        "queries": {
            16: LaunchConfig(64, 64, 32, 4, 2), 32: LaunchConfig(128, 64, 32, 8, 2, 128),
            64: LaunchConfig(64, 64, 32, 4, 3), 128: LaunchConfig(128, 64, 32, 8, 2),
            RAGGED: LaunchConfig(128, 64, 32, 8, 2),
        },
        "keys": {
            16: LaunchConfig(64, 64, 32, 4, 2), 32: LaunchConfig(64, 64, 32, 4, 2),
            64: LaunchConfig(64, 64, 32, 4, 2), 128: LaunchConfig(64, 128, 64, 8, 2),
            RAGGED: LaunchConfig(32, 64, 32, 8, 2),
        },
    },
}  # fmt: skip
# Exceptions for groups of query heads, whose kernels need more registers and would spill them: by kernel and head
# dimension.
GROUPED: dict[int, dict[tuple[str, int], LaunchConfig]] = {
    80: {("forward", 64): LaunchConfig(64, 64, 32, 4, 3, 255)},
    90: {("keys", 128): LaunchConfig(32, 64, 32, 8, 2)},
}
# For single precision, by the largest head dimension, on all architectures: without tensor cores, which would round its
# numbers to 11 bits.
PRECISE: dict[int, dict[str, LaunchConfig]] = {
    64: {
        "forward": LaunchConfig(64, 32, 16, 8, 2, 128), "few": LaunchConfig(16, 32, 16, 8, 2, 128),
        "queries": LaunchConfig(32, 32, 16, 4, 2), "keys": LaunchConfig(32, 32, 16, 8, 2),
    },
    128: {
        "forward": LaunchConfig(16, 32, 16, 8, 2, 128), "few": LaunchConfig(16, 32, 16, 8, 2, 128),
        "queries": LaunchConfig(32, 32, 16, 8, 2), "keys": LaunchConfig(16, 32, 16, 8, 2, 168),
    },
}  # fmt: skip
INTERPRETED = {
    "forward": LaunchConfig(32, 32, 16, 1, 1), "few": LaunchConfig(16, 32, 16, 1, 1),
    "queries": LaunchConfig(32, 32, 16, 1, 1), "keys": LaunchConfig(32, 32, 16, 1, 1),
}  # fmt: skip
SHORT_SEGMENT = 16
MOST_HEADS = 16  # query heads of a tile, as many as the smallest tile has rows
ROTATE = LaunchConfig(64, 0, 0, 4, 1)
MIN_BLOCKS = 4  # blocks of an item if the work of a tile is split
PROGRAMS_PER_SM = 2  # with fewer, work is split
SPILLS = 64  # bytes that the backward kernels may spill, outside of their inner loops
TINY = 1e-30
PLANS = 64  # size of the caches
CPU = torch.device("cpu")


def _config(gpu: TritonDevice, kernel: str, head_dim: int, dtype: torch.dtype, group: int) -> LaunchConfig:
    """Configuration of a kernel: that of the newest architecture that is not newer than the device."""
    if not gpu.capability:
        return INTERPRETED[kernel]
    configs = gpu.newest(CONFIGS, "rope_attention")
    if dtype == torch.float32:
        return PRECISE[64 if head_dim <= 64 else 128][kernel]
    exceptions = gpu.newest(GROUPED, "rope_attention") if group > 1 else {}
    size = head_dim if head_dim == _padded(head_dim) else RAGGED
    return exceptions.get((kernel, size)) or configs[kernel][size]


# Arguments of kernels

Heads = tuple[Tensor, int, int]  # data [rows, H, D], row and head stride in units of UNIT elements times SPECIALIZED


@functools.lru_cache(maxsize=PLANS)
def _strides(*strides: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """UNIT, the largest power of two up to 16 that divides all row and head strides, and these as in ``Heads``."""
    unit = math.gcd(16, *(step for row, head, _ in strides for step in (row, head)))
    return unit, [(row // unit * SPECIALIZED, head // unit * SPECIALIZED) for row, head, _ in strides]


def _heads(*tensors: Tensor) -> tuple[int, list[Heads]]:
    """UNIT, and the arguments of these tensors."""
    unit, strides = _strides(*[x.stride() for x in tensors])
    return unit, [(x, row, head) for x, (row, head) in zip(tensors, strides, strict=True)]


# Launches


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [T, H, D] with its halves rotated by the angles of ``cos`` and ``sin`` [T, D/2] fp32; contiguous."""
    return _rotate(triton_device(x.device), x, cos, sin)


def forward(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as ``reference.forward``."""
    return _forward(triton_device(inputs["q"].device), **inputs)


def backward(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Same arguments and results as ``reference.backward``."""
    q, v = inputs["q"], inputs["v"]
    results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, v, v))
    backward_into(results, **inputs)
    return results


def backward_into(results: Sequence[Tensor], **inputs: Any) -> None:
    """Write the results of ``backward`` into ``results``, which have equal strides, that of the last dimension 1."""
    _backward(triton_device(inputs["q"].device), results, **inputs)


def _rotate(gpu: TritonDevice, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = last_contiguous(x)
    rows, heads, head_dim = len(x) * x.shape[1], x.shape[1], x.shape[2]
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit, (argument,) = _heads(x)
    arguments = {"x": argument, "tables": (cos, sin), "rotated": rotated, "rows": rows, "H": heads}
    constants = {"D": head_dim, "BD": _padded(head_dim), "BM": ROTATE.block_m, "UNIT": unit}
    gpu.launch(kernels.rotate, (cdiv(rows, ROTATE.block_m),), ROTATE, arguments, constants)
    return rotated


class _Plan(NamedTuple):
    """Everything that follows from layout and sizes alone, computed once for all layers and steps.

    Attributes:
        work: on the device.
        schedule: tiles, runs and bounds, argument of the kernel.
        constants: of the kernel, without UNIT.
    """

    config: LaunchConfig
    work: Schedule
    schedule: tuple[Tensor, Tensor, Tensor]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=PLANS)
def _plan(
    gpu: TritonDevice, kernel: str, content: bytes, queries: int, keys: int, memory: int, heads: int, key_heads: int,
    head_dim: int, dtype: torch.dtype,
) -> _Plan:  # fmt: skip
    """Plan of the kernel "forward" ("few" if all segments are short), "queries" or "keys"."""
    device, group = gpu.device, heads // key_heads if key_heads else 1
    pack = _pack(group)
    if kernel == "forward" and _longest(content) * pack <= SHORT_SEGMENT:
        kernel = "few"
    config = _config(gpu, kernel, head_dim, dtype, group)
    constants = {
        "D": head_dim, "BD": _padded(head_dim), "BM": config.block_m, "BN": config.block_n, "STEP": config.block_k,
    }  # fmt: skip
    if kernel == "keys":
        constants["GROUP"] = group
        sizes = {"rows": config.block_n, "block": config.block_m}
        work = schedule.by_keys(content, queries, keys, memory, **sizes, device=device)
    else:
        constants |= {"PACK": pack, "SHARE": group // pack, "MEMORY": memory > 0}
        sizes, limit = {"rows": config.block_m // pack, "block": config.block_n}, 0
        if kernel != "queries":
            whole = schedule.by_queries(content, queries, memory, **sizes, limit=0, device=CPU)
            limit = _limit(whole, heads // pack, config, gpu)
        work = schedule.by_queries(content, queries, memory, **sizes, limit=limit, device=device)
    if kernel in ("forward", "few"):
        constants["SPLIT"] = work.split
    bounds = schedule.bounds(content, queries, device=device)
    return _Plan(config, work, (work.tiles, work.runs, bounds), constants)


def _forward(
    gpu: TritonDevice, q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rotated = _rotate(gpu, k, k_cos, k_sin)
    q_cos, q_sin, scale = _positive(q_cos, q_sin, scale)
    q, v, memory_k, memory_v = (last_contiguous(x) for x in (q, v, memory_k, memory_v))
    (queries, heads, head_dim), memory = q.shape, len(memory_k)
    sizes = queries, len(v), memory, heads, v.shape[1], head_dim, q.dtype
    plan = _plan(gpu, "forward", schedule.content_of(segments), *sizes)
    out, lse = _attend(gpu, plan, q, rotated, v, memory_k, memory_v, (q_cos, q_sin), scale)
    return out, lse, rotated


def _attend(
    gpu: TritonDevice, plan: _Plan, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor,
    tables: tuple[Tensor, Tensor], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return output [T, H, D] and log-sum-exp [T, H] of a plan; all tensors have strides of 1 in the last dimension."""
    config, work, schedule_tables, constants = plan
    (queries, heads), device = q.shape[:2], q.device
    items, packs = len(work.tiles), heads // constants["PACK"]
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty((queries, heads), dtype=torch.float32, device=device)
    partial, partial_lse = out, lse
    if work.split:
        partial_lse = torch.empty((items, packs, config.block_m), dtype=torch.float32, device=device)
        partial = torch.empty((*partial_lse.shape, constants["BD"]), dtype=torch.float32, device=device)
    unit, (q_heads, v_heads, *memory_heads) = _heads(q, v, memory_k, memory_v)
    arguments = {
        "q": q_heads, "k": rotated, "v": v_heads, "memory": tuple(memory_heads), "tables": tables, "out": partial,
        "lse": partial_lse, "schedule": schedule_tables, "scale": scale * kernels.LOG2_E.value, "M": len(memory_k),
        "H": heads,
    }  # fmt: skip
    gpu.launch(kernels.forward, (items, packs), config, arguments, {**constants, "UNIT": unit})
    if work.split:
        arguments = {
            "parts": partial, "parts_lse": partial_lse, "out": out, "lse": lse, "schedule": schedule_tables,
            "pieces": work.pieces, "order": work.order, "H": heads,
        }  # fmt: skip
        constants = {name: constants[name] for name in ("D", "BD", "BM", "PACK")}
        gpu.launch(kernels.combine, (len(work.pieces) - 1, packs), config, arguments, constants)
    return out, lse


def forward_growing(
    *, q: Tensor, memory_k: Tensor, memory_v: Tensor, layout: GrowingLayout, q_cos: Tensor, q_sin: Tensor, scale: float
) -> Tensor:
    """Same arguments and result as ``reference.forward_growing``."""
    sizes = triton_device(q.device), layout, q.shape[1], memory_k.shape[1], q.shape[2], q.dtype
    plan: _GrowingPlan = layout.plan(sizes[2:], lambda: _GrowingPlan(*sizes))
    q_cos, q_sin, scale = _positive(q_cos, q_sin, scale)
    q, memory_k, memory_v = (last_contiguous(x) for x in (q, memory_k, memory_v))
    new = memory_k.new_empty((0, *memory_k.shape[1:]))  # all keys are in the memory
    out, _ = _attend(sizes[0], plan.plan, q, new, new, memory_k, memory_v, (q_cos, q_sin), scale)
    return out


class _GrowingPlan:
    """A plan whose tables on the device are rewritten, and whose grids stay the same, while they have room.

    Work is always split, and the tables end with empty items and tiles. See ``growing.Plan``.
    """

    def __init__(
        self, gpu: TritonDevice, layout: GrowingLayout, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.gpu, self.layout, self.heads = gpu, layout, heads
        group = heads // key_heads
        self.pack, config = _pack(group), _config(gpu, "few", head_dim, dtype, group)
        self.config = config
        self.constants = {
            "D": head_dim, "BD": _padded(head_dim), "BM": config.block_m, "BN": config.block_n, "STEP": config.block_k,
            "PACK": self.pack, "SHARE": group // self.pack, "MEMORY": True, "SPLIT": True,
        }  # fmt: skip
        self.plan: _Plan | None = None

    def fill(self, content: bytes) -> bool:
        """See ``growing.Plan``."""
        layout, config = self.layout, self.config
        sizes = {"rows": config.block_m // self.pack, "block": config.block_n, "growing": True, "device": CPU}
        whole = schedule.by_queries(content, layout.queries, layout.memory, **sizes)
        limit = _limit(whole, self.heads // self.pack, config, self.gpu)
        work = schedule.by_queries(content, layout.queries, layout.memory, **sizes, limit=limit) if limit else whole
        items, tiles = len(work.tiles), len(whole.tiles)
        pieces = np.arange(items + 1) if work.pieces is None else work.pieces.numpy()
        order = np.arange(items) if work.order is None else work.order.numpy()
        needed = (items + 1, len(work.runs), tiles + 1, items + 1)  # at least one empty item
        is_new = self.plan is None or any(
            count > len(table) for count, table in zip(needed, self.plan.work, strict=True)
        )
        if is_new:
            room = [next_power_of_2(count) for count in needed]
            shapes = (room[0], 6), (room[1], 2), (room[2],), (room[0],)
            made = [torch.zeros(shape, dtype=torch.int32, device=self.gpu.device) for shape in shapes]
            self.plan = _Plan(config, Schedule(*made), (made[0], made[1], layout.bounds), self.constants)
        tables = []
        for values, table, rest in zip(
            (work.tiles.numpy(), work.runs.numpy(), pieces, order), self.plan.work, (0, 0, items, items), strict=True
        ):
            padded = np.full(table.shape, rest, np.int32)
            padded[: len(values)] = values
            tables.append(torch.from_numpy(padded))
        for table, values in zip(self.plan.work, all_to_device(tables, self.gpu.device), strict=True):
            table.copy_(values)
        return not is_new


def _backward(
    gpu: TritonDevice, results: Sequence[Tensor], grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor,
    memory_v: Tensor, out: Tensor, lse: Tensor, segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor,
    k_sin: Tensor, scale: float,
) -> None:  # fmt: skip
    dq, dk, dv = results
    q_cos, q_sin, scale = _positive(q_cos, q_sin, scale)
    grad, q, v, memory_k, memory_v, out = (last_contiguous(x) for x in (grad, q, v, memory_k, memory_v, out))
    rotated, lse = rotated.contiguous(), lse.contiguous()  # they are already, as results of the forward pass
    (queries, heads, head_dim), memory, device = q.shape, len(memory_k), q.device
    content, sizes = schedule.content_of(segments), (queries, len(v), memory, heads, v.shape[1], head_dim, q.dtype)
    common = {
        "k": rotated, "rotated": torch.empty(q.shape, dtype=q.dtype, device=device),
        "sums": torch.empty((heads, queries, 4), dtype=torch.float32, device=device),
        "scales": (scale * kernels.LOG2_E.value, scale), "M": memory, "T": queries, "H": heads,
    }  # fmt: skip

    config, work, schedule_tables, constants = _plan(gpu, "queries", content, *sizes)
    unit, (grad_heads, q_heads, out_heads, v_heads, dq_heads, *memory_heads) = _heads(
        grad, q, out, v, dq, memory_k, memory_v
    )
    arguments = {
        **common, "grad": grad_heads, "q": q_heads, "v": v_heads, "memory": tuple(memory_heads), "out": out_heads,
        "lse": lse, "tables": (q_cos, q_sin), "dq": dq_heads, "schedule": schedule_tables,
    }  # fmt: skip
    grid = (len(work.tiles), heads // constants["PACK"])
    gpu.launch(kernels.backward_queries, grid, config, arguments, {**constants, "UNIT": unit})

    config, work, schedule_tables, constants = _plan(gpu, "keys", content, *sizes)
    unit, (grad_heads, v_heads, dk_heads, dv_heads) = _heads(grad, v, dk, dv)
    arguments = {
        **common, "grad": grad_heads, "v": v_heads, "tables": (k_cos, k_sin), "dk": dk_heads, "dv": dv_heads,
        "schedule": schedule_tables,
    }  # fmt: skip
    grid = (len(work.tiles), v.shape[1])
    gpu.launch(kernels.backward_keys, grid, config, arguments, {**constants, "UNIT": unit})


def _padded(head_dim: int) -> int:
    """BD, which is at least 16: tensor cores multiply no less."""
    return max(16, next_power_of_2(head_dim))


def _longest(content: bytes) -> int:
    segments = schedule.segments_of(content)
    return int((segments[:, 1] - segments[:, 0]).max(initial=0))


def _pack(group: int) -> int:
    """Query heads of a group that a tile holds: the most that divide the group and fit into every configuration."""
    return max(size for size in range(1, MOST_HEADS + 1) if group % size == 0)


def _limit(work: Schedule, heads: int, config: LaunchConfig, gpu: TritonDevice) -> int:
    """Blocks of keys that an item may have, so that there are programs for all SMs; 0 if there are without a limit."""
    splits = PROGRAMS_PER_SM * gpu.sm_count // max(len(work.tiles) * heads, 1)
    if splits < 2 or not len(work.tiles):
        return 0
    first, _, last = work.tiles[0, 2:5].tolist()  # the tile with the most work comes first
    low, high = work.runs[first:last].unbind(1)
    blocks = int(((high - low + config.block_n - 1) // config.block_n).sum())
    limit = max(cdiv(blocks, splits), MIN_BLOCKS)
    return limit if limit < blocks else 0


def _positive(cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """Tables of the queries and a positive scale with the same scores: the kernels scale after taking the maximum.

    A negative scale negates the rotated queries instead; zero becomes too small to matter.
    """
    return (cos, sin, max(scale, TINY)) if scale >= 0 else (-cos, -sin, -scale)


# Audit


def _product_rows(kernel: Any, constants: Mapping[str, Any]) -> int:
    """Rows of the scores' products, which are transposed in ``backward_keys``."""
    if "BN" not in constants:
        return 0
    return constants["BN" if kernel is kernels.backward_keys else "BM"]


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: all kernels and configurations for bf16 and fp32; for fp16, which shares them, D = 64.

    Groups of heads are 1, and 4 for the head dimensions of models that have groups.
    """
    recorded: list[Launch] = []
    for dtype, group, dims in (
        (torch.bfloat16, 1, (16, 32, 64, 100, 128)),
        (torch.float16, 1, (64,)),
        (torch.float32, 1, (64, 128)),
        (torch.bfloat16, 4, (64, 80, 96, 128)),
        (torch.float32, 4, (64, 128)),
    ):
        for head_dim in dims:
            recorded += _record(capability, dtype, group, head_dim)
    _plan.cache_clear()  # of recorders
    return distinct(recorded)


def _record(capability: int, dtype: torch.dtype, group: int, head_dim: int) -> list[Launch]:
    """Launches for long and short segments, with and without memory, split and whole."""
    budgets = {"backward_queries": SPILLS, "backward_keys": SPILLS}
    recorded: list[Launch] = []
    for layout in (
        PackedLayout.documents([1024]),
        PackedLayout.with_memory([1024], [1024], 1024),
        PackedLayout.aligned([1], [1024]),
        PackedLayout.decode([1024], [[1]], 1),
    ):
        for sm_count in (0, 1 << 20):
            gpu = LaunchRecorder(capability, sm_count, _product_rows, budgets)
            rows = {"q": layout.queries, "k": layout.keys, "v": layout.keys}
            rows |= {"memory_k": layout.memory, "memory_v": layout.memory}
            inputs: dict[str, Any] = {"segments": layout.segments, "scale": 1.0}
            for name, count in rows.items():
                heads = 4 if name == "q" else 4 // group
                inputs[name] = torch.empty(count, heads, head_dim, dtype=dtype, device=gpu.device)
            tables = layout.to(gpu.device).tables(Rotary(), head_dim, torch.float32)
            inputs |= zip(("q_cos", "q_sin", "k_cos", "k_sin"), tables, strict=True)
            out, lse, rotated = _forward(gpu, **inputs)
            results = inputs["q"], inputs.pop("k"), inputs["v"]
            _backward(gpu, results, grad=out, rotated=rotated, out=out, lse=lse, **inputs)
            recorded += gpu.launches
    return recorded
