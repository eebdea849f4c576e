"""Best-of-N: sample several answers and rank them by the model's own reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dph import chat
from dph.chat import Encoded
from dph.infer.sampling import COLD, INT64, checked
from dph.model.judging import Judged, JudgingModel

RANKS = ("reward", "logprob", "lower_bound")


@dataclass(frozen=True)
class Candidate:
    """One sampled answer.

    Attributes:
        text: the answer's content.
        reward: its reward; NaN without a head, and for an answer that was cut off before the end-of-turn token.
        logprob: summed log-probability of its tokens in nats, the end-of-turn token included.
        mean_logprob: mean log-probability of its content tokens in nats; NaN for an empty answer.
        finished: whether it ended with the end-of-turn token.
        tokens: its token ids, and those of the chat format after the end-of-turn token.
        spread: standard deviation of the reward over the members of an ensemble; 0 for any other head.
    """

    text: str
    reward: float
    logprob: float
    mean_logprob: float
    finished: bool
    tokens: tuple[int, ...]
    spread: float = 0.0


@torch.no_grad()
def sample(
    model: JudgingModel,
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
    """Sample ``n`` answers to every prompt; return each prompt's candidates, as :meth:`dph.Model.judge` takes them.

    Args:
        prompts: token ids up to the beginning of the answer (``dph.chat.prompt``).
        n: answers per prompt.
        max_new_tokens: an answer that reaches it without the end-of-turn token is cut off.
        temperature: of the softmax; below ``dph.infer.sampling.COLD`` the most probable token is taken.
        top_k: sample from the k most probable tokens; 0 for all.
        top_p: sample from the most probable tokens that hold this share of the probability.
        seed: of the call's own generator, so that the answers are the same in any thread, and torch's generator stays
            as it is. None draws a seed from torch's generator.

    The model's mode does not change, and its generation_config plays no part. Modules of other libraries inside of the
    model (LoRA with dropout) follow ``training``.

    Raises ValueError with the argument's name if an option is not a number or out of range (``dph.infer.sampling``).
    """
    n, max_new_tokens = checked("n", n), checked("max_new_tokens", max_new_tokens)
    temperature, top_k, top_p = checked("temperature", temperature), checked("top_k", top_k), checked("top_p", top_p)
    seed = None if seed is None else checked("seed", seed)
    if not prompts:
        return []
    width = max(map(len, prompts))
    marks = chat.markup(tokenizer)
    end = marks.end_of_turn
    pad = marks.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # any token: it is masked
    padded, masks = [], []
    for prompt in prompts:
        padding = width - len(prompt)
        padded.append([pad] * padding + list(prompt))
        masks.append([0] * padding + [1] * len(prompt))
    ids, mask = torch.tensor(padded, device=model.device), torch.tensor(masks, device=model.device)
    if temperature < COLD:  # all n answers are the same: it is sampled once
        choose, copies = _most_probable, 1
    else:
        choose, copies = _random_choice(temperature, top_k, top_p, _generator(seed, model.device)), n
    next_logits = model.decoder(ids, mask, max_new_tokens, copies)
    last = ids[:, -1:].repeat_interleave(copies, 0)
    answers = _continue(next_logits, last, max_new_tokens, end, choose).tolist()
    groups = []
    for i, prompt in enumerate(prompts):
        group = []
        for answer in answers[i * copies : (i + 1) * copies]:
            length = answer.index(end) + 1 if end in answer else len(answer)
            group.append(chat.continuation(list(prompt), answer[:length], tokenizer))
        groups.append(group * (n // copies))
    return groups


def _continue(
    next_logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    end: int,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the tokens [B, A] after ``tokens`` [B, 1], with at least one ``end`` in each row or A = max_new_tokens."""
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    answers = []
    for _ in range(max_new_tokens):
        tokens = choose(next_logits(tokens).float()).masked_fill(finished, end)[:, None]
        answers.append(tokens)
        finished |= tokens[:, 0] == end
        if finished.all():
            break
    return torch.cat(answers, 1)


def _most_probable(logits: Tensor) -> Tensor:
    """Return the most probable tokens [B] of logits [B, V]."""
    return logits.argmax(-1)


def _random_choice(
    temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Return a function from logits [B, V] to tokens [B], drawn as by transformers' ``generate``."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        probabilities = warpers(None, logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    return choose


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a generator with this seed, or if it is None with one that torch's own generator draws."""
    if seed is None:
        seed = int(torch.randint(INT64 - 1, ()))
    return torch.Generator(device).manual_seed(seed)


def best_of_n(
    model: JudgingModel,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    n: int = 16,
    *,
    head: str | None = "default",
    rank: str = "reward",
    risk: float = 1.0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[Candidate]:
    """Sample ``n`` answers to a conversation and rank them by reward, best first (paper, section 1).

    An answer that was cut off has no token to judge and ranks after all finished ones. Cut-off answers rank by
    log-probability, and so do all answers if ``head`` is None: their rewards are NaN.

    Args:
        head: reward head; None for none.
        rank: "reward"; "logprob"; or "lower_bound", the reward less ``risk`` times its spread over the members of an
            ensemble (``objective.ensemble``): they disagree on answers unlike those of training, whose reward may be
            too high.
        risk: at least 0.

    The other arguments are those of :func:`dph.infer.best_of_n.sample`.

    Raises ValueError if the model lacks the head or its weights, if an option is out of range, if the reward of a
    finished answer or a log-probability is NaN, and for "lower_bound" without a head that is an ensemble.
    """
    check_rank(model, head, rank)
    risk = checked("risk", risk)
    prompt = chat.prompt(messages, tokenizer)
    (group,) = sample(
        model, tokenizer, [prompt], n,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    (judged,) = model.judge([group])
    return ranked(group, judged, tokenizer, head=head, start=len(prompt), by=rank, risk=risk)


def check_rank(model: JudgingModel, head: str | None, rank: str) -> None:
    """Raise ValueError if the model lacks the head, its weights, or what ``rank`` needs."""
    if head is not None:
        model.check_heads(head)
    if rank not in RANKS:
        raise ValueError(f"rank: expected one of {', '.join(RANKS)}, got {rank!r}")
    members = 1
    for heads in model.heads.values():
        if head in heads.reward:
            members = heads.members
    if rank == "lower_bound" and members == 1:
        raise ValueError(f"rank: expected an ensemble (objective.ensemble) for lower_bound, got head {head!r}")


def ranked(
    group: Sequence[Encoded],
    judged: Judged,
    tokenizer: Any,
    *,
    head: str | None,
    start: int,
    by: str = "reward",
    risk: float = 1.0,
) -> list[Candidate]:
    """Candidates of one prompt of ``start`` tokens, best first; without a head by log-probability."""
    candidates, scores = [], []
    spreads = judged.spreads.get(head)
    for i, encoded in enumerate(group):
        finished = encoded.reward_position is not None
        end = encoded.reward_position if finished else len(encoded.tokens)
        reward = math.nan if head is None else judged.rewards[head][i]
        has_reward = head is not None and finished
        for kind, is_broken in (
            ("reward", has_reward and math.isnan(reward)), ("log-probability", math.isnan(judged.logprobs[i])),
        ):  # fmt: skip
            if is_broken:
                raise ValueError(
                    f"candidate {i}: expected a number as its {kind}, got NaN: the model's weights are broken"
                )
        candidate = Candidate(
            text=tokenizer.decode(encoded.tokens[start:end], skip_special_tokens=False),
            reward=reward,
            logprob=judged.logprobs[i],
            mean_logprob=math.nan if judged.mean_logprobs[i] is None else judged.mean_logprobs[i],
            finished=finished,
            tokens=tuple(encoded.tokens[start:]),
            spread=0.0 if spreads is None else spreads[i],
        )
        candidates.append(candidate)
        score = candidate.logprob
        if finished and head is not None and by != "logprob":
            score = reward - (risk * candidate.spread if by == "lower_bound" else 0.0)
        scores.append((finished, score))
    order = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
    return [candidates[i] for i in order]
