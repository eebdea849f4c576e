"""Best-of-N: sample several answers, keep the one that the model itself scores highest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dph import chat
from dph.chat import Encoded
from dph.infer.sampling import COLD, checked
from dph.model.memory import Memory
from dph.model.model import Judged, Model


@dataclass(frozen=True)
class Candidate:
    """One sampled answer.

    Attributes:
        text: the answer's content.
        reward: its reward; NaN where nothing was judged: without a head, or cut off before ``<|im_end|>``.
        logprob: summed log-probability of its tokens in nats, ``<|im_end|>`` included.
        mean_logprob: mean log-probability of its content tokens in nats; NaN for an empty answer.
        finished: whether it ended with ``<|im_end|>``.
        tokens: its token ids, with what the chat format puts behind ``<|im_end|>``.
    """

    text: str
    reward: float
    logprob: float
    mean_logprob: float
    finished: bool
    tokens: tuple[int, ...]


@torch.no_grad()
def sample(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[list[Encoded]]:
    """Sample ``n`` answers to every prompt; for each prompt its candidates, ready for :meth:`dph.Model.judge`.

    Args:
        prompts: token ids that end where the assistant speaks (``dph.chat.prompt``).
        n: answers per prompt.
        max_new_tokens: an answer that reaches it without ``<|im_end|>`` counts as cut off.
        temperature: of the softmax; 0, and what is below ``dph.infer.sampling.COLD``, takes the likeliest token.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        seed: of torch's generator for this call; its state outside is left as it was. None draws on it.

    Raises ValueError, with the argument's name, where an option is no number or out of its range (``dph.infer.sampling``).
    """
    n, max_new_tokens = checked("n", n), checked("max_new_tokens", max_new_tokens)
    temperature, top_k, top_p = checked("temperature", temperature), checked("top_k", top_k), checked("top_p", top_p)
    seed = None if seed is None else checked("seed", seed)
    if not prompts:
        return []
    width = max(len(p) for p in prompts)
    pad, end = tokenizer.pad_token_id, chat.markup(tokenizer).end
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    choice, copies = {"do_sample": False}, 1
    if temperature >= COLD:
        choice, copies = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}, n
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            memory = _read_prompts(model, ids, mask, max_new_tokens, copies)
            ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
            out = model.generate(
                ids, attention_mask=mask, past_key_values=memory, max_new_tokens=max_new_tokens,
                eos_token_id=end, pad_token_id=pad, **choice,
            )  # fmt: skip
    finally:
        model.train(was_training)
    answers = [_until(answer, end) for answer in out[:, width:].tolist()]
    return [
        [chat.continuation(list(p), answers[i * copies + j % copies], tokenizer) for j in range(n)]
        for i, p in enumerate(prompts)
    ]


def _read_prompts(model: Model, ids: Tensor, mask: Tensor, max_new_tokens: int, copies: int) -> Memory:
    """A memory that has seen all of the prompts but their last tokens, once, for ``copies`` candidates each."""
    memory = Memory(length=ids.shape[1] + max_new_tokens)
    model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=memory, logits_to_keep=1)
    memory.batch_repeat_interleave(copies)
    return memory


def _until(tokens: list[int], end: int) -> list[int]:
    """Tokens up to and including the first ``end``."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def best_of_n(
    model: Model,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    n: int = 16,
    *,
    head: str | None = "default",
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[Candidate]:
    """Sample ``n`` answers to a conversation and rank them by reward, best first (paper, section 1).

    An answer that was cut off has no token to judge and ranks behind all that were finished; among themselves, cut-off
    answers rank by log-probability, and so do all where ``head`` is None: their rewards are NaN. See
    :func:`dph.infer.best_of_n.sample` for the other arguments.

    Raises ValueError for a model without the head, or with one that its checkpoint has no weights for, for an option
    out of its range, and where a finished answer's reward is not a number.
    """
    if head is not None:
        model.check_heads(head)
    prompt = chat.prompt(messages, tokenizer)
    (group,) = sample(
        model, tokenizer, [prompt], n,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    (judged,) = model.judge([group])
    return rank(group, judged, tokenizer, head=head, start=len(prompt))


def rank(group: Sequence[Encoded], judged: Judged, tokenizer: Any, *, head: str | None, start: int) -> list[Candidate]:
    """Candidates of one prompt of ``start`` tokens, best first; by log-probability where there is no head."""
    candidates = []
    for i, encoded in enumerate(group):
        finished = encoded.reward_position is not None
        end = encoded.reward_position if finished else len(encoded.tokens)
        content, reward = encoded.tokens[start:end], math.nan if head is None else judged.rewards[head][i]
        if head is not None and finished and math.isnan(reward):
            raise ValueError(f"candidate {i}: expected a number as its reward, got NaN: the model's weights are broken")
        candidates.append(
            Candidate(
                text=tokenizer.decode(content, skip_special_tokens=False),
                reward=reward,
                logprob=judged.logprobs[i],
                mean_logprob=judged.mean_logprobs[i],
                finished=finished,
                tokens=tuple(encoded.tokens[start:]),
            )
        )
    return sorted(
        candidates, key=lambda c: (c.finished, c.logprob if head is None or not c.finished else c.reward), reverse=True
    )
