"""Best-of-N: sample several answers and rank them by the model's own reward."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dph import chat
from dph.chat import Message
from dph.errors import UserError
from dph.infer.engine import answered
from dph.infer.request import Answer, Plan, Pruning, Request, fixed
from dph.infer.sampling import Sampling, checked
from dph.model.judging import JudgingModel

Weights = Callable[[Sequence[float]], list[float]]

RANKS = ("reward", "logprob", "lower_bound", "vote")


def logistic(rewards: Sequence[float]) -> list[float]:
    """Return the logistic functions of rewards."""
    return [1 / (1 + math.exp(-max(reward, -700.0))) for reward in rewards]


def probabilities(model: JudgingModel, head: str | None) -> Weights:
    """Return the function from rewards to probabilities that answers are good; ``logistic`` without a calibration."""
    if model.head_records.get(head, {}).get("calibration") is None:
        return logistic
    return lambda rewards: model.probability(rewards, head).tolist()


@dataclass(frozen=True)
class Candidate:
    """One sampled answer.

    Attributes:
        text: the answer's content.
        reward: its reward; NaN without a head, and for an answer that was cut off before the end-of-turn token.
        logprob: summed log-probability of its tokens in nats, the end-of-turn token included.
        mean_logprob: mean log-probability of its content tokens in nats; NaN for an empty answer.
        finished: whether it ended with the end-of-turn token, or before a stop text.
        tokens: its token ids, and those of the chat format after the end-of-turn token.
        spread: standard deviation of the reward over the members of an ensemble; 0 for any other head.
        pruned: whether it was dropped before its end, since others seemed better.
        index: its number among the answers to its prompt, in the order of sampling.
    """

    text: str
    reward: float
    logprob: float
    mean_logprob: float
    finished: bool
    tokens: tuple[int, ...]
    spread: float = 0.0
    pruned: bool = False
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The way in which answers are ranked, and how many are sampled.

    Attributes:
        n: answers per prompt, at most.
        head: reward head; None for none.
        rank: "reward"; "logprob"; "lower_bound", the reward less ``risk`` times its spread over the members of an
            ensemble (``objective.ensemble``), which disagree on answers unlike those of training, whose reward may be
            too high; or "vote", the sum of the probabilities that equal answers are good (of rewards without a
            calibration: of their logistic functions).
        risk: at least 0.
        normalise: function from an answer's text to the one that it has in common with equal answers; for "vote".
        confidence: sampling stops once the probability that the best answer is good (:meth:`dph.Model.probability`)
            reaches it; None for always ``n`` answers.
        round_size: answers that are sampled between two such decisions.
        prune_every: after so many tokens the weaker half of the answers is dropped, again and again; None for never.
    """

    n: int = 16
    head: str | None = "default"
    rank: str = "reward"
    risk: float = 1.0
    normalise: Callable[[str], str] = str.strip
    confidence: float | None = None
    round_size: int = 4
    prune_every: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers; raises UserError with the name of one that is out of range."""
        for name in ("n", "risk", "confidence", "round_size", "prune_every"):
            if getattr(self, name) is not None or name not in ("confidence", "prune_every"):
                object.__setattr__(self, name, checked(name, getattr(self, name)))

    def check(self, model: JudgingModel) -> None:
        """Raise ValueError if the model lacks the head, its weights, or what the options need."""
        if self.head is not None:
            model.check_heads(self.head)
        if self.rank not in RANKS:
            raise ValueError(f"rank: expected one of {', '.join(RANKS)}, got {self.rank!r}")
        members = [heads.members for heads in model.heads.values() if self.head in heads.reward]
        if self.rank == "lower_bound" and members in ([], [1]):
            raise ValueError(f"rank: expected an ensemble (objective.ensemble) for lower_bound, got head {self.head!r}")
        for option in ("confidence", "prune_every"):
            if getattr(self, option) is not None and self.head is None:
                raise UserError(f"{option}: expected a reward head with it, got none")
        if self.confidence is not None:
            model.probability([0.0], self.head)  # raises without a calibration

    def plan(self, model: JudgingModel) -> Plan:
        """Return the engine's plan."""
        if self.confidence is None:
            return fixed(self.n)

        def more(answers: Sequence[Answer]) -> int:
            rewards = [answer.rewards[self.head] for answer in answers if answer.finished]
            if rewards and float(model.probability(rewards, self.head).max()) >= self.confidence:
                return 0
            return min(self.round_size, self.n - len(answers))

        return more

    def request(self, model: JudgingModel, prompt: Sequence[int], sampling: Sampling, seed: int | None) -> Request:
        """Return the request of one prompt."""
        pruning = None if self.prune_every is None else Pruning(self.prune_every, self.head)
        plan = self.plan(model)
        return Request(prompt, plan, sampling, seed=seed, rewards=self.head is not None, pruning=pruning)


def sample(
    model: JudgingModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    seed: int | None = None,
    rewards: bool = True,
    **sampling: Any,
) -> list[list[Answer]]:
    """Sample ``n`` answers to every prompt.

    Args:
        prompts: token ids up to the beginning of the answer (``dph.chat.prompt``).
        n: answers per prompt.
        seed: the answers depend on it, on their prompt and their number alone: not on other prompts, nor on threads.
            Torch's generator stays as it is. None draws a seed for each prompt from that generator.
        rewards: False for no rewards; a model without reward heads has none.
        sampling: fields of :class:`dph.infer.sampling.Sampling`.

    The model's mode does not change, and its generation_config plays no part. Modules of other libraries inside of the
    model (LoRA with dropout) follow ``training``.

    Raises ValueError with the argument's name if an option is not a number or out of range (``dph.infer.sampling``).
    """
    options, plan, seed = Sampling(**sampling), fixed(checked("n", n)), None if seed is None else checked("seed", seed)
    rewards = rewards and bool(model.head_names)
    requests = [Request(prompt, plan, options, seed=seed, rewards=rewards) for prompt in prompts]
    return [request.answers for request in answered(model, tokenizer, requests)]


def best_of_n(
    model: JudgingModel,
    tokenizer: Any,
    messages: Sequence[Message],
    n: int = 16,
    *,
    head: str | None = "default",
    rank: str = "reward",
    risk: float = 1.0,
    normalise: Callable[[str], str] = str.strip,
    confidence: float | None = None,
    round_size: int = 4,
    prune_every: int | None = None,
    seed: int | None = None,
    **sampling: Any,
) -> list[Candidate]:
    """Sample ``n`` answers to a conversation and rank them by reward, best first (paper, section 1).

    An answer that was cut off has no token to judge and ranks after all finished ones. Cut-off answers rank by
    log-probability, and so do all answers if ``head`` is None: their rewards are NaN.

    Args:
        n, head, rank, risk, normalise, confidence, round_size, prune_every: see :class:`Choice`.
        seed, sampling: see :func:`sample`.

    Raises ValueError if the model lacks the head or its weights, if an option is out of range, if the reward of a
    finished answer or a log-probability is NaN, for "lower_bound" without a head that is an ensemble, and for
    ``confidence`` without a calibrated head.
    """
    choice = Choice(
        n=n, head=head, rank=rank, risk=risk, normalise=normalise, confidence=confidence, round_size=round_size,
        prune_every=prune_every,
    )  # fmt: skip
    (candidates,) = best_of_n_each(model, tokenizer, [messages], choice, seed=seed, **sampling)
    return candidates


def best_of_n_each(
    model: JudgingModel,
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    choice: Choice,
    *,
    seed: int | None = None,
    **sampling: Any,
) -> Iterator[list[Candidate]]:
    """Yield the candidates of each conversation, best first; see :func:`best_of_n`.

    Conversations are answered together, and their candidates are those of each alone.
    """
    choice.check(model)
    options = Sampling(**sampling)
    prompts = [chat.prompt(messages, tokenizer) for messages in conversations]
    requests = [choice.request(model, prompt, options, seed) for prompt in prompts]
    weigh = probabilities(model, choice.head)
    for request in answered(model, tokenizer, requests):
        yield ranked(request.prompt, request.answers, tokenizer, choice, weigh)


def ranked(
    prompt: Sequence[int], answers: Sequence[Answer], tokenizer: Any, choice: Choice, weigh: Weights = logistic
) -> list[Candidate]:
    """Return the candidates of one prompt, best first; without a head by log-probability.

    ``weigh``: the weights of a vote (:func:`probabilities`).

    Raises ValueError if the reward of a finished answer or a log-probability is NaN.
    """
    candidates = []
    for answer in answers:
        reward = answer.rewards.get(choice.head, math.nan)
        if choice.head is not None and answer.finished:
            check_number(reward, "reward", answer.index)
        check_number(answer.logprob, "log-probability", answer.index)
        content = answer.tokens[: len(answer.tokens) - answer.finished]
        candidates.append(
            Candidate(
                text=tokenizer.decode(content, skip_special_tokens=False),
                reward=reward,
                logprob=answer.logprob,
                mean_logprob=answer.mean_logprob,
                finished=answer.finished,
                tokens=tuple(chat.continuation(prompt, answer.tokens, tokenizer).tokens[len(prompt) :]),
                spread=answer.spreads.get(choice.head, 0.0),
                pruned=answer.pruned,
                index=answer.index,
            )
        )
    scores = _scores(candidates, choice, weigh)
    order = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
    return [candidates[i] for i in order]


def check_number(value: float, kind: str, index: int) -> None:
    """Raise ValueError for NaN as the reward or log-probability (``kind``) of the candidate ``index``."""
    if math.isnan(value):
        raise ValueError(f"candidate {index}: expected a number as its {kind}, got NaN: the model's weights are broken")


def prompt_tokens(
    model: JudgingModel, tokenizer: Any, messages: Sequence[Message], max_new_tokens: int, where: str
) -> list[int]:
    """Return the tokens of a prompt up to the beginning of the answer.

    Raises UserError, which begins with ``where``, for a prompt that the chat format refuses, and for one that leaves no
    room for ``max_new_tokens`` in the model's context.
    """
    try:
        tokens = chat.prompt(messages, tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    context = getattr(model.backbone, "context", None) or model.config.max_position_embeddings
    if context is not None and len(tokens) + max_new_tokens > context:
        raise UserError(
            f"{where}: expected at most {context} tokens, the model's context, with --max-new-tokens {max_new_tokens}, "
            f"got a prompt of {len(tokens)}"
        )
    return tokens


def _scores(candidates: Sequence[Candidate], choice: Choice, weigh: Weights) -> list[tuple[Any, ...]]:
    """Return what candidates are ranked by, larger for better ones; finished ones are above all others."""
    by_reward = choice.head is not None and choice.rank != "logprob"
    risk = choice.risk if choice.rank == "lower_bound" else 0.0
    votes: dict[str, float] = defaultdict(float)
    if by_reward and choice.rank == "vote":
        finished = [candidate for candidate in candidates if candidate.finished]
        for candidate, weight in zip(finished, weigh([c.reward for c in finished]), strict=True):
            votes[choice.normalise(candidate.text)] += weight
    scores = []
    for candidate in candidates:
        value = candidate.logprob
        if by_reward and candidate.finished:
            value = candidate.reward - risk * candidate.spread
        vote = votes[choice.normalise(candidate.text)] if votes and candidate.finished else 0.0
        scores.append((candidate.finished, not candidate.pruned, vote, value))
    return scores
