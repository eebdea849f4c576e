"""A block of the backbone, up to its last product, as one node of PyTorch's graph, its backward pass written out.

Of a block's time in a small step Python and PyTorch's graph take more than its arithmetic, and a GPU waits for them:
here is one node where the parts are seven, each with its own checks. The numbers are those of the block in parts, which
``Block`` goes back to wherever somebody looks into it (hooks, other modules or methods in a part's place, compilers,
autocast), and wherever the operators' checks would find something to say.

The last product stays outside, so that gradient checkpointing need not compute it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.module import _has_any_global_hook

from dph.model.memory import LayerMemory
from dph_kernels import PackedLayout, Rotary, autocast, dispatch
from dph_kernels.residual_norm import OPERATOR as NORM
from dph_kernels.residual_norm import WIDEST
from dph_kernels.rope_attention import OPERATOR as ATTENTION
from dph_kernels.rope_attention import check_inputs, joined_gradients
from dph_kernels.swiglu import OPERATOR as GATE

AUTO = "auto"


class Shape(NamedTuple):
    """What a block knows beside its weights; ``eps`` of its two norms."""

    heads: int
    rope: Rotary
    eps: tuple[float, float]


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether a module is what it was made as, and nobody looks on."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooked and "forward" not in vars(module)


def weights_of(modules: Sequence[nn.Module], x: Tensor, layout: PackedLayout, heads: int) -> list[Tensor] | None:
    """Weight and bias of each module, for ``run_whole``; None where the block is to be taken in parts.

    Args:
        modules: the norm, the products for queries, keys and values and behind attention, the other norm, the product
            before the gate; untouched.
        x, layout: the block's inputs.
        heads: of its attention.
    """
    if _has_any_global_hook() or autocast.active(x) or x.ndim != 2 or x.numel() <= dispatch.FEW:
        return None
    if not layout.queries == layout.keys == len(x) or layout.query_positions.device != x.device:
        return None
    found = [module._parameters.get(name) for module in modules for name in ("weight", "bias")]
    if any(w is None or w.dtype != x.dtype or w.device != x.device for w in found):
        return None
    width, inner = x.shape[1], len(found[-1])
    shapes = (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)
    if [w.shape for w in found] != [*shapes, (inner, width), (inner,)]:
        return None
    if width > WIDEST or width % (2 * heads) or inner % 2:
        return None
    trained = [w.requires_grad for w in found]
    if torch.is_grad_enabled() and not all(trained) and (x.requires_grad or any(trained)):
        return None  # a block that is trained in part
    return found if dispatch.unobserved([x, *found]) else None


def run_whole(
    x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The block of ``weights``, which ``weights_of`` has found and checked, up to its last product, with gradients.

    Args:
        x: [T, C].
        layout: of T queries and as many keys.
        memory: of keys and values.

    Returns:
        (the residual stream behind attention [T, C], what the gate lets into the last product [T, F]).

    Raises ValueError where the memory is not the layout's.
    """
    if torch.is_grad_enabled() and weights[0].requires_grad:
        return _Block.apply(x, layout, memory, shape, *weights)
    return _forward(x, layout, memory, shape, weights)[:2]


def _forward(
    x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The block's two outputs, and what ``_backward`` takes besides, in its order."""
    norm, norm_bias, qkv, qkv_bias, out, out_bias, norm2, norm2_bias, fc1, fc1_bias = weights
    _, normed, moments = NORM.forward(x, None, norm, norm_bias, shape.eps[0], AUTO)
    projected = F.linear(normed, qkv, qkv_bias)
    q, k, v = split(projected, 3, shape.heads)
    remembered = (k[:0], v[:0]) if memory is None else memory.read(k)
    if memory is not None or layout.memory:
        check_inputs(q, k, v, *remembered, layout)
    tables = layout.tables(shape.rope, q.shape[-1], torch.promote_types(x.dtype, torch.float32))
    fixed = *remembered, layout.segments, *tables
    attended, lse, rotated = ATTENTION.forward(q, k, v, *fixed, q.shape[-1] ** -0.5, AUTO)
    if memory is not None:
        memory.keep(rotated, v)
    update = F.linear(attended.flatten(1), out, out_bias)
    total, normed2, moments2 = NORM.forward(x, update, norm2, norm2_bias, shape.eps[1], AUTO)
    gate = F.linear(normed2, fc1)
    hidden = GATE.forward(gate, fc1_bias, AUTO)
    return total, hidden, x, moments, normed, projected, attended, lse, rotated, moments2, normed2, gate, *fixed


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, layout: PackedLayout, memory: LayerMemory | None, shape: Shape, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, hidden, *kept = _forward(x, layout, memory, shape, weights)
        norm, _, qkv, _, out, _, norm2, _, fc1, fc1_bias = weights
        ctx.save_for_backward(norm, qkv, out, norm2, fc1, fc1_bias, total, *kept)
        ctx.heads = shape.heads
        return total, hidden

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        kept, device = ctx.saved_tensors, d_total.device.type
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with torch.no_grad(), off:
            grads = _backward(d_total, d_hidden, kept, ctx.heads, ctx.needs_input_grad[0])
        d_x, *of_weights = _Once.apply(kept[0], *grads) if torch.is_grad_enabled() else grads
        return d_x if ctx.needs_input_grad[0] else None, None, None, None, *of_weights


def _backward(
    d_total: Tensor, d_hidden: Tensor, kept: Sequence[Tensor], heads: int, needs_x: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, empty where it needs none, and of the weights."""
    norm, qkv, out, norm2, fc1, fc1_bias, total, *kept = kept
    x, moments, normed, projected, attended, lse, rotated, moments2, normed2, gate, *fixed = kept

    d_gate, d_fc1_bias = GATE.backward(d_hidden, gate, fc1_bias, True, True, AUTO)
    d_fc1, d_normed2 = d_gate.t().mm(normed2), d_gate.mm(fc1)
    del d_gate  # the largest of them
    needs = [True, True, True]
    d_total, d_norm2, d_norm2_bias = NORM.backward(d_total, d_normed2, total, norm2, moments2, needs, AUTO)
    del d_normed2

    d_out, d_out_bias = d_total.t().mm(attended.flatten(1)), d_total.sum(0)
    d_attended = d_total.mm(out).view(attended.shape)
    q, _, v = split(projected, 3, heads)
    memory_k, memory_v, *tables = fixed
    known = q, rotated, v, memory_k, memory_v, attended, lse, *tables, q.shape[-1] ** -0.5, AUTO
    d_projected = joined_gradients(d_attended, *known).view(projected.shape)
    del d_attended

    d_qkv, d_qkv_bias = d_projected.t().mm(normed), d_projected.sum(0)
    needs = [needs_x, True, True]
    d_x, d_norm, d_norm_bias = NORM.backward(d_total, d_projected.mm(qkv), x, norm, moments, needs, AUTO)
    of_attention = d_norm, d_norm_bias, d_qkv, d_qkv_bias, d_out, d_out_bias
    return d_x, *of_attention, d_norm2, d_norm2_bias, d_fc1, d_fc1_bias


class _Once(torch.autograd.Function):
    """Gradients, whose own would lack what went through the kept tensors: there are none."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise RuntimeError("a block has gradients, but no gradients of gradients")


def split(rows: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[T, parts * C] -> ``parts`` views [T, H, D]."""
    return rows.view(len(rows), parts, heads, rows.shape[1] // (parts * heads)).unbind(1)
