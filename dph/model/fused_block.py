"""A block, up to the product behind its gate, as one autograd node with a hand-written backward pass.

In a small step the Python and the autograd graph of a block cost more time than its arithmetic, and a GPU waits for
them. Here one node stands for seven, each of which has checks of its own. The numbers are those of the block in parts
(``dph.model.backbone.Block``); ``dph.model.backbone.block_form`` decides between the two forms.

``fc2`` stays outside of the node, so that gradient checkpointing does not recompute it.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.residual_norm import OPERATOR as NORM
from dph_kernels.residual_norm import WIDEST
from dph_kernels.rope_attention import OPERATOR as ATTENTION
from dph_kernels.rope_attention import check_inputs, joined_gradients
from dph_kernels.swiglu import OPERATOR as GATE

AUTO = "auto"


class BlockMemory(Protocol):
    """Interface of the memory of one layer (``dph.model.memory.LayerMemory``).

    Attributes:
        kind: "kv", rotated keys and values, or "hidden", attention inputs.
    """

    kind: str

    def read(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the stored rows [M, ...], of the shape of the rows of ``like`` [*, ...]."""

    def keep(self, *rows: Tensor) -> None:
        """Store the call's rows."""

    def concat_inputs(self, inputs: Tensor) -> Tensor:
        """Return stored and new attention inputs, oldest first, stream after stream (kind "hidden")."""


class BlockShape(NamedTuple):
    """Parameters of a block that are not tensors; the width C and the gated width 2F are sizes of its tensors.

    Attributes:
        heads: H of its attention.
        rope: rotary embedding of queries and keys.
        attention_eps, ffn_eps: epsilon of the norm before attention, of the norm before the feed-forward network.
    """

    heads: int
    rope: Rotary
    attention_eps: float
    ffn_eps: float

    def misfit(self, x: Tensor, weights: BlockWeights) -> str | None:
        """Return which tensor does not fit ``x`` [T, C], or which size is not supported; None if all fit."""
        width, gated = x.shape[1], weights.fc1_bias.numel()
        expected = BlockWeights(
            attention_norm=(width,),
            attention_norm_bias=(width,),
            qkv=(3 * width, width),
            qkv_bias=(3 * width,),
            out=(width, width),
            out_bias=(width,),
            ffn_norm=(width,),
            ffn_norm_bias=(width,),
            fc1=(gated, width),
            fc1_bias=(gated,),
        )
        for name, weight, sizes in zip(BlockWeights._fields, weights, expected, strict=True):
            if weight.shape != sizes:
                return f"{name} has shape {list(weight.shape)}, not {list(sizes)}"
        if width > WIDEST:
            return f"rows have more than {WIDEST} elements"
        if width % (2 * self.heads) or gated % 2:
            return f"the sizes {width} and {gated} do not divide into {self.heads} heads and two halves"
        return None


class BlockWeights(NamedTuple):
    """Weights of a block, their shapes or their gradients, in the order in which autograd takes them."""

    attention_norm: Any
    attention_norm_bias: Any
    qkv: Any
    qkv_bias: Any
    out: Any
    out_bias: Any
    ffn_norm: Any
    ffn_norm_bias: Any
    fc1: Any
    fc1_bias: Any


class _Saved(NamedTuple):
    """Tensors that the backward pass reads. The other biases are not among them: they may change before it."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    x: Tensor  # [T, C]
    moments: Tensor  # of its norm
    normed: Tensor  # [T, C]
    projected: Tensor  # [T, 3C]: queries, keys, values
    attended: Tensor  # [T, H, D]
    lse: Tensor  # [T, H]
    rotated: Tensor  # [T, H, D]: keys
    total: Tensor  # [T, C]: the residual stream after attention
    ffn_moments: Tensor
    ffn_normed: Tensor  # [T, C]
    gate: Tensor  # [T, 2F], without fc1_bias
    memory_k: Tensor  # [M, H, D]
    memory_v: Tensor
    segments: Tensor
    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


def fused_block(
    x: Tensor, layout: PackedLayout, memory: BlockMemory | None, shape: BlockShape, weights: BlockWeights
) -> tuple[Tensor, Tensor]:
    """Compute a block up to ``fc2``, with gradients; ``block_form`` has made sure that the arguments fit.

    Args:
        x: [T, C].
        layout: of T queries and as many keys.
        memory: of keys and values.

    Returns:
        (residual stream after attention [T, C], SwiGLU activations [T, F], which are the input of ``fc2``).

    Raises ValueError if the memory is not that of the layout.
    """
    if torch.is_grad_enabled() and weights.qkv.requires_grad:
        return _FusedBlock.apply(x, layout, memory, shape, *weights)
    total, activations, _ = _forward(x, layout, memory, shape, weights)
    return total, activations


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, layout: PackedLayout, memory: BlockMemory | None, shape: BlockShape, *weights: Any
    ) -> tuple[Tensor, Tensor]:
        total, activations, saved = _forward(x, layout, memory, shape, BlockWeights(*weights))
        ctx.save_for_backward(*saved)
        ctx.shape = shape
        return total, activations

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_activations: Tensor) -> tuple[Tensor | None, ...]:
        saved, device, needs_x = _Saved(*ctx.saved_tensors), d_total.device.type, ctx.needs_input_grad[0]
        autocast = torch.is_autocast_enabled(device)
        without_autocast = torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext()
        with torch.no_grad(), without_autocast:
            d_x, d_weights = _backward(d_total, d_activations, saved, ctx.shape, needs_x)
        if torch.is_grad_enabled():
            d_x, *d_weights = _FirstOrderOnly.apply(saved.qkv, d_x, *d_weights)
        return d_x if needs_x else None, None, None, None, *d_weights


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on gradients that raises when they are differentiated: the saved tensors are not part of their graph."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> None:
        raise RuntimeError("a block has gradients, but no gradients of gradients")


def _forward(
    x: Tensor, layout: PackedLayout, memory: BlockMemory | None, shape: BlockShape, weights: BlockWeights
) -> tuple[Tensor, Tensor, _Saved]:
    """Return the two results of ``fused_block`` and the tensors for ``_backward``."""
    _, normed, moments = NORM.forward(
        x=x,
        update=None,
        weight=weights.attention_norm,
        bias=weights.attention_norm_bias,
        eps=shape.attention_eps,
        kind="layer",
        backend=AUTO,
    )
    projected = F.linear(normed, weights.qkv, weights.qkv_bias)
    q, k, v = projected.unflatten(1, (3, shape.heads, -1)).unbind(1)
    memory_k, memory_v = (k[:0], v[:0]) if memory is None else memory.read(k)
    if memory is not None or layout.memory:
        check_inputs(q, k, v, memory_k, memory_v, layout)
    tables = layout.tables(shape.rope, q.shape[-1], torch.promote_types(x.dtype, torch.float32))
    fixed = dict(zip(FIXED, (memory_k, memory_v, layout.segments, *tables), strict=True))
    attended, lse, rotated = ATTENTION.forward(q=q, k=k, v=v, **fixed, scale=q.shape[-1] ** -0.5, backend=AUTO)
    if memory is not None:
        memory.keep(rotated, v)
    update = F.linear(attended.flatten(1), weights.out, weights.out_bias)
    total, ffn_normed, ffn_moments = NORM.forward(
        x=x,
        update=update,
        weight=weights.ffn_norm,
        bias=weights.ffn_norm_bias,
        eps=shape.ffn_eps,
        kind="layer",
        backend=AUTO,
    )
    gate = F.linear(ffn_normed, weights.fc1)
    activations = GATE.forward(projected=gate, bias=weights.fc1_bias, backend=AUTO)
    saved = _Saved(
        attention_norm=weights.attention_norm,
        qkv=weights.qkv,
        out=weights.out,
        ffn_norm=weights.ffn_norm,
        fc1=weights.fc1,
        fc1_bias=weights.fc1_bias,
        x=x,
        moments=moments,
        normed=normed,
        projected=projected,
        attended=attended,
        lse=lse,
        rotated=rotated,
        total=total,
        ffn_moments=ffn_moments,
        ffn_normed=ffn_normed,
        gate=gate,
        **fixed,
    )
    return total, activations, saved


FIXED = "memory_k", "memory_v", "segments", "q_cos", "q_sin", "k_cos", "k_sin"
"""Arguments of attention, forward and backward, that have no gradient."""


def _backward(
    d_total: Tensor, d_activations: Tensor, saved: _Saved, shape: BlockShape, needs_x: bool
) -> tuple[Tensor, BlockWeights]:
    """Return the gradients of x (empty unless ``needs_x``) and of the weights."""
    d_gate, d_fc1_bias = GATE.backward(
        grad=d_activations,
        projected=saved.gate,
        bias=saved.fc1_bias,
        projected_needed=True,
        bias_needed=True,
        backend=AUTO,
    )
    d_fc1, d_ffn_normed = d_gate.t().mm(saved.ffn_normed), d_gate.mm(saved.fc1)
    del d_gate  # the largest intermediate
    d_total, d_ffn_norm, d_ffn_norm_bias = NORM.backward(
        d_total=d_total,
        d_normed=d_ffn_normed,
        total=saved.total,
        weight=saved.ffn_norm,
        moments=saved.ffn_moments,
        needs=[True, True, True],
        backend=AUTO,
    )
    del d_ffn_normed

    d_out, d_out_bias = d_total.t().mm(saved.attended.flatten(1)), d_total.sum(0)
    d_attended = d_total.mm(saved.out).view(saved.attended.shape)
    q, _, v = saved.projected.unflatten(1, (3, shape.heads, -1)).unbind(1)
    d_projected = joined_gradients(
        grad=d_attended,
        q=q,
        rotated=saved.rotated,
        v=v,
        out=saved.attended,
        lse=saved.lse,
        **{name: getattr(saved, name) for name in FIXED},
        scale=q.shape[-1] ** -0.5,
        backend=AUTO,
    ).view(saved.projected.shape)
    del d_attended

    d_qkv, d_qkv_bias = d_projected.t().mm(saved.normed), d_projected.sum(0)
    d_x, d_attention_norm, d_attention_norm_bias = NORM.backward(
        d_total=d_total,
        d_normed=d_projected.mm(saved.qkv),
        total=saved.x,
        weight=saved.attention_norm,
        moments=saved.moments,
        needs=[needs_x, True, True],
        backend=AUTO,
    )
    return d_x, BlockWeights(
        attention_norm=d_attention_norm,
        attention_norm_bias=d_attention_norm_bias,
        qkv=d_qkv,
        qkv_bias=d_qkv_bias,
        out=d_out,
        out_bias=d_out_bias,
        ffn_norm=d_ffn_norm,
        ffn_norm_bias=d_ffn_norm_bias,
        fc1=d_fc1,
        fc1_bias=d_fc1_bias,
    )
