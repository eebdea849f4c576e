"""Reimplementation of the paper's released training: the rival of our training step (bench_train_step.py).

Pairs are padded to a fixed length, each answer after its own copy of the prompt. Logits are materialised, for policy
and reference. Queries and keys are rotated in plain PyTorch; the memory holds un-rotated keys, joined with the new ones
and rotated again in every segment. LaProp is a Python loop over tensors. Obvious inefficiencies are avoided:
SDPA runs without a mask if possible (padding is at the end), sines and masks are computed once, the reference's logits
are not kept for a backward pass, and the gradient norm is PyTorch's own.

The model is a copy of ours, module for module, so that weights and gradients have the same names.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from dph.chat import Encoded
from dph.losses import IGNORED
from dph.model.model import Model
from dph.optim import param_groups, warmup_cosine
from dph.train.stages.base import Stage

Past = list[tuple[Tensor, Tensor]]  # un-rotated keys and values [B, H, M, D] of every layer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of [B, H, S, D] by tables [S, D], as models implement it."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """PyTorch's own LayerNorm."""
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def run_block(
    block: nn.Module, x: Tensor, tables: tuple[Tensor, Tensor], mask: Any, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a block on [B, S, C]; return also its un-rotated keys and values. Causal if ``mask`` is None."""
    batch, length, width = x.shape
    attention, (cos, sin) = block.attention, tables
    qkv = attention.qkv(norm(block.attention_norm, x)).view(batch, length, 3, attention.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    rotated = rotate(q, cos[-length:], sin[-length:]), rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(*rotated, v, attn_mask=mask, is_causal=mask is None)
    x = x + attention.out(out.transpose(1, 2).reshape(batch, length, width))
    y, gate = block.ffn.fc1(norm(block.ffn_norm, x)).chunk(2, dim=-1)
    return x + block.ffn.fc2(y * F.silu(gate)), k, v


class PaperModel(nn.Module):
    """A copy of our model for dense batches, with the same parameter names; ``compiled`` compiles its blocks."""

    def __init__(self, model: Model, compiled: bool = False) -> None:
        super().__init__()
        if model.config.reward_pooler != "swiglu_bert":
            raise ValueError(f"model: expected the pooler swiglu_bert, got {model.config.reward_pooler}")
        self.model = copy.deepcopy(model)
        self.run_block = torch.compile(run_block) if compiled else run_block
        self.tables, self.mask = functools.cache(self._tables), functools.cache(self._mask)

    def _tables(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        config = self.model.config
        tables = config.rope.tables(torch.arange(length, device=device), config.head_dim)
        return tuple(torch.cat([t, t], dim=1).to(dtype) for t in tables)

    def _mask(self, queries: int, keys: int, device: torch.device) -> Any:
        """Causal mask, aligned at the end: None if ``is_causal`` suffices; on a GPU the form that flash supports."""
        if queries == keys:
            return None
        if device.type == "cuda":
            return causal_lower_right(queries, keys)
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)

    def hidden(self, tokens: Tensor, past: Past | None = None, memory: int = 0) -> tuple[Tensor, Past]:
        """Return states [B, S, C] of tokens [B, S], and the last ``memory`` keys and values per layer, detached."""
        backbone, length = self.model.backbone, tokens.shape[1]
        keys = length + (past[0][0].shape[2] if past else 0)
        x = norm(backbone.input_norm, backbone.input_proj(backbone.embedding(tokens)))
        tables, mask = self.tables(keys, x.device, x.dtype), self.mask(length, keys, x.device)
        kept = []
        for i, block in enumerate(backbone.blocks):
            x, k, v = self.run_block(block, x, tables, mask, past[i] if past else None)
            if memory:
                kept.append((k[:, :, -memory:].detach(), v[:, :, -memory:].detach()))
        return norm(backbone.output_norm, x), kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits, [B, S, V]."""
        return F.linear(self.model.output_proj(hidden), self.model.backbone.embedding.weight)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return sums [B] over the targets [B, S] that are not -100."""
        logprobs = self.logits(hidden).float().log_softmax(-1)
        selected = logprobs.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        return (selected * (targets != IGNORED)).sum(1)

    def rewards(self, states: Tensor, names: Sequence[str]) -> Tensor:
        """Return rewards [B, K] of states [B, C]."""
        (head,) = self.model.heads.values()
        gate, _, last, _ = head.pooler
        x, g = gate(states).chunk(2, dim=-1)
        pooled = F.dropout(last(x * F.silu(g)).tanh(), head.dropout.p, self.training)
        return torch.cat([head.reward[name](pooled) for name in names], dim=1).float()


class LoopLaProp:
    """LaProp with prior decay, tensor by tensor; bf16 parameters have fp32 master weights."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, lowered: bool) -> None:
        self.groups, self.betas, self.eps, self.steps, self.average = groups, betas, eps, 0, 0.0
        self.state: dict[Tensor, list[Tensor | None]] = {}
        for group in groups:
            for p in group["params"]:
                theta = p.detach()
                prior = theta.clone() if group["prior_decay"] else None
                self.state[p] = [theta, torch.zeros_like(theta), torch.zeros_like(theta), prior]
                if lowered:
                    p.data = p.data.bfloat16()
                    p.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one optimizer step at the learning rate ``lr``."""
        beta1, beta2 = self.betas
        self.steps += 1
        self.average = beta1 * self.average + (1 - beta1) * lr
        scale = self.average / lr if lr else 1.0
        rate = (1 - beta1) * lr * math.sqrt(1 - beta2**self.steps)
        for group in self.groups:
            decay, pull = group["weight_decay"] * lr, group["prior_decay"] * lr
            for p in group["params"]:
                theta, m, v, prior = self.state[p]
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                m.mul_(beta1).addcdiv_(p.grad, v.sqrt().add_(self.eps), value=rate)
                if decay or pull:
                    theta.mul_(1 - decay - pull)
                if pull:
                    theta.add_(prior, alpha=pull)
                theta.sub_(m, alpha=1 / scale)
                if p.dtype != theta.dtype:
                    p.copy_(theta)


class Padded(NamedTuple):
    """Both sides of pairs, chosen and rejected in turn: tokens and targets [2N, S], and reward positions [2N]."""

    tokens: Tensor
    targets: Tensor
    ends: Tensor

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[Encoded, Encoded]], pad: int | None, device: torch.device) -> "Padded":
        """Return pairs padded at the end to ``pad`` tokens, or to the longest side."""
        sides = [side for pair in pairs for side in pair]
        length = pad or max(map(len, sides))
        tokens = torch.zeros(len(sides), length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for i, side in enumerate(sides):
            masked = [t if is_target else IGNORED for t, is_target in zip(side.targets, side.loss_mask, strict=True)]
            tokens[i, : len(side)] = torch.tensor(side.tokens)
            targets[i, : len(side)] = torch.tensor(masked)
        ends = torch.tensor([side.reward_position for side in sides])
        return cls(*(t.to(device, non_blocking=True) for t in (tokens, targets, ends)))


def smoothed(margin: Tensor, epsilon: float) -> Tensor:
    """-(1 - epsilon) log sigma(margin) - epsilon log sigma(-margin)."""
    return -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)


class PaperTrainer:
    """Trainer of a stage in the paper's layout.

    Args:
        stage: source of the recipe, the model's weights (copied) and the batches; must not be used elsewhere.
        pad: length of a padded pair; None pads to the longest of a micro-batch.
        compiled: whether the blocks are compiled.
        micro: pairs or streams per micro-batch; None takes the recipe's.
    """

    def __init__(self, stage: Stage, lowered: bool, pad: int | None = 512, compiled: bool = False,
                 micro: int | None = None) -> None:  # fmt: skip
        self.stage, self.recipe, self.pad = stage, stage.recipe, pad
        self.micro = micro or self.recipe.batch.micro or self.recipe.batch.size
        self.paper = PaperModel(stage.model, compiled)
        self.model = self.paper.model.train()
        self.device = self.model.device
        for name, p in self.model.named_parameters():
            p.requires_grad_(stage.trains(name))
        self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        settings = self.recipe.optimiser
        groups = param_groups(self.model, settings.weight_decay, settings.prior_decay, settings.no_decay)
        self.reference = self._reference(compiled) if stage.needs_reference else None
        self.optimiser = LoopLaProp(groups, settings.betas, settings.eps, lowered)
        if lowered:
            self.model.bfloat16()
            if self.reference is not None:
                self.reference.model.bfloat16()
        self.pasts: dict[int, Past] = {}
        self.taken = 0
        self.watch: Callable[[dict[str, Tensor]], None] | None = None  # receives every step's gradients

    def _reference(self, compiled: bool) -> PaperModel:
        reference = PaperModel(self.stage.model, compiled).requires_grad_(False).eval()
        reference.model.heads.clear()
        return reference

    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights in full precision."""
        return {name: self.optimiser.state[p][0] for p, name in self.names.items()}

    def step(self) -> Tensor:
        """Take one optimizer step and return its loss."""
        self.taken += 1
        s = self.recipe.optimiser
        lr = warmup_cosine(self.taken, peak=s.lr, warmup=s.warmup, total=s.steps, final=s.final_lr)
        total = torch.zeros((), device=self.device)
        for loss in self._losses():
            loss.backward()
            total += loss.detach()
        if self.watch is not None:
            self.watch({name: p.grad for p, name in self.names.items()})
        torch.nn.utils.clip_grad_norm_(list(self.names), s.clip)
        self.optimiser.step(lr)
        for p in self.names:
            p.grad = None
        return total

    def _losses(self) -> Iterator[Tensor]:
        """Yield the loss of each micro-batch, as its share of the step's mean."""
        batch = next(self.stage.batches)
        if self.recipe.kind == "preference":
            for i in range(0, len(batch), self.micro):
                padded = Padded.from_pairs(batch[i : i + self.micro], self.pad, self.device)
                yield self._pair_loss(padded) / len(batch)
            return
        tokens, targets = batch
        count = max(1, int((targets != IGNORED).sum()))
        for i, micro_batch in enumerate(zip(tokens.split(self.micro), targets.split(self.micro), strict=True)):
            yield self._stream_loss(i, *(t.to(self.device, non_blocking=True) for t in micro_batch)) / count

    def _stream_loss(self, index: int, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, self.pasts[index] = self.paper.hidden(tokens, self.pasts.get(index), self.recipe.data.memory)
        logits = self.paper.logits(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _pair_loss(self, padded: Padded) -> Tensor:
        """Return the joint objective, summed over pairs."""
        objective = self.recipe.objective
        hidden, _ = self.paper.hidden(padded.tokens)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if objective.dph_weight:
            states = hidden[torch.arange(len(hidden), device=hidden.device), padded.ends]
            rewards = self.paper.rewards(states, objective.heads)
            loss = loss + objective.dph_weight * self._reward_loss(rewards[0::2], rewards[1::2])
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.logprobs(self.reference.hidden(padded.tokens)[0], padded.targets)
            gain = self.paper.logprobs(hidden, padded.targets) - reference
            margin = objective.beta * (gain[0::2] - gain[1::2])
            loss = loss + objective.dpo_weight * smoothed(margin, objective.dpo_epsilon).sum()
        return loss

    def _reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        epsilon, heads = self.recipe.objective.dph_epsilon, chosen.shape[1]
        if self.recipe.objective.objective == "contrastive":
            return smoothed(chosen - rejected, epsilon).sum() / heads
        return (smoothed(chosen, epsilon) + smoothed(-rejected, epsilon)).sum() / heads
