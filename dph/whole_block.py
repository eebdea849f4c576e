"""A block of the backbone in one piece: one node of PyTorch's graph, its backward pass written out.

Of a block's time in a small step Python and PyTorch's graph take more than its arithmetic, and a GPU waits for them:
eight nodes, each with its own checks, where this is one. The numbers are those of the block taken in parts, which
``Block`` goes back to wherever somebody looks into it: hooks, other modules in its place, compilers, autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import _has_any_global_hook

from dph_kernels import PackedLayout, Rotary, autocast, dispatch
from dph_kernels.residual_norm import OPERATOR as NORM
from dph_kernels.residual_norm import WIDEST
from dph_kernels.rope_attention import OPERATOR as ATTENTION
from dph_kernels.rope_attention import joined_gradients
from dph_kernels.swiglu import OPERATOR as GATE

if TYPE_CHECKING:
    from dph.backbone import LayerMemory

AUTO = "auto"


class Shape(NamedTuple):
    """What a block knows beside its weights; ``eps`` of its two norms."""

    heads: int
    rope: Rotary
    eps: tuple[float, float]


def weights_of(modules: Sequence[tuple[nn.Module, type]], x: Tensor, layout: PackedLayout) -> list[Tensor] | None:
    """Weight and bias of each module that has them, for ``run_whole``; None where the block is to be taken in parts.

    Args:
        modules: of the block, and what each is where nobody has replaced it.
        x, layout: the block's inputs.
    """
    if _has_any_global_hook() or torch.compiler.is_compiling() or autocast.active(x):
        return None
    if x.ndim != 2 or x.numel() <= dispatch.FEW or x.shape[1] > WIDEST:
        return None
    if not layout.queries == layout.keys == len(x) or layout.query_positions.device != x.device:
        return None  # there are words for that
    found = []
    for module, kind in modules:
        if type(module) is not kind or _hooked(module):
            return None
        if "weight" in (own := module._parameters):
            found += own["weight"], own["bias"]
    if any(w is None or w.dtype != x.dtype or w.device != x.device for w in found):
        return None
    if torch.is_grad_enabled() and not all(w.requires_grad for w in found):
        return None  # a block that is trained in part
    return found if dispatch.unobserved([x, *found]) else None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def run_whole(
    x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, weights: Sequence[Tensor]
) -> Tensor:
    """The block of ``weights`` on ``x`` [T, C] -> [T, C], with gradients; a memory is one of keys and values."""
    if torch.is_grad_enabled():
        return _Block.apply(x, layout, memory, shape, *weights)
    return _forward(x, layout, memory, shape, weights)[0]


def _forward(
    x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The block's output and, for the backward pass, what ``_Block.backward`` unpacks."""
    norm, norm_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias = weights
    _, normed, moments = NORM.forward(x, None, norm, norm_bias, shape.eps[0], AUTO)
    projected = F.linear(normed, qkv, qkv_bias)
    q, k, v = split(projected, 3, shape.heads)
    remembered = (k[:0], v[:0]) if memory is None else memory.read(k)
    tables = layout.tables(shape.rope, q.shape[-1], torch.promote_types(x.dtype, torch.float32))
    rest = *remembered, layout.segments, *tables, q.shape[-1] ** -0.5, AUTO
    attended, lse, rotated = ATTENTION.forward(q, k, v, *rest)
    if memory is not None:
        memory.keep(rotated, v)
    update = F.linear(attended.flatten(1), out, out_bias)
    total, normed2, moments2 = NORM.forward(x, update, norm2, norm2_bias, shape.eps[1], AUTO)
    gate = F.linear(normed2, fc1)
    hidden = GATE.forward(gate, fc1_bias, AUTO)
    result = F.linear(hidden, fc2, fc2_bias).add_(total)
    attention = projected, attended, lse, rotated, *rest[:-2]
    return result, x, moments, normed, *attention, total, moments2, normed2, gate, hidden


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, *weights: Tensor
    ) -> Tensor:
        result, *kept = _forward(x, layout, memory, shape, weights)
        ctx.save_for_backward(*weights, *kept)
        ctx.heads = shape.heads
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        with torch.no_grad():
            grads = _backward(grad, kept, ctx.heads)
        d_x, *of_weights = _Once.apply(kept[0], *grads) if torch.is_grad_enabled() else grads
        return d_x, None, None, None, *of_weights


def _backward(grad: Tensor, kept: Sequence[Tensor], heads: int) -> tuple[Tensor, ...]:
    """Gradients of x and of the weights."""
    norm, _, qkv, _, out, _, norm2, _, fc1, fc1_bias, fc2, _, *kept = kept
    x, moments, normed, *attention, total, moments2, normed2, gate, hidden = kept
    projected, attended, lse, rotated, *rest = attention
    all_needed = [True, True, True]

    d_fc2, d_fc2_bias = _of_weights(grad, hidden)
    d_gate, d_fc1_bias = GATE.backward(grad.mm(fc2), gate, fc1_bias, True, True, AUTO)
    d_fc1, d_normed = d_gate.t().mm(normed2), d_gate.mm(fc1)
    del d_gate  # the largest of them
    d_total, d_norm2, d_norm2_bias = NORM.backward(grad, d_normed, total, norm2, moments2, all_needed, AUTO)

    d_out, d_out_bias = _of_weights(d_total, attended.flatten(1))
    d_attended = d_total.mm(out).view(attended.shape)
    q, _, v = split(projected, 3, heads)
    scale = q.shape[-1] ** -0.5
    known = q, rotated, v, *rest[:2], attended, lse, *rest[2:], scale, AUTO
    d_projected = joined_gradients(d_attended, *known).view(projected.shape)
    d_qkv, d_qkv_bias = _of_weights(d_projected, normed)
    d_x, d_norm, d_norm_bias = NORM.backward(d_total, d_projected.mm(qkv), x, norm, moments, all_needed, AUTO)

    of_attention = d_norm, d_norm_bias, d_qkv, d_qkv_bias, d_out, d_out_bias
    of_feed_forward = d_norm2, d_norm2_bias, d_fc1, d_fc1_bias, d_fc2, d_fc2_bias
    return d_x, *of_attention, *of_feed_forward


class _Once(torch.autograd.Function):
    """Gradients, whose own would lack what went through the kept tensors: there are none."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise RuntimeError("a block has gradients, but no gradients of gradients")


def _of_weights(grad: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a product's weight and bias, from that of its outputs."""
    return grad.t().mm(inputs), grad.sum(0)


def split(rows: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[T, parts * C] -> ``parts`` views [T, H, D]."""
    return rows.view(len(rows), parts, heads, rows.shape[1] // (parts * heads)).unbind(1)
