"""Attention workloads, and the plans by which rivals compute them.

A workload is a layout, which our operator runs directly. A rival follows a plan: batches of sequences of equal length
(padded if necessary), with a copy of the prompt per answer unless the plan shares it. A plan's inputs are arranged
before the timing starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dph_kernels import PackedLayout

# Query heads, key heads and head dimension of the workloads that gpu_check.sh times: the paper's, Llama 2 7B's,
# Llama 3.2 1B's, Llama 3.1 8B's and SmolLM2 135M's.
MODELS_HEADS = ((24, 24, 64), (32, 32, 128), (32, 8, 64), (32, 8, 128), (9, 3, 64))
NOTHING = torch.empty(1, 0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one call; rows -1 are padding.

    rows: [B, n] queries of the layout.
    cached: [B, c] rows of its memory, which come first among the keys.
    new: [B, s] its new keys.
    mask: [B or 1, n, c + s] bool, keys that each query attends to; None: causal, aligned at the end.
    """

    rows: Tensor
    cached: Tensor
    new: Tensor
    mask: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the mask as a tensor."""
        n, m = self.rows.shape[1], self.cached.shape[1] + self.new.shape[1]
        return torch.ones(1, n, m, dtype=torch.bool).tril(m - n) if self.mask is None else self.mask


@dataclass(frozen=True, eq=False)
class Workload:
    """A layout, the plans that give its result, and the speed goals.

    plans: name -> batches. "shared" computes no token twice.
    goals: direction -> a kind of rivals -> goal for our speed as a multiple of theirs.
    fresh: bytes of memory rows that calls cycle through, so that they come from memory and not from a cache.
    group: query heads per key head.
    head_dim: D.
    brief: timed by gpu_check.sh.
    """

    name: str
    layout: PackedLayout
    heads: int
    plans: dict[str, list[Batch]]
    directions: tuple[str, ...] = ("forward", "both")
    goals: dict[str, dict[str, float]] = field(default_factory=dict)
    fresh: int = 0
    group: int = 1
    head_dim: int = 64
    brief: bool = False

    @property
    def key_heads(self) -> int:
        """Return the number of heads of keys and values."""
        return self.heads // self.group

    def copies(self, item: int) -> int:
        """Return the number of input sets, at ``item`` bytes per number, that make up ``fresh``."""
        return max(-(-self.fresh // max(2 * item * self.head_dim * self.key_heads * self.layout.memory, 1)), 1)

    def flops(self, direction: str) -> int:
        """Return the necessary operations: 2 D per product and visible pair of query and key.

        There are 2 products forward and 5 backward; dk and dv are not needed for the detached memory.
        """
        q0, q1, k0, k1, p0, p1, _ = self.layout.segments.unbind(1)
        n, own, prefix = q1 - q0, k1 - k0, p1 - p0
        seeing = torch.minimum(n, own)
        causal, full = seeing * own - seeing * (seeing - 1) // 2, n * prefix
        detached = causal[k0 < self.layout.memory].sum() + full[p0 < self.layout.memory].sum()
        products = 2 * (causal + full).sum()
        if direction == "both":
            products += 5 * (causal + full).sum() - 2 * detached
        return 2 * self.head_dim * self.heads * int(products)

    def bytes_moved(self, direction: str, item: int) -> int:
        """Return the necessary bytes at ``item`` bytes per number: every used input once, every output once."""
        queries, seen = self.layout.queries, torch.zeros(self.layout.memory + self.layout.keys, dtype=torch.bool)
        for _, _, k0, k1, p0, p1, _ in self.layout.segments.tolist():
            seen[k0:k1] = seen[p0:p1] = True
        q_rows, k_rows = 2 * queries, 2 * int(seen.sum())  # q, out; k, v
        if direction == "both":
            q_rows += 4 * queries  # q, out, dout, dq
            k_rows += 2 * int(seen.sum()) + 2 * self.layout.keys  # k, v; dk, dv
        return item * self.head_dim * (self.heads * q_rows + self.key_heads * k_rows)


# The workloads


def workloads(large: bool) -> list[Workload]:
    """Return all workloads at full size, for a GPU, or at a smaller scale."""
    if large:
        lengths = draw(16, 64, 4096)
        pairs = draw(64, 64, 1024), [draw(2, 4, 256, seed) for seed in range(64)]
        questions = draw(256, 64, 512), [draw(4, 1, 32, seed) for seed in range(256)]
        return [
            *models_heads(2, 4096),
            *(documents(f"dense {n}", [n] * (16384 // n), 24) for n in (2048, 4096, 16384)),
            documents("dense 4096, 4 heads a key head", [4096] * 4, 24, group=4),
            memory("memory 2048 + 2048", 8, 2048, 2048, 24, goal=1.15),
            documents("documents of 64 to 4096", lengths, 24),
            branches("64 pairs", *pairs, 24, pad=1280, brief=True),
            branches(f"64 pairs, {_heads_text(32, 8, 128)}", *pairs, 32, group=4, head_dim=128, brief=True),
            branches("4 choices", *questions, 24, directions=("forward",)),
            *(decode(f"decode {n} on 1024", 1024, draw(n, 1, 64), 24, 128 << 20) for n in (1, 16, 128)),
            decode("decode 16 on 1024, 4 heads a key head", 1024, draw(16, 1, 64), 24, 128 << 20, group=4),
        ]
    pairs = draw(16, 16, 256), [draw(2, 4, 64, seed) for seed in range(16)]
    few = pairs[0][:4], pairs[1][:4]
    questions = draw(16, 32, 256), [draw(4, 1, 16, seed) for seed in range(16)]
    return [
        *models_heads(2, 256),
        documents("dense 1024", [1024], 12, goals={"both": {"SDPA": 0.9}}),
        documents("dense 1024, 4 heads a key head", [1024], 12, group=4),
        memory("memory 256 + 256", 2, 256, 256, 8),
        documents("documents of 16 to 512", draw(12, 16, 512), 12),
        branches("16 pairs", *pairs, 12, pad=512),
        branches(f"4 pairs, {_heads_text(32, 8, 128)}", *few, 32, group=4, head_dim=128, brief=True),
        branches("4 choices", *questions, 12, directions=("forward",)),
        *(decode(f"decode {n} on 1024", 1024, draw(n, 1, 64), 12, 64 << 20) for n in (1, 16, 128)),
        decode("decode 16 on 1024, 4 heads a key head", 1024, draw(16, 1, 64), 12, 64 << 20, group=4),
    ]


def models_heads(count: int, length: int) -> list[Workload]:
    """Return dense sequences with the heads of several models."""
    made = []
    for heads, key_heads, head_dim in MODELS_HEADS:
        name = f"dense {count} x {length}, {_heads_text(heads, key_heads, head_dim)}"
        shape = {"group": heads // key_heads, "head_dim": head_dim, "brief": True}
        made.append(documents(name, [length] * count, heads, **shape))
    return made


def _heads_text(heads: int, key_heads: int, head_dim: int) -> str:
    return f"{heads} heads of {head_dim}" + (f", {key_heads} of keys" if key_heads < heads else "")


def draw(count: int, low: int, high: int, seed: int = 0) -> list[int]:
    """Return ``count`` lengths from ``low`` to ``high``, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (count,), generator=generator).tolist()


def documents(
    name: str, lengths: Sequence[int], heads: int, goals: dict[str, dict[str, float]] | None = None, **shape: Any
) -> Workload:
    """Concatenated causal sequences; one batch if they are equally long."""
    layout = PackedLayout.documents(lengths)
    rows = torch.arange(layout.queries).split(list(lengths))
    if len(set(lengths)) == 1:
        rows = [torch.cat(rows)]
    rows = [r.view(-1, n) for r, n in zip(rows, lengths, strict=False)]
    plans = {"shared": [Batch(r, NOTHING, r) for r in rows]}
    return Workload(name, layout, heads, plans, goals=goals or {}, **shape)


def memory(name: str, batch: int, length: int, filled: int, heads: int, goal: float | None = None) -> Workload:
    """Streams that attend to a full memory and to themselves."""
    layout = PackedLayout.with_memory([length] * batch, [filled] * batch, filled)
    rows, cached = torch.arange(batch * length).view(batch, -1), torch.arange(batch * filled).view(batch, -1)
    goals = {"both": {"best rival": goal}} if goal else {}
    return Workload(name, layout, heads, {"shared": [Batch(rows, cached, rows)]}, goals=goals)


def branches(
    name: str, prompts: Sequence[int], answers: Sequence[Sequence[int]], heads: int, pad: int = 0,
    directions: tuple[str, ...] = ("forward", "both"), **shape: Any,
) -> Workload:  # fmt: skip
    """Answers to prompts. Plans: a document with its mask, or every answer after its own copy of the prompt."""
    shared, sequences, start = [], [], 0
    for prompt, tails in zip(prompts, answers, strict=True):
        rows = torch.arange(start, start + prompt + sum(tails))
        mask = PackedLayout.shared_prefix([prompt], [tails]).visible()
        shared.append(Batch(rows[None], NOTHING, rows[None], mask[None]))
        sequences += [torch.cat([rows[:prompt], tail]) for tail in rows[prompt:].split(list(tails))]
        start += len(rows)
    by_length = sorted(sequences, key=len)
    plans = {
        "shared": shared,
        "alone": [Batch(s[None], NOTHING, s[None]) for s in sequences],
        "by length": [_padded(by_length[i : i + 8]) for i in range(0, len(by_length), 8)],
    }
    if pad:
        plans["padded"] = [_padded(sequences, pad)]
    goals = {"both": {"without sharing": 1.5, "padded": 4}} if pad else {}
    return Workload(name, PackedLayout.shared_prefix(prompts, answers), heads, plans, directions, goals, **shape)


def _padded(sequences: Sequence[Tensor], length: int = 0) -> Batch:
    """Return sequences as one batch, padded at the end: causal attention needs no mask for that."""
    rows = pad_sequence(list(sequences), batch_first=True, padding_value=-1)
    rows = torch.nn.functional.pad(rows, (0, max(length - rows.shape[1], 0)), value=-1)
    return Batch(rows, NOTHING.expand(len(rows), 0), rows)


def decode(name: str, prompt: int, generated: Sequence[int], heads: int, fresh: int, group: int = 1) -> Workload:
    """A new token of each candidate. Plans: one cache of the prompt, or a cache per candidate."""
    capacity = max(generated)
    layout = PackedLayout.decode([prompt], [generated], capacity)
    rows = torch.arange(len(generated))
    own = prompt + rows[:, None] * capacity + torch.arange(capacity)
    caches = torch.cat([torch.arange(prompt).expand(len(generated), -1), own], dim=1)
    seen = torch.arange(prompt + capacity) < prompt + torch.tensor(generated)[:, None]
    plans = {
        "shared": [Batch(rows[None], torch.arange(layout.memory)[None], NOTHING, layout.visible()[None])],
        "padded": [Batch(rows[:, None], caches, NOTHING.expand(len(generated), 0), seen[:, None])],
    }
    return Workload(name, layout, heads, plans, ("forward",), fresh=fresh, group=group)
