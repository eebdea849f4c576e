"""Responses in the forms of OpenAI's, Jina's and Cohere's clients, as JSON."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dph.infer.best_of_n import Candidate
    from dph.serve.jobs import Ranked, Rewards

PIECE = 64  # characters of an answer in one event of a stream


def number(value: float) -> float | None:
    """Return a number; None for one that JSON lacks."""
    return value if math.isfinite(value) else None


def data(value: Any) -> str:
    """Return a server-sent event without a name."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def candidate(one: Candidate, index: int) -> dict[str, Any]:
    """Return a candidate of ``return_candidates``."""
    return {
        "index": index,
        "text": one.text,
        "reward": number(one.reward),
        "spread": one.spread,
        "logprob": number(one.logprob),
        "mean_logprob": number(one.mean_logprob),
        "finish_reason": finish_reason(one.finished, one.pruned),
    }


def finish_reason(finished: bool, pruned: bool = False) -> str:
    """Return the reason for an answer's end in OpenAI's words, or "pruned"."""
    if finished:
        return "stop"
    return "pruned" if pruned else "length"


class Completion:
    """One chat completion, whole or in chunks.

    Args:
        model: name.
        prompt_tokens: of the prompt.
        with_candidates: whether the result has all candidates.
    """

    def __init__(self, model: str, prompt_tokens: int, with_candidates: bool) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens, self._with_candidates = prompt_tokens, with_candidates

    def whole(self, ranked: Ranked, n: int) -> dict[str, Any]:
        """Return the best ``n`` candidates."""
        choices = []
        for index, one in enumerate(ranked.candidates[:n]):
            message = {"role": "assistant", "content": one.text, "refusal": None}
            end = {"finish_reason": finish_reason(one.finished), "logprobs": None, "reward": number(one.reward)}
            choices.append({"index": index, "message": message, **end})
        result = {**self._head, "object": "chat.completion", "choices": choices, "usage": self.usage(ranked)}
        return {**result, **self._candidates(ranked)}

    def usage(self, ranked: Ranked) -> dict[str, int]:
        """Return the tokens of the prompt and of all candidates, returned or not."""
        sampled, prompt = ranked.sampled_tokens, self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}

    def beginning(self, index: int) -> str:
        """Return the event that begins a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> str:
        """Return the event of a part of a choice's text."""
        return self._chunk(index, {"content": text})

    def pieces(self, index: int, text: str) -> Iterator[str]:
        """Yield the events of a text that is known."""
        for start in range(0, len(text), PIECE):
            yield self.piece(index, text[start : start + PIECE])

    def ending(self, index: int, one: Candidate) -> str:
        """Return the event that ends a choice."""
        return self._chunk(index, {}, finish_reason(one.finished), {"reward": number(one.reward)})

    def last(self, ranked: Ranked, with_usage: bool) -> Iterator[str]:
        """Yield the events after all choices."""
        if self._with_candidates:
            yield self._event([], self._candidates(ranked))
        if with_usage:
            yield self._event([], {"usage": self.usage(ranked)})
        yield "data: [DONE]\n\n"

    def _candidates(self, ranked: Ranked) -> dict[str, Any]:
        if not self._with_candidates:
            return {}
        pairs = zip(ranked.candidates, ranked.indices, strict=True)
        return {"candidates": [candidate(one, index) for one, index in pairs]}

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None = None, extra: dict[str, Any] | None = None
    ) -> str:
        return self._event(
            [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **(extra or {})}], {}
        )

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
        return data({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


def scores(
    model: str,
    heads: Sequence[str],
    rewards: Rewards,
    probabilities: dict[str, list[float | None]],
    tokens: int,
) -> dict[str, Any]:
    """Return the rewards of conversations by head, with spreads of ensembles and probabilities of calibrated heads."""
    rows = []
    for i in range(len(rewards.rewards[heads[0]])):
        row: dict[str, Any] = {"index": i, "object": "score"}
        row["rewards"] = {head: number(rewards.rewards[head][i]) for head in heads}
        row["probabilities"] = {head: probabilities[head][i] for head in heads}
        row["spreads"] = {head: number(rewards.spreads[head][i]) for head in heads if head in rewards.spreads}
        rows.append(row)
    return {"object": "list", "model": model, "data": rows, "usage": _usage(tokens)}


def ranking(
    model: str, documents: Sequence[str], rewards: Sequence[float], top_n: int | None, with_texts: bool, tokens: int
) -> dict[str, Any]:
    """Return documents by their rewards, best first."""
    results = []
    for i in sorted(range(len(documents)), key=lambda i: -rewards[i])[:top_n]:
        result: dict[str, Any] = {"index": i, "relevance_score": rewards[i]}
        if with_texts:
            result["document"] = {"text": documents[i]}
        results.append(result)
    identifier = f"rerank-{secrets.token_hex(12)}"
    return {"id": identifier, "object": "list", "model": model, "results": results, "usage": _usage(tokens)}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
