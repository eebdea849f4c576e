"""Decoding without the host: one query for each of many sequences, whose keys grow on the device from call to call.

A :class:`PackedLayout` is a constant that the host makes anew for every token. Here the bounds of what each query sees
are a tensor on the device, and the kernel's schedule, which the host makes, covers the keys of the next tokens too. All
tensors keep their addresses, so that a CUDA graph of a call can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dph_kernels import checks, dispatch
from dph_kernels.layout import Rotary
from dph_kernels.rope_attention.schedule import content_of
from dph_kernels.transfer import all_to_device


class Plan(Protocol):
    """Tables that a kernel derives from a layout."""

    def fill(self, content: bytes) -> bool:
        """Take over the segments of ``load``; returns whether all tensors kept their addresses."""


class GrowingLayout:
    """One query for each of T sequences, whose keys are all in the memory.

    Query i sees rows ``bounds[i, 0] <= j < bounds[i, 1]`` of its own and ``bounds[i, 2] <= j < bounds[i, 3]`` of its
    prompt; rows without keys are padding, whose results are zeros.

    Args:
        queries: T.
        memory: M, rows of memory.
        device: of the queries.

    Attributes:
        bounds: [T, 4] int32.
        query_positions: [T] int64, rotary positions.
        moved: how often ``load`` has allocated tensors: graphs that were captured before have lost theirs.
    """

    keys = 0

    def __init__(self, queries: int, memory: int, device: torch.device) -> None:
        self.queries, self.memory = queries, memory
        self.bounds = torch.zeros((queries, 4), dtype=torch.int32, device=device)
        self.query_positions = torch.zeros(queries, dtype=torch.int64, device=device)
        self.moved = 0
        self._content = np.zeros((0, 6), np.int64).tobytes()
        self._plans: dict[Hashable, Plan] = {}
        self._tables: dict[tuple[Rotary, int, torch.dtype], tuple[Tensor, ...]] = {}

    def load(self, own: np.ndarray, prompts: np.ndarray, last: np.ndarray) -> None:
        """Begin anew.

        Args:
            own: [S, 2] rows [start, end) of S <= T sequences; the keys of their queries are the last ones.
            prompts: [S, 2] rows of their prompts; the keys of a query are counted from its prompt's first one.
            last: [S] ends of the rows up to which ``advance`` may let each sequence grow.
        """
        count, number = len(own), np.arange(len(own))
        if count > self.queries or (last > self.memory).any() or (last < own[:, 1]).any():
            raise ValueError(f"expected at most {self.queries} sequences within {self.memory} rows, got {count}")
        table = np.stack([number, number + 1, own[:, 0], last, *prompts.T, number], 1)
        self._content = content_of(torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64)))
        bounds, positions = np.zeros((self.queries, 4), np.int32), np.zeros(self.queries, np.int64)
        bounds[:count] = np.concatenate([own, prompts], 1)
        positions[:count] = (own[:, 1] - own[:, 0]) + (prompts[:, 1] - prompts[:, 0]) - 1
        given = all_to_device([torch.from_numpy(bounds), torch.from_numpy(positions)], self.bounds.device)
        self.bounds.copy_(given[0])
        self.query_positions.copy_(given[1])
        self._tables.clear()
        for plan in self._plans.values():
            self.moved += not plan.fill(self._content)

    def advance(self, active: Tensor) -> None:
        """Let the ``active`` [T] sequences see one key more, whose query comes next."""
        self.bounds[:, 1] += active
        self.query_positions += active
        self._tables.clear()

    def plan(self, key: Hashable, make: Callable[[], Plan]) -> Any:
        """Return the plan of a kernel; on the first call, one that ``make`` returns, filled."""
        if key not in self._plans:
            plan = self._plans[key] = make()
            plan.fill(self._content)
        return self._plans[key]

    def tables(self, rope: Rotary, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines and sines [T, D/2] of the queries, and again as those of their keys."""
        key = (rope, head_dim, dtype)
        if key not in self._tables:
            self._tables[key] = rope.tables(self.query_positions, head_dim, dtype)
        return self._tables[key] * 2


def attend(
    q: Tensor, memory: tuple[Tensor, Tensor], layout: GrowingLayout, *, rope: Rotary, scale: float, backend: str
) -> Tensor:
    """Return attention [T, H, D] of queries [T, H, D] to rotated keys and values [M, K, D], without gradient.

    See ``rope_attention``, whose checks of new keys are made before.
    """
    checks.shape("q", q, layout.queries, "H", "D")
    for name, rows in zip(("memory[0]", "memory[1]"), memory, strict=True):
        checks.shape(name, rows, layout.memory, "K", q.shape[2])
        checks.dtype(name, rows, q.dtype)
        checks.device(name, rows, q.device)
    if not (key_heads := memory[0].shape[1]) or q.shape[1] % key_heads:
        raise ValueError(f"memory: expected a number of heads that divides q's H = {q.shape[1]}, got {key_heads}")
    checks.device("layout", layout.bounds, q.device)
    if q.device.type == "cpu" and backend == "auto":
        backend = "reference"  # the C++ kernel takes bounds from the host
    implementation = dispatch.implementation("rope_attention", q.device.type, backend, q.dtype)
    if not hasattr(implementation, "forward_growing"):
        raise ValueError(f"backend: expected one that reads bounds on the device, got {backend!r}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_cos, q_sin, _, _ = layout.tables(rope, q.shape[2], dtype)
    with torch.no_grad():
        return implementation.forward_growing(
            q=q, memory_k=memory[0], memory_v=memory[1], layout=layout, q_cos=q_cos, q_sin=q_sin, scale=scale
        )
