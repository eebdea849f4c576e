"""Model ``dph`` of lm-evaluation-harness: its tasks, answered by log-probability or by reward.

    python -m dph.evaluate.harness --model dph --model_args pretrained=MODEL --tasks arc_easy
    python -m dph.evaluate.harness --model dph --model_args pretrained=MODEL,choose_by=reward,head=NAME \\
        --tasks arc_easy --apply_chat_template

The harness finds no models of other packages by itself, so the module registers this one and then runs the harness's
own command line. In a program, ``import dph.evaluate.harness`` before ``lm_eval.simple_evaluate(model="dph", ...)``.

The continuations of one context are computed together, the context once. By reward, a continuation counts as an answer
that has ended, and its reward takes the place of its log-likelihood: ``acc`` is the reward's choice (``acc_norm``,
which divides by the length, has no meaning). Without a chat template the context is the user's message. A conversation
is encoded as :func:`dph.chat.encode` does, so that text of a task never becomes a control token.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        raise SystemExit(f"dph: error: lm-evaluation-harness: {error}: pip install lm-eval") from error
    raise

from dph import chat, devices
from dph.chat import Encoded
from dph.data.packing import batches, pack
from dph.errors import UserError
from dph.evaluate.metrics import check_finite
from dph.model.config import DTYPES
from dph.model.judging import MAX_TOKENS
from dph.model.loading import check_tokenizer, load_model, load_tokenizer

CONVERSATION = "dph conversation: "  # begins a context that is messages in JSON

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of context and continuation


@register_model("dph")
class HarnessModel(HFLM):
    """A model with reward heads in lm-evaluation-harness.

    Args:
        pretrained: directory of a model or run, a hub name, or a model.
        choose_by: "logprob" or "reward".
        head: reward head, for "reward".
        tokenizer: directory, name or tokenizer; None: the model's.
        dtype: of the weights, as text.
        device: of the model; None, or a GPU where there is none: the one that is there.
        options: further arguments of the harness's ``HFLM``, such as ``max_length``.

    Raises UserError for an unknown ``choose_by`` or ``dtype``, and for a missing or untrained head. Scores that are NaN
    or infinite are a RuntimeError.
    """

    def __init__(
        self,
        pretrained: Any,
        choose_by: str = "logprob",
        head: str = "default",
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if choose_by not in ("logprob", "reward"):
            raise UserError(f"choose_by: expected logprob or reward, got {choose_by!r}")
        if dtype not in DTYPES:
            raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        model = pretrained
        if isinstance(pretrained, str):
            if device is None or not torch.cuda.is_available():  # the harness's default is a GPU
                device = devices.choose("auto")
            model = load_model(pretrained, dtype=getattr(torch, dtype)).to(device)
            tokenizer = pretrained if tokenizer is None else tokenizer
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        check_tokenizer(model, tokenizer)
        if choose_by == "reward":
            try:
                model.check_heads(head)
            except ValueError as error:
                raise UserError(str(error)) from error
        self._choose_by, self._head = choose_by, head
        super().__init__(pretrained=model.eval(), tokenizer=tokenizer, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; by reward its messages, which :meth:`loglikelihood` reads."""
        if self._choose_by == "reward":
            return CONVERSATION + json.dumps([chat_history, not add_generation_prompt])
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether it is greedy), or (reward, False), of each request."""
        if self._choose_by == "logprob":
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        groups, found = [], []
        for _, group in itertools.groupby(requests, lambda request: request.args[0]):
            groups.append([self._conversation(*request.args) for request in group])
        for judged in self.model.judge(groups, logprobs=False):
            check_finite(judged.rewards[self._head], f"request {len(found)}: reward")
            found += [(reward, False) for reward in judged.rewards[self._head]]
        return found

    def _conversation(self, context: str, continuation: str) -> Encoded:
        """Encode a conversation that ends in the continuation; spaces around it, which join texts, are left out."""
        answer = continuation.strip()
        if context.startswith(CONVERSATION):
            messages, ends_in_answer = json.loads(context.removeprefix(CONVERSATION))
            if ends_in_answer:  # the beginning of the answer is given
                answer = messages.pop()["content"] + continuation.rstrip()
        else:
            messages = [{"role": "user", "content": context.strip()}]
        return chat.encode([*messages, {"role": "assistant", "content": answer}], self.tokenizer, last_only=True)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, those of one context packed together; the oldest tokens are cut off."""
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2]))
        groups: list[list[int]] = []
        for i in order:
            if not groups or requests[groups[-1][0]][1] != requests[i][1]:
                groups.append([])
            groups[-1].append(i)
        groups.sort(key=lambda group: len(requests[group[0]][1]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        indices = iter(itertools.chain.from_iterable(groups))
        encoded = ([self._cut(*requests[i][1:]) for i in group] for group in groups)
        for batch in batches(encoded, MAX_TOKENS):
            for result in self._judge(batch):
                i = next(indices)
                check_finite(result[:1], f"request {i}: log-likelihood")
                found[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> Encoded:
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(f"continuation: expected 1 to {self.max_length} tokens, got {len(continuation)}")
        tokens = (context + continuation)[-(self.max_length + 1) :]
        first = len(tokens) - len(continuation) - 1
        mask = [i >= first for i in range(len(tokens) - 1)]
        return Encoded(tokens[:-1], tokens[1:], mask, mask, None)

    def _judge(self, batch: list[list[Encoded]]) -> list[tuple[float, bool]]:
        """Return the sums over each answer's targets, and whether all of them are the likeliest tokens."""
        packed = pack(batch).to(self.model.device)
        hidden = self.model.backbone(packed.tokens, packed.layout)
        states = self.model.output_proj(hidden[packed.rows])
        logprobs, _, likeliest = self.model._logprobs(states, packed.targets, statistics=True)
        count = sum(map(len, batch))
        sums = logprobs.new_zeros(count).index_add(0, packed.answers, logprobs)
        misses = logprobs.new_zeros(count).index_add(
            0, packed.answers, (likeliest != packed.targets).to(logprobs.dtype)
        )
        return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))


def main() -> None:
    """Run the harness's command line with model ``dph`` known; a UserError ends it with one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        raise SystemExit(f"dph: error: {error}") from error


if __name__ == "__main__":
    main()
