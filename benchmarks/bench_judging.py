"""Judging of answers by a Llama-family model, compared with what others use for it.

    .venv/bin/pytest benchmarks/bench_judging.py --benchmark-only --llama models/SmolLM2-135M

times a directory of transformers; without ``--llama`` one with random weights, as bench_family.py. fp32 on the CPU,
bf16 on a GPU. The tokens are random, with the lengths of real data, counted by SmolLM2's tokenizer.

    questions    four choices each, log-probabilities: ``model.judge``, and ``HFLM`` of lm-evaluation-harness by batch
    candidates   many of a prompt, rewards: ``model.judge``, and transformers' ``AutoModelForSequenceClassification`` on
                 the whole conversations of a prompt, padded to the longest

Ours also reads the rewards of the questions' answers. Before the timing, log-probabilities and the chosen answers are
compared with HFLM's, and rewards with the classifier's, at the timed size.
"""

import functools
import gc
import importlib.util
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dph
from benchmarks import bench_family, lengths
from benchmarks.bench_family import DEVICE, DTYPE
from dph.chat import Encoded
from dph.train.budget import flops

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[DTYPE]  # of the largest value
SECONDS = 3.0  # approximate time per row
MAX_TOKENS = 8192  # of a packed batch
MISSING = None if importlib.util.find_spec("lm_eval") else "lm-evaluation-harness is not installed: pip install lm-eval"

tiny, model_path = bench_family.tiny, bench_family.model_path  # fixtures


class Questions(NamedTuple):
    """A set of questions: number of tokens of prompts and of answers, and answers per question, from and to."""

    name: str
    count: int
    prompt: tuple[int, int]
    answers: tuple[int, int]
    answer: tuple[int, int]


# The ranges are the 10 % and 90 % quantiles of ARC-Easy, and of sampled answers to TruthfulQA.
CHOICES = Questions("questions of four choices", 12, (74, 124), (4, 4), (5, 13))
CANDIDATES = Questions("prompts of 16 to 28 candidates", 3, (37, 47), (16, 28), (5, 24))

Groups = list[list[Encoded]]


def draw(questions: Questions, vocabulary: int) -> Groups:
    """Return the answers of each question, which share its prompt."""
    rng, groups = random.Random(0), []

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [rng.randrange(17, vocabulary) for _ in range(rng.randint(*bounds))]

    for _ in range(questions.count):
        prompt, group = tokens(questions.prompt), []
        for _ in range(rng.randint(*questions.answers)):
            answer = tokens(questions.answer)
            ids, mask = prompt + answer, [False] * (len(prompt) - 1) + [True] * len(answer) + [False]
            group.append(Encoded(ids, [*ids[1:], 0], mask, mask, len(ids) - 1))
        groups.append(group)
    return groups


class Ours:
    """``model.judge`` with an identity head of random weights."""

    def __init__(self, directory: str, dtype: torch.dtype) -> None:
        config = dph.ModelConfig.from_pretrained(directory, reward_heads=["default"], reward_pooler="identity")
        self.model = dph.Model.from_pretrained(directory, config=config, dtype=dtype).to(DEVICE).eval()

    @property
    def vector(self) -> Tensor:
        """Weights [1, C] of the head."""
        return self.model.heads["shared"].reward["default"].weight

    def logprobs(self, groups: Groups) -> list[list[float]]:
        """Return the log-probability of each answer."""
        return [judged.logprobs for judged in self.model.judge(groups, MAX_TOKENS)]

    def rewards(self, groups: Groups) -> list[list[float]]:
        """Return the reward of each answer."""
        return [judged.rewards["default"] for judged in self.model.judge(groups, MAX_TOKENS, logprobs=False)]


class Harness:
    """lm-evaluation-harness's model of transformers, which sorts the answers by length."""

    def __init__(self, directory: str, dtype: torch.dtype, batch: int) -> None:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(DEVICE).eval()
        tokenizer = lengths.small_tokenizer()  # unused: the requests are tokens
        self.model = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch, max_length=4096)

    def logprobs(self, groups: Groups) -> list[list[float]]:
        """Return the log-probability of each answer."""
        requests = []
        for one in (answer for group in groups for answer in group):
            start = one.loss_mask.index(True) + 1
            requests.append((("", ""), one.tokens[:start], one.tokens[start:]))
        found = iter(self.model._loglikelihood_tokens(requests, disable_tqdm=True))
        return [[next(found)[0] for _ in group] for group in groups]


class Classifier:
    """transformers' class with the same head: the whole conversations of a prompt in one batch, padded."""

    def __init__(self, directory: str, dtype: torch.dtype, vector: Tensor) -> None:
        from transformers import AutoModelForSequenceClassification

        load = functools.partial(AutoModelForSequenceClassification.from_pretrained, dtype=dtype, num_labels=1)
        self.model = load(directory, pad_token_id=0).to(DEVICE).eval()  # no drawn token is 0
        self.model.score.weight.data.copy_(vector)

    @torch.no_grad()
    def rewards(self, groups: Groups) -> list[list[float]]:
        """Return the reward of each answer."""
        found = []
        for group in groups:
            longest = max(map(len, group))
            ids = torch.tensor([one.tokens + [0] * (longest - len(one)) for one in group], device=DEVICE)
            found.append(self.model(ids, attention_mask=(ids != 0).long()).logits[:, 0].tolist())
        return found


def compare(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    """Require the same values, and the same best answer of each question unless two differ by rounding alone."""
    limit = TOLERANCE * max(abs(value) for values in expected for value in values)
    for got, want in zip(found, expected, strict=True):
        off = max(abs(a - b) for a, b in zip(got, want, strict=True))
        assert off <= limit, f"off by {off:.1e}, at most {limit:.1e} expected"
        assert want[got.index(max(got))] >= max(want) - 2 * off


@functools.lru_cache(maxsize=4)
def made(kind: Any, directory: str, *arguments: Any) -> Any:
    """Return a contender; the last ones are kept."""
    gc.collect()
    return kind(directory, DTYPE, *arguments)


@pytest.mark.brief
@pytest.mark.parametrize("batch", [None, 1, 8, 32], ids=lambda batch: f"HFLM {batch}" if batch else "ours")
def bench_choices(batch, model_path, request, timed, record):
    if batch and MISSING:
        pytest.skip(MISSING)
    groups, ours = questions(CHOICES, model_path, request)
    if not MISSING:
        harness = made(Harness, model_path, batch or 8)
        compare(ours.logprobs(groups), harness.logprobs(groups))
    contender = harness if batch else ours
    timed(lambda: contender.logprobs(groups), SECONDS)
    report(record, CHOICES, groups, ours, f"HFLM, batches of {batch}" if batch else None)


@pytest.mark.brief
@pytest.mark.parametrize("who", ["ours", "transformers"])
def bench_candidates(who, model_path, request, timed, record):
    groups, ours = questions(CANDIDATES, model_path, request)
    classifier = made(Classifier, model_path, ours.vector)
    compare(ours.rewards(groups), classifier.rewards(groups))
    contender = ours if who == "ours" else classifier
    timed(lambda: contender.rewards(groups), SECONDS)
    report(record, CANDIDATES, groups, ours, None if who == "ours" else "transformers, conversations padded")


def questions(kind: Questions, directory: str, request: Any) -> tuple[Groups, Ours]:
    """Return the questions, two of them with ``--quick``, and our model."""
    ours = made(Ours, directory)
    groups = draw(kind, ours.model.config.vocab_size)
    return groups[:2] if request.config.getoption("--quick") else groups, ours


def report(record: Any, kind: Questions, groups: Groups, ours: Ours, rival: str | None) -> None:
    """Record a row; its tokens are those of prompts and answers, each once."""
    tokens = sum(len(group[0]) + sum(sum(one.loss_mask) for one in group[1:]) for group in groups)
    record(
        f"{len(groups)} {kind.name}, {bench_family.title(ours.model.config)}",
        rival or "ours",
        flops=2 * flops.backbone_weights(ours.model.config) * tokens,
        tokens=tokens,
        rival=rival is not None,
    )
