"""Rivals of rotary attention, each adapted to a plan's batches (benchmarks/attention.py).

All take unrotated queries and new keys, as from a projection, and a rotated memory. Masks are made before the timing.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.attention import Batch, Workload
from dph_kernels import PackedLayout, Rotary, dispatch, rope_attention
from dph_kernels.rope_attention import schedule

ROPE = Rotary(reversed=True)

torch._dynamo.config.recompile_limit = 64  # one function is compiled for many shapes here


class Inputs(NamedTuple):
    """Rows of q and of new k and v, batch after batch; memory keys and values [B, c, H, D] of each batch."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: list[tuple[Tensor, Tensor]]
    grad: Tensor


Run = Callable[[Inputs], Tensor]


class Plan(NamedTuple):
    """Batches of a plan, their concatenated rows, and the cosines and sines of these rows."""

    batches: list[Batch]
    layout: PackedLayout
    rows: Tensor
    new: Tensor
    tables: list[Tensor]

    @classmethod
    def from_batches(cls, batches: list[Batch], layout: PackedLayout, head_dim: int = 64) -> "Plan":
        """Return the plan of ``batches`` over ``layout``."""
        device = layout.query_positions.device
        rows, new = (torch.cat([getattr(b, name).flatten() for b in batches]).to(device) for name in ("rows", "new"))
        q_cos, q_sin, k_cos, k_sin = layout.tables(ROPE, head_dim, torch.float32)
        tables = [*(pick(t, rows) for t in (q_cos, q_sin)), *(pick(t, new) for t in (k_cos, k_sin))]
        return cls(batches, layout, rows, new, tables)

    @property
    def causal(self) -> bool:
        """True if every batch is causal attention over whole sequences."""
        return all(b.mask is None and not b.cached.numel() for b in self.batches)

    def lay_out(self, q: Tensor, k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor], grad: Tensor) -> Inputs:
        """Return the layout's tensors in the plan's order; copies of a query share its upstream gradient."""
        copies = self.rows[self.rows >= 0].bincount(minlength=len(q))
        grad = pick(grad / copies[:, None, None].to(grad.dtype), self.rows)
        memories = [tuple(m[b.cached.to(m.device)] for m in memory) for b in self.batches]
        return Inputs(pick(q, self.rows), pick(k, self.new), pick(v, self.new), memories, grad)

    def rotated(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Return rotated queries and new keys."""
        q_cos, q_sin, k_cos, k_sin = self.tables
        rotate = compiled_rotation(given.q.device)
        return rotate(given.q, q_cos, q_sin), rotate(given.k, k_cos, k_sin) if len(given.k) else given.k

    def joined(self, new: Tensor, memory: list[Tensor]) -> Iterator[Tensor]:
        """Yield [B, c + s, H, D] of each batch: its memory and its rows of ``new``, joined if it has both."""
        parts = new.split([b.new.numel() for b in self.batches])
        for batch, part, cached in zip(self.batches, parts, memory, strict=True):
            both = [x for x in (cached, part.view(*batch.new.shape, *part.shape[1:])) if x.numel()]
            yield torch.cat(both, dim=1) if len(both) > 1 else both[0]


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of ``x``, zeros for -1."""
    return x[rows.clamp(min=0)].masked_fill((rows < 0).view(-1, *[1] * (x.ndim - 1)), 0)


def whole(work: Workload) -> list[Batch]:
    """Return everything as one sequence, as our operator takes it."""
    sizes = work.layout.queries, work.layout.memory, work.layout.keys
    return [Batch(*(torch.arange(n)[None] for n in sizes))]


# Rotation


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half, as models implement it."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@functools.cache
def compiled_rotation(device: torch.device) -> Callable[..., Tensor]:
    """Return ``rotate``, compiled if PyTorch's compiler works."""
    run = torch.compile(rotate, dynamic=True, fullgraph=True)
    try:
        run(torch.zeros(4, 3, 8, device=device), *torch.zeros(2, 4, 4, device=device))
    except Exception:  # any failure of the compiler on this machine
        return rotate
    return run


# Rivals: plan -> run(inputs) -> output rows


def ours(plan: Plan) -> Run:
    """Our operator on its layout, with the backend of ``auto``."""

    def run(given: Inputs) -> Tensor:
        memory = tuple(m[0] for m in given.memory[0])
        return rope_attention(given.q, given.k, given.v, plan.layout, rope=ROPE, memory=memory)

    return run


def our_sdpa(plan: Plan) -> Run:
    """SDPA after our own rotation kernel."""
    lengths = [b.rows.shape[1] for b in plan.batches for _ in range(len(b.rows))]
    layout = PackedLayout.documents(lengths).to(plan.rows.device)
    return lambda given: rope_attention(given.q, given.k, given.v, layout, rope=ROPE, backend="sdpa")


def by_batch(plan: Plan, attend: Callable[..., Tensor], masks: Sequence[Any]) -> Run:
    """Run ``attend(q, k, v, mask)`` of [B, H, n, D] on each batch."""

    def run(given: Inputs) -> Tensor:
        q, k = plan.rotated(given)
        queries = (x.view(*b.rows.shape, *x.shape[1:]) for x, b in zip(_split(q, plan), plan.batches, strict=True))
        keys, values = (plan.joined(x, [m[i] for m in given.memory]) for i, x in enumerate((k, given.v)))
        outs = [
            attend(*(x.transpose(1, 2) for x in three), mask).transpose(1, 2).flatten(0, 1)
            for *three, mask in zip(queries, keys, values, masks, strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return run


def _split(q: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    return q.split([b.rows.numel() for b in plan.batches])


def _grouped(q: Tensor, k: Tensor) -> dict[str, bool]:
    """Return PyTorch's option for fewer key heads than query heads, if there are: not all kernels accept it."""
    return {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def eager(plan: Plan) -> Run:
    """Dense masked softmax, batch by batch."""
    return by_batch(plan, _attend, _hidden(plan))


def compiled(plan: Plan) -> Run:
    """``eager`` compiled: for one static shape, or with dynamic shapes if there are several."""
    return by_batch(plan, torch.compile(_attend, dynamic=len(plan.batches) > 1, fullgraph=True), _hidden(plan))


def _hidden(plan: Plan) -> list[Tensor]:
    return [~b.dense()[:, None].to(plan.rows.device) for b in plan.batches]


def sdpa(plan: Plan, backend: SDPBackend | None = None) -> Run:
    """PyTorch's attention, with the kernel that it selects or with ``backend``."""
    masks = [_sdpa_mask(b, backend, plan.rows.device) for b in plan.batches]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            options = {"attn_mask": mask, "is_causal": mask is None} | _grouped(q, k)
            return scaled_dot_product_attention(q, k, v, **options)

    return by_batch(plan, attend, masks)


def _sdpa_mask(batch: Batch, backend: SDPBackend | None, device: torch.device) -> Any:
    """Return None if ``is_causal`` suffices, the form that the fastest kernels support, or else a tensor."""
    n, m = batch.rows.shape[1], batch.cached.shape[1] + batch.new.shape[1]
    if batch.mask is None and n == m:
        return None
    supported = device.type == "cuda" and backend not in (SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    if batch.mask is None and supported:
        return causal_lower_right(n, m)
    return batch.dense()[:, None].to(device)


def flex(plan: Plan) -> Run:
    """FlexAttention, compiled with the block mask of the layout."""
    device, (batch, *rest) = plan.rows.device, plan.batches
    n, m = batch.rows.shape[1], batch.cached.shape[1] + batch.new.shape[1]
    if rest:
        raise ValueError(f"flex: expected one batch, got {len(plan.batches)}")
    if len(plan.layout.segments) == len(batch.rows):  # streams of one shape

        def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + (m - n)
    else:
        bounds = schedule.bounds(schedule.content_of(plan.layout.segments), n, device=device).T.contiguous()

        def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((bounds[0, i] <= j) & (j < bounds[1, i])) | ((bounds[2, i] <= j) & (j < bounds[3, i]))

    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask  # without n x m in memory
    mask = make(seen, None, None, n, m, device=device)
    run = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return by_batch(plan, lambda q, k, v, block: run(q, k, v, block_mask=block, **_grouped(q, k)), [mask])


def varlen(plan: Plan) -> Run:
    """PyTorch's own FlashAttention over concatenated sequences."""
    from torch.nn.attention.varlen import varlen_attn

    older = "is_causal" in inspect.signature(varlen_attn).parameters  # up to PyTorch 2.10
    causal = {"is_causal": True} if older else {"window_size": (-1, 0)}
    return _packed(plan, lambda q, k, v, *ends: varlen_attn(q, k, v, *ends, **causal, **_grouped(q, k)))


def flash_attn(plan: Plan) -> Run:
    """The flash-attn package over concatenated sequences."""
    from flash_attn import flash_attn_varlen_func

    return _packed(plan, functools.partial(flash_attn_varlen_func, causal=True))


def flash_attn_4(plan: Plan) -> Run:
    """The flash-attn-4 package (CuTe DSL) over concatenated sequences."""
    if not installed("flash_attn.cute"):
        raise RuntimeError("not installed: pip install --pre flash-attn-4")
    from flash_attn.cute import flash_attn_varlen_func

    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

    def attend(q: Tensor, k: Tensor, v: Tensor, *ends: Any) -> Tensor:
        out = flash_attn_varlen_func(q, k, v, causal=True, **dict(zip(names, ends, strict=True)))
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp, too

    return _packed(plan, attend)


def _packed(plan: Plan, attend: Callable[..., Tensor]) -> Run:
    """Run ``attend`` on concatenated rows, causal and aligned at the end, with the sequences' start offsets."""
    q_lengths, k_lengths = [], []
    for b in plan.batches:
        q_lengths += [b.rows.shape[1]] * len(b.rows)
        k_lengths += [b.cached.shape[1] + b.new.shape[1]] * len(b.rows)
    ends = [pad(torch.tensor(x).cumsum(0), (1, 0)).to(plan.rows.device, torch.int32) for x in (q_lengths, k_lengths)]

    def run(given: Inputs) -> Tensor:
        q, k = plan.rotated(given)
        keys, values = k, given.v
        if not plan.causal:  # the memory comes before each stream's new rows
            keys, values = (
                torch.cat([x.flatten(0, 1) for x in plan.joined(new, [m[i] for m in given.memory])])
                for i, new in enumerate((k, given.v))
            )
        return attend(q, keys, values, *ends, max(q_lengths), max(k_lengths))

    return run


# Contenders


class Contender(NamedTuple):
    """An implementation with its plan.

    Attributes:
        kind: the goal that it counts for.
        brief: timed by gpu_check.sh, which has no time for compilers and dense masks.
    """

    who: str
    batches: list[Batch]
    make: Callable[[Plan], Run]
    kind: str | None = None
    brief: bool = True


def installed(module: str) -> bool:
    """Return whether a module of a package can be imported: flash-attn and flash-attn-4 share the name flash_attn."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def contenders(work: Workload, device: str, dtype: torch.dtype) -> Iterator[Contender]:
    """Yield ours first, then all rivals that can compute ``work`` on ``device``."""
    backend = dispatch.choose("rope_attention", device, "auto", dtype).backend
    yield Contender(f"ours ({backend})", whole(work), ours, "ours")
    name = next(n for n in ("alone", "padded", "shared") if n in work.plans)
    kind = "SDPA" if name == "shared" else "without sharing"
    batches = work.plans[name]
    note = "" if name == "shared" else ", prompts repeated"
    causal = all(b.mask is None for b in batches)
    yield Contender(f"eager{note}", batches, eager, None if name == "shared" else kind, brief=False)
    yield Contender(f"torch.compile{note}", batches, compiled, None if name == "shared" else kind, brief=False)
    if device == "cuda":
        for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            make = functools.partial(sdpa, backend=getattr(SDPBackend, kernel))
            yield Contender(f"SDPA {kernel.split('_')[0].lower()}{note}", batches, make, kind)
    else:
        yield Contender(f"SDPA{note}", batches, sdpa, kind)
    if causal and not work.layout.memory:
        yield Contender(f"SDPA, our rotation{note}", batches, our_sdpa, kind)
    if causal and device == "cuda":
        yield Contender(f"varlen_attn{note}", batches, varlen, kind)
        if installed("flash_attn.flash_attn_interface"):
            yield Contender(f"flash-attn{note}", batches, flash_attn, kind)
        yield Contender(f"flash-attn 4{note}", batches, flash_attn_4, kind)
    if name != "shared":
        yield Contender("SDPA, mask a document", work.plans["shared"], sdpa, "sharing")
        if "by length" in work.plans:
            yield Contender("SDPA, batches by length", work.plans["by length"], sdpa, kind)
            if "padded" in work.plans:
                length = work.plans["padded"][0].rows.shape[1]
                yield Contender(f"SDPA, padded to {length}", work.plans["padded"], sdpa, "padded")
    one = len(work.plans["shared"]) == 1 and work.plans["shared"][0].mask is None
    yield Contender("FlexAttention", work.plans["shared"] if one else whole(work), flex, brief=False)
