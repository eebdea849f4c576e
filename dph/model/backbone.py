"""The backbone: tokens, packed end to end as rows, to hidden states.

Dense batches, preference pairs, streams with memory and decoding differ only in their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from dph.model.fused_block import OPTIONAL, BlockMemory, BlockShape, BlockWeights, fused_block, stored_first
from dph_kernels import checks, dispatch
from dph_kernels.layout import PackedLayout
from dph_kernels.linear import apply_linear
from dph_kernels.residual_norm import residual_norm
from dph_kernels.rope_attention import rope_attention, split_heads
from dph_kernels.rope_attention.growing import GrowingLayout
from dph_kernels.swiglu import swiglu
from dph_kernels.torch_private import has_any_global_hook


class LayerNorm(nn.LayerNorm):
    """LayerNorm, optionally with the residual connection before it."""

    kind = "layer"

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x`` [T, C], or of each head of [T, H, D]; with an update, ``x + update`` and its norm."""
        total, normed = residual_norm(x, update, self.weight, self.bias, eps=self.eps, kind=self.kind)
        return normed if update is None else (total, normed)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (https://arxiv.org/abs/1910.07467), optionally with the residual connection before it."""

    kind = "rms"

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.register_parameter("bias", None)

    forward = LayerNorm.forward


NORMS = {norm.kind: norm for norm in (LayerNorm, RMSNorm)}


class Attention(nn.Module):
    """Rotary multi-head attention over a packed layout, with or without memory; the block applies the two products.

    With ``config.qk_norm`` the queries and keys of each head are normalised before their rotation (Qwen3).
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )  # fmt: skip
        self.rope = config.rope
        self.backend = "auto"  # of rope_attention
        self.qkv = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.key_heads) * self.head_dim, bias=config.qkv_bias
        )
        self.out = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.layer_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.layer_norm_eps)

    def forward(
        self, projected: Tensor, layout: PackedLayout | GrowingLayout, memory: BlockMemory | None = None
    ) -> Tensor:
        """Queries, keys and values [T, (H + 2K) D], and a memory of keys and values -> [T, HD]."""
        q, k, v = split_heads(projected, self.heads, self.key_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if memory is None:
            return rope_attention(q, k, v, layout, rope=self.rope, backend=self.backend).flatten(1)
        if memory.kind == "decode":
            dtype = torch.promote_types(q.dtype, torch.float32)
            k, v = stored_first(memory, k, v, layout.tables(self.rope, self.head_dim, dtype))
        options = {"rope": self.rope, "memory": memory.read(k), "backend": self.backend}
        attended, keys = rope_attention(q, k, v, layout, **options, return_keys=True)
        if memory.kind == "kv":
            memory.keep(keys, v)
        return attended.flatten(1)

    def forward_inputs(self, x: Tensor, layout: PackedLayout, memory: BlockMemory) -> Tensor:
        """Inputs [T, C] and a memory of inputs -> [T, HD].

        Keys and values are projected from the stored inputs, so that W_k and W_v get gradients from memory rows too.
        """
        width, inputs = self.heads * self.head_dim, memory.concat_inputs(x)
        if dispatch.is_modified(self.qkv, nn.Linear):
            q, projected = self.qkv(x)[:, :width], self.qkv(inputs)[:, width:]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q_bias, bias = (None, None) if bias is None else (bias[:width], bias[width:])
            q, projected = F.linear(x, weight[:width], q_bias), F.linear(inputs, weight[width:], bias)
        q = q.unflatten(1, (self.heads, -1))
        k, v = projected.unflatten(1, (2, self.key_heads, -1)).unbind(1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        memory.keep(x)
        return rope_attention(q, k, v, layout, rope=self.rope, backend=self.backend).flatten(1)


class FeedForward(nn.Module):
    """SwiGLU: ``fc1`` gives [x | gate], then x * silu(gate), then ``fc2``.

    The bias of ``fc1`` is added by the gate's kernel, unless ``fc1`` was replaced or has hooks.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.ffn_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        if not dispatch.is_modified(self.fc1, nn.Linear):
            return self.fc2(swiglu(F.linear(x, self.fc1.weight), self.fc1.bias))
        return self.fc2(swiglu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and pre-norm feed-forward, each with a residual connection.

    Its two forms have the same numbers: one autograd node (``dph.model.fused_block``), and parts. Of the parts,
    ``before`` and ``after`` are functions of rows alone, all but attention itself; ``dph.train.compile`` replaces them.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = norm(config.hidden_size, config.layer_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, layout: PackedLayout, memory: BlockMemory | None = None) -> Tensor:
        """[T, C] -> [T, C]."""
        memory_kind = None if memory is None else memory.kind
        form = block_form(self, x, layout, memory_kind)
        if form.fused:
            total, activations = fused_block(x, layout, memory, form.shape, form.weights)
            fc2 = self.ffn.fc2
            return total + apply_linear(fc2, activations)
        if memory_kind == "hidden":
            return self.after(x, self.attention.forward_inputs(self.attention_norm(x), layout, memory))
        return self.after(x, self.attention(self.before(x), layout, memory))

    def before(self, x: Tensor) -> Tensor:
        """[T, C] -> queries, keys and values [T, (H + 2K) D]."""
        return self.attention.qkv(self.attention_norm(x))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream [T, C] and the result of attention [T, HD] -> [T, C]."""
        attended = self.attention.out(attended)
        if isinstance(self.ffn_norm, LayerNorm | RMSNorm):
            x, normed = self.ffn_norm(x, attended)
        else:  # a norm of another class has no residual connection
            x = x + attended
            normed = self.ffn_norm(x)
        return x + self.ffn(normed)


class Form(NamedTuple):
    """The form of a block for one call.

    Attributes:
        fused: one autograd node; False: in parts.
        reason: why.
        shape, weights: arguments of ``fused_block``; None in parts.
    """

    fused: bool
    reason: str
    shape: BlockShape | None = None
    weights: BlockWeights | None = None


def block_form(block: Block, x: Tensor, layout: PackedLayout, memory_kind: str | None = None) -> Form:
    """Decide in which form ``block`` computes ``x`` [T, C] over ``layout``, and why.

    A block is fused unless hooks, replaced modules or methods, autocast or a transform need its parts, or the operators
    would reject its tensors: then the parts raise the error. Runs in every call, so text is only formatted on the way
    to the parts.
    """
    if torch.compiler.is_compiling():
        return Form(False, "torch.compile traces the call")
    if memory_kind == "hidden":
        return Form(False, "the memory stores attention inputs, whose keys and values are projected in each call")
    if checks.autocast_active(x):
        return Form(False, "autocast is active")
    if x.ndim != 2:
        return Form(False, f"x has {x.ndim} dimensions, not 2")
    if dispatch.is_small(x):
        return Form(False, f"the parts are as fast for up to {dispatch.SMALL_ELEMENTS} elements")
    if isinstance(layout, GrowingLayout):
        return Form(False, "the layout grows on the device")
    if layout.queries != len(x) or layout.keys != (0 if memory_kind == "decode" else len(x)):
        return Form(False, "the layout's queries and keys are not as many as the rows of x")
    if layout.query_positions.device != x.device:
        return Form(False, "the layout is on another device than x")

    if has_any_global_hook():
        return Form(False, "a hook is registered on all modules")
    replaced = "before" in vars(block) or "after" in vars(block)
    if replaced or type(block).before is not Block.before or type(block).after is not Block.after:
        return Form(False, "method before or after is replaced (dph.train.compile does so)")

    attention, ffn = block.attention, block.ffn
    if attention.backend != "auto":
        return Form(False, f"attention's backend {attention.backend!r} is requested by name")
    for name, module, kind in (("attention", attention, Attention), ("ffn", ffn, FeedForward)):
        if change := dispatch.modification(module, kind):
            return Form(False, f"{name} {change}")
    attention_norm, ffn_norm, parameters = block.attention_norm, block.ffn_norm, []
    norm = RMSNorm if isinstance(attention_norm, RMSNorm) else LayerNorm
    for name, module, kind in (
        ("attention_norm", attention_norm, norm),
        ("attention.qkv", attention.qkv, nn.Linear),
        ("attention.out", attention.out, nn.Linear),
        ("ffn_norm", ffn_norm, norm),
        ("ffn.fc1", ffn.fc1, nn.Linear),
        ("attention.q_norm", attention.q_norm, RMSNorm),
        ("attention.k_norm", attention.k_norm, RMSNorm),
    ):
        if module is None:  # no norm of queries and keys
            parameters.append(None)
            continue
        if change := dispatch.modification(module, kind):
            return Form(False, f"{name} {change}")
        own = module._parameters
        if "weight" not in own or "bias" not in own:
            return Form(False, f"a tensor of {name} is not a parameter")
        parameters.append(own["weight"])
        if kind is not RMSNorm or module is attention_norm or module is ffn_norm:
            parameters.append(own["bias"])

    weights = BlockWeights(*parameters)
    dtype, device, tensors, trained = x.dtype, x.device, [x], 0
    for name, weight in zip(BlockWeights._fields, weights, strict=True):
        if weight is None:
            if name not in OPTIONAL:
                return Form(False, f"{name} is not a parameter")
            continue
        if weight.dtype != dtype or weight.device != device:
            return Form(False, f"{name} has another dtype or device than x")
        tensors.append(weight)
        trained += weight.requires_grad
    if not dispatch.can_bypass_dispatcher(tensors):
        return Form(False, dispatch.bypass_obstacle(tensors))
    if torch.is_grad_enabled() and trained < len(tensors) - 1 and (trained or x.requires_grad):
        return Form(False, "only some of its tensors need gradients")
    shape = BlockShape(
        attention.heads, attention.key_heads, attention.head_dim, attention.rope, norm.kind, attention_norm.eps,
        ffn_norm.eps, None if attention.q_norm is None else attention.q_norm.eps,
    )  # fmt: skip
    if reason := shape.misfit(x, weights):
        return Form(False, reason)
    return Form(True, "modules are unmodified, tensors plain, of one dtype and on one device", shape, weights)


class Backbone(nn.Module):
    """Tokens [T] to hidden states [T, C] after the output norm.

    With ``gradient_checkpointing`` (transformers sets the attribute, too) the backward pass recomputes the activations
    of each block, so that only the blocks' inputs are stored: a third more arithmetic, the same gradients.
    """

    gradient_checkpointing = False

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.input_proj = self.input_norm = nn.Identity()
        if config.embedding_projection:
            self.input_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
            self.input_norm = norm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output_norm = norm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        memory: Callable[[int], BlockMemory] | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
        blocks: int | None = None,
        states: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Tokens [T] int64, or their embeddings [T, E], -> [T, C].

        Args:
            tokens, layout: rows and their layout.
            memory: maps the number of a block to its memory, which the call reads and updates.
            observe: called with the number of each block and its input [T, C], and with the number of blocks and the
                result.
            blocks: the number of blocks to compute; the result is then the input of the next one, without output norm.
            states: the number of a block and its input [T, C], from an earlier call: no block below it is computed.
        """
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        draws = recompute and _has_dropout(self.blocks)
        if states is None:
            first = 0
            embedded = tokens if tokens.is_floating_point() else self.embedding(tokens)
            invariant = dispatch.is_batch_invariant()
            projected = apply_linear(self.input_proj, embedded) if invariant else self.input_proj(embedded)
            x = self.input_norm(projected)
        else:
            first, x = states
        for i, block in enumerate(self.blocks):
            if i < first:
                continue
            if observe is not None:
                observe(i, x)
            if i == blocks:
                return x
            layer_memory = None if memory is None else memory(i)
            if recompute:
                options = {"use_reentrant": False, "preserve_rng_state": draws}
                x = checkpoint(block, x, layout, layer_memory, **options)
            else:
                x = block(x, layout, layer_memory)
        x = self.output_norm(x)
        if observe is not None:
            observe(len(self.blocks), x)
        return x


def _has_dropout(modules: nn.Module) -> bool:
    """Whether modules of another library draw random numbers, which a recomputation has to repeat."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules.modules())
