"""The engine for models of ``dph.attach``: one request after another, by the network's own cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dph import chat
from dph.errors import UserError
from dph.infer.choice import candidate_keys, choose
from dph.infer.request import Answer, Engine, Request
from dph_kernels.transfer import to_device

if TYPE_CHECKING:
    from dph.infer.sampling import Sampling
    from dph.model.judging import JudgingModel


class AttachedEngine(Engine):
    """One request after another, by the network's own cache; answers are judged in a second pass."""

    def __init__(self, model: JudgingModel, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, chat.markup(tokenizer).end_of_turn)

    def check(self, request: Request) -> None:
        """See :meth:`Engine.check`."""
        if request.pruning is not None:
            raise UserError("prune_every: expected a model of this package (dph.Model), got an attached one")

    def cancel(self, request: Request) -> None:
        """See :meth:`Engine.cancel`."""
        if request in self.requests:
            request.done = True
            self.requests.remove(request)

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Answer]]:
        """Answer the first request, up to the end of its plan's round."""
        if not self.requests:
            return []
        request = self.requests[0]
        count = request.wanted - request.started
        sampled = self._sample(request, count)
        answers = self._judged(request, sampled)
        request.started += count
        for answer in answers:
            request.add(answer)
        if request.done:
            self.requests.remove(request)
        return [(request, answer) for answer in answers]

    def _sample(self, request: Request, count: int) -> list[list[int]]:
        """Return the tokens of the next ``count`` answers."""
        device, limit = self.model.device, request.sampling.max_new_tokens
        ids = torch.tensor([request.prompt], device=device)
        next_logits = self.model.decoder(ids, torch.ones_like(ids), limit, count)
        indices = range(request.started, request.started + count)
        keys = to_device(torch.from_numpy(candidate_keys(request.seed, request.prompt, indices)), device)
        tokens, seen = ids[:, -1:].repeat_interleave(count, 0), ids.repeat_interleave(count, 0)
        answers: list[list[int]] = [[] for _ in range(count)]
        open_ones = set(range(count))
        for step in range(limit):
            logits = next_logits(tokens).float()
            chosen = choose(logits, request.sampling, keys, keys.new_full((count,), step), seen=seen)
            tokens = chosen[:, None]
            seen = torch.cat([seen, tokens], 1)
            for i, token in enumerate(chosen.tolist()):
                if i in open_ones:
                    answers[i].append(token)
                    if token == self.end or self._stopped(answers[i], request.sampling):
                        open_ones.discard(i)
            if not open_ones:
                break
        return answers

    def _stopped(self, answer: list[int], sampling: Sampling) -> bool:
        """End an answer before a stop text if it has said one; return whether."""
        if not sampling.stop:
            return False
        text = self.tokenizer.decode(answer, skip_special_tokens=False)
        if (end := sampling.stop_place(text)) is None:
            return False
        answer[:] = [*chat.plain(self.tokenizer)(text[:end]), self.end]
        return True

    def _judged(self, request: Request, sampled: Sequence[list[int]]) -> list[Answer]:
        group = [chat.continuation(request.prompt, tokens, self.tokenizer) for tokens in sampled]
        (judged,) = self.model.judge([group])
        answers = []
        for i, tokens in enumerate(sampled):
            finished, mean = tokens[-1:] == [self.end], judged.mean_logprobs[i]
            figures = [{}, {}]
            if finished and request.rewards:
                figures = [{head: own[i] for head, own in part.items()} for part in (judged.rewards, judged.spreads)]
            answers.append(
                Answer(
                    request.started + i, tuple(tokens), finished, judged.logprobs[i],
                    math.nan if mean is None else mean, *figures,
                )
            )  # fmt: skip
        return answers
