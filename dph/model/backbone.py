"""The backbone: tokens as rows, packed end to end, to hidden states.

Dense batches, preference pairs, streams with memory and decoding differ only in their layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dph.model.config import ModelConfig
from dph.model.fused_block import Shape, run_whole, split, untouched, weights_of
from dph.model.memory import LayerMemory, Memory
from dph_kernels import PackedLayout, residual_norm, rope_attention, swiglu


class Attention(nn.Module):
    """Rotary multi-head attention over a packed layout, with or without memory; the block applies its products."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.rope = config.num_attention_heads, config.rope
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, projected: Tensor, layout: PackedLayout, memory: LayerMemory | None = None) -> Tensor:
        """Queries, keys and values [T, 3C], and a memory of keys and values -> [T, C]."""
        q, k, v = split(projected, 3, self.heads)
        if memory is None:
            return rope_attention(q, k, v, layout, rope=self.rope).flatten(1)
        attended, keys = rope_attention(q, k, v, layout, rope=self.rope, memory=memory.read(k), return_keys=True)
        memory.keep(keys, v)
        return attended.flatten(1)

    def attend_anew(self, x: Tensor, layout: PackedLayout, memory: LayerMemory) -> Tensor:
        """Inputs [T, C] and a memory of inputs -> [T, C].

        Keys and values are projected from the remembered inputs, so that W_k and W_v learn from memory rows too.
        """
        width = x.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = split(F.linear(x, weight[:width], bias[:width]), 1, self.heads)
        k, v = split(F.linear(memory.recall(x), weight[width:], bias[width:]), 2, self.heads)
        memory.keep(x)
        return rope_attention(q, k, v, layout, rope=self.rope).flatten(1)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm, and the residual connection before it where there is one."""

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of ``x`` [T, C]; with an update, ``x + update`` and the norm of that."""
        both = residual_norm(x, update, self.weight, self.bias, eps=self.eps)
        return both[1] if update is None else both


class FeedForward(nn.Module):
    """SwiGLU: ``fc1`` gives [x | gate], x * silu(gate), ``fc2`` back.

    The bias of ``fc1`` is added by the gate, unless somebody has put another module in its place, or looks on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        if untouched(self.fc1, nn.Linear):
            return self.fc2(swiglu(F.linear(x, self.fc1.weight), self.fc1.bias))
        return self.fc2(swiglu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and pre-norm feed-forward, a residual around each.

    Where nobody looks into it, it runs as one node of PyTorch's graph (``dph.model.fused_block``), else in parts: ``before``
    and ``after`` are all but attention itself, functions of rows alone, which ``dph.train.compile`` replaces.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, layout: PackedLayout, memory: LayerMemory | None = None) -> Tensor:
        """[T, C] -> [T, C]."""
        if memory is not None and memory.kind == "hidden":
            return self.after(x, self.attention.attend_anew(self.attention_norm(x), layout, memory))
        modules = None if torch.compiler.is_compiling() else self._untouched()
        if modules and (weights := weights_of(modules, x, layout, self.attention.heads)):
            shape = Shape(self.attention.heads, self.attention.rope, (self.attention_norm.eps, self.ffn_norm.eps))
            total, hidden = run_whole(x, layout, memory, shape, weights)
            return total + self.ffn.fc2(hidden)
        return self.after(x, self.attention(self.before(x), layout, memory))

    def _untouched(self) -> tuple[nn.Module, ...] | None:
        """What has weights, but for the last product, in the order of ``weights_of``.

        None where a module or method is not the one that the block was made with, or somebody watches it.
        """
        attention, ffn, own = self.attention, self.ffn, vars(self)
        if type(self).before is not Block.before or type(self).after is not Block.after:
            return None
        weighted = self.attention_norm, attention.qkv, attention.out, self.ffn_norm, ffn.fc1
        kinds = LayerNorm, nn.Linear, nn.Linear, LayerNorm, nn.Linear, Attention, FeedForward
        same = all(map(untouched, (*weighted, attention, ffn), kinds))
        return weighted if same and "before" not in own and "after" not in own else None

    def before(self, x: Tensor) -> Tensor:
        """[T, C] -> queries, keys and values [T, 3C]."""
        return self.attention.qkv(self.attention_norm(x))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Rows [T, C] and what attention gave for them [T, C] -> [T, C]."""
        attended = self.attention.out(attended)
        if isinstance(self.ffn_norm, LayerNorm):
            x, normed = self.ffn_norm(x, attended)
        else:  # somebody has put another norm in its place
            x = x + attended
            normed = self.ffn_norm(x)
        return x + self.ffn(normed)


class Backbone(nn.Module):
    """Tokens [T] to hidden states [T, C] after the output norm.

    With ``gradient_checkpointing`` (the name by which transformers switches it, too) the backward pass computes each
    block's activations again, so that only the blocks' inputs are kept: a third more arithmetic, the same gradients.
    """

    gradient_checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.input_proj = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.input_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        layout: PackedLayout,
        memory: Memory | None = None,
        counts: Sequence[int] = (),
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Tokens [T] int64, or their embeddings [T, E], -> [T, C].

        ``counts`` [B] gives the tokens of each stream of ``memory``. To ``states`` each block's input [T, C] is
        appended, and the result.
        """
        x = self.input_norm(self.input_proj(tokens if tokens.is_floating_point() else self.embedding(tokens)))
        for i, block in enumerate(self.blocks):
            if states is not None:
                states.append(x)
            x = self._run(block, x, layout, None if memory is None else LayerMemory.of(memory, i, counts))
        x = self.output_norm(x)
        if states is not None:
            states.append(x)
        return x

    def _run(self, block: Block, x: Tensor, layout: PackedLayout, memory: LayerMemory | None) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(x, layout, memory)
        return checkpoint(block, x, layout, memory, use_reentrant=False, preserve_rng_state=False)  # nothing is random
