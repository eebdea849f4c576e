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
from dph_kernels.linear import linear, may_differ
from dph_kernels.residual_norm import OPERATOR as NORM
from dph_kernels.residual_norm import WIDEST
from dph_kernels.rope_attention import OPERATOR as ATTENTION
from dph_kernels.rope_attention import check_inputs, joined_gradients, rotated_keys, split_heads
from dph_kernels.swiglu import OPERATOR as GATE

AUTO = "auto"


class BlockMemory(Protocol):
    """Interface of the memory of one layer (``dph.model.memory.LayerMemory``, ``dph.model.kv_pool.PoolLayer``).

    Attributes:
        kind: "kv", rotated keys and values; "decode", those of the call too, which are stored before; or "hidden",
            attention inputs.
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
        heads, key_heads, head_dim: H, K and D of its attention.
        rope: rotary embedding of queries and keys.
        norm: kind of the norms before attention and before the feed-forward network.
        attention_eps, ffn_eps: their epsilons.
        qk_eps: epsilon of the RMSNorm of queries and keys; None without one.
    """

    heads: int
    key_heads: int
    head_dim: int
    rope: Rotary
    norm: str
    attention_eps: float
    ffn_eps: float
    qk_eps: float | None = None

    def misfit(self, x: Tensor, weights: BlockWeights) -> str | None:
        """Return which tensor does not fit ``x`` [T, C], or which size is not supported; None if all fit."""
        width, gated, head_dim = x.shape[1], len(weights.fc1), self.head_dim
        joined = (self.heads + 2 * self.key_heads) * head_dim
        expected = BlockWeights(
            attention_norm=(width,),
            attention_norm_bias=(width,),
            qkv=(joined, width),
            qkv_bias=(joined,),
            out=(width, self.heads * head_dim),
            out_bias=(width,),
            ffn_norm=(width,),
            ffn_norm_bias=(width,),
            fc1=(gated, width),
            fc1_bias=(gated,),
            q_norm=(head_dim,),
            k_norm=(head_dim,),
        )
        for name, weight, sizes in zip(BlockWeights._fields, weights, expected, strict=True):
            if weight is not None and weight.shape != sizes:
                return f"{name} has shape {list(weight.shape)}, not {list(sizes)}"
        if width > WIDEST:
            return f"rows have more than {WIDEST} elements"
        if head_dim % 2 or gated % 2:
            return f"heads of {head_dim} or gates of {gated} elements do not divide into two halves"
        return None


class BlockWeights(NamedTuple):
    """Weights of a block, their shapes or their gradients, in the order in which autograd takes them.

    Those named in ``OPTIONAL`` may be None.
    """

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
    q_norm: Any
    k_norm: Any


OPTIONAL = {name for name in BlockWeights._fields if name.endswith("_bias")} | {"q_norm", "k_norm"}


class _Saved(NamedTuple):
    """Tensors that the backward pass reads. The other biases are not among them: they may change before it."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    fc1: Tensor
    fc1_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    x: Tensor  # [T, C]
    moments: Tensor  # of its norm
    normed: Tensor  # [T, C]
    projected: Tensor  # [T, (H + 2K) D]: queries, keys, values
    q: Tensor | None  # [T, H, D]: normed queries
    q_moments: Tensor | None
    k_moments: Tensor | None
    attended: Tensor  # [T, H, D]
    lse: Tensor  # [T, H]
    rotated: Tensor  # [T, K, D]: keys
    total: Tensor  # [T, C]: the residual stream after attention
    ffn_moments: Tensor
    ffn_normed: Tensor  # [T, C]
    gate: Tensor  # [T, 2F], without fc1_bias
    memory_k: Tensor  # [M, K, D]
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
        needs_x, _, _, _, *needs_weights = ctx.needs_input_grad
        saved, device, needed = _Saved(*ctx.saved_tensors), d_total.device.type, BlockWeights(*needs_weights)
        autocast = torch.is_autocast_enabled(device)
        without_autocast = torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext()
        with torch.no_grad(), without_autocast:
            d_x, d_weights = _backward(d_total, d_activations, saved, ctx.shape, needs_x, needed)
        if torch.is_grad_enabled():
            d_x, *d_weights = _FirstOrderOnly.apply(saved.qkv, d_x, *d_weights)  # keeps those that are None
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
        kind=shape.norm,
        backend=AUTO,
    )
    product = linear if may_differ(x) else F.linear
    projected = product(normed, weights.qkv, weights.qkv_bias)
    q, k, v = split_heads(projected, shape.heads, shape.key_heads)
    normed_q = q_moments = k_moments = None
    if weights.q_norm is not None:
        norm = {"update": None, "bias": None, "eps": shape.qk_eps, "kind": "rms", "backend": AUTO}
        _, normed_q, q_moments = NORM.forward(x=q, weight=weights.q_norm, **norm)
        _, k, k_moments = NORM.forward(x=k, weight=weights.k_norm, **norm)
        q = normed_q
    tables = layout.tables(shape.rope, q.shape[-1], torch.promote_types(x.dtype, torch.float32))
    if memory is not None and memory.kind == "decode":
        k, v = stored_first(memory, k, v, tables)
    memory_k, memory_v = (k[:0], v[:0]) if memory is None else memory.read(k)
    if memory is not None or layout.memory:
        check_inputs(q, k, v, memory_k, memory_v, layout)
    fixed = dict(zip(FIXED, (memory_k, memory_v, layout.segments, *tables), strict=True))
    attended, lse, rotated = ATTENTION.forward(q=q, k=k, v=v, **fixed, scale=q.shape[-1] ** -0.5, backend=AUTO)
    if memory is not None and memory.kind == "kv":
        memory.keep(rotated, v)
    update = product(attended.flatten(1), weights.out, weights.out_bias)
    total, ffn_normed, ffn_moments = NORM.forward(
        x=x,
        update=update,
        weight=weights.ffn_norm,
        bias=weights.ffn_norm_bias,
        eps=shape.ffn_eps,
        kind=shape.norm,
        backend=AUTO,
    )
    gate = product(ffn_normed, weights.fc1)
    activations = GATE.forward(projected=gate, bias=weights.fc1_bias, backend=AUTO)
    saved = _Saved(
        attention_norm=weights.attention_norm,
        qkv=weights.qkv,
        out=weights.out,
        ffn_norm=weights.ffn_norm,
        fc1=weights.fc1,
        fc1_bias=weights.fc1_bias,
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        x=x,
        moments=moments,
        normed=normed,
        projected=projected,
        q=normed_q,
        q_moments=q_moments,
        k_moments=k_moments,
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


def stored_first(
    memory: BlockMemory, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Store the keys and values of a decoding call, and return the new ones that attention reads in addition: none."""
    memory.keep(rotated_keys(k, *tables[:2]), v)  # a token's key has the position of its query
    return k[:0], v[:0]


FIXED = "memory_k", "memory_v", "segments", "q_cos", "q_sin", "k_cos", "k_sin"
"""Arguments of attention, forward and backward, that have no gradient."""


def _backward(
    d_total: Tensor, d_activations: Tensor, saved: _Saved, shape: BlockShape, needs_x: bool, needed: BlockWeights
) -> tuple[Tensor, BlockWeights]:
    """Return the gradients of x (empty unless ``needs_x``) and of the ``needed`` weights, None for the others."""
    d_gate, d_fc1_bias = GATE.backward(
        grad=d_activations,
        projected=saved.gate,
        bias=saved.fc1_bias,
        projected_needed=True,
        bias_needed=needed.fc1_bias,
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
        needs=[True, True, needed.ffn_norm_bias],
        backend=AUTO,
    )
    del d_ffn_normed

    d_out = d_total.t().mm(saved.attended.flatten(1))
    d_out_bias = d_total.sum(0) if needed.out_bias else None
    d_attended = d_total.mm(saved.out).view(saved.attended.shape)
    q, k, v = split_heads(saved.projected, shape.heads, shape.key_heads)
    d_heads = joined_gradients(
        grad=d_attended,
        q=q if saved.q is None else saved.q,
        rotated=saved.rotated,
        v=v,
        out=saved.attended,
        lse=saved.lse,
        **{name: getattr(saved, name) for name in FIXED},
        scale=shape.head_dim**-0.5,
        backend=AUTO,
    )
    del d_attended
    d_q_norm = d_k_norm = None
    if saved.q_norm is not None:
        norm = {"d_total": None, "needs": [True, True, False], "backend": AUTO}
        d_q, d_k, _ = d_heads.split((shape.heads, shape.key_heads, shape.key_heads), 1)
        d_raw_q, d_q_norm, _ = NORM.backward(
            d_normed=d_q, total=q, weight=saved.q_norm, moments=saved.q_moments, **norm
        )
        d_raw_k, d_k_norm, _ = NORM.backward(
            d_normed=d_k, total=k, weight=saved.k_norm, moments=saved.k_moments, **norm
        )
        d_q.copy_(d_raw_q)
        d_k.copy_(d_raw_k)
    d_projected = d_heads.view(saved.projected.shape)

    d_qkv = d_projected.t().mm(saved.normed)
    d_qkv_bias = d_projected.sum(0) if needed.qkv_bias else None
    d_x, d_attention_norm, d_attention_norm_bias = NORM.backward(
        d_total=d_total,
        d_normed=d_projected.mm(saved.qkv),
        total=saved.x,
        weight=saved.attention_norm,
        moments=saved.moments,
        needs=[needs_x, True, needed.attention_norm_bias],
        backend=AUTO,
    )
    return d_x, BlockWeights(
        attention_norm=d_attention_norm,
        attention_norm_bias=d_attention_norm_bias if needed.attention_norm_bias else None,
        qkv=d_qkv,
        qkv_bias=d_qkv_bias,
        out=d_out,
        out_bias=d_out_bias,
        ffn_norm=d_ffn_norm,
        ffn_norm_bias=d_ffn_norm_bias if needed.ffn_norm_bias else None,
        fc1=d_fc1,
        fc1_bias=d_fc1_bias if needed.fc1_bias else None,
        q_norm=d_q_norm,
        k_norm=d_k_norm,
    )
