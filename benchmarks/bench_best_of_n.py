"""Best-of-N sampling by a Llama-family model, compared with transformers' ``generate`` followed by scoring.

    .venv/bin/pytest benchmarks/bench_best_of_n.py --benchmark-only --llama models/SmolLM2-135M

times a directory of transformers; without ``--llama`` one with random weights, as bench_family.py. fp32 on the CPU,
bf16 on a GPU. Every candidate has all of its tokens: the last one is the end-of-turn token in place of the drawn one.

The result is the same for both: candidates with their log-probabilities and rewards. The rival computes them from the
whole conversations in one batch, with logits of the candidates' tokens alone. Before the timing our log-probabilities
and rewards are compared with the rival's of our candidates. The necessary work is that of each token of the prompt and
the candidates once.
"""

import functools
import gc
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dph
from benchmarks import bench_family, lengths
from benchmarks.bench_family import DEVICE, DTYPE
from dph.infer.pooled_engine import PooledEngine
from dph.infer.request import Answer, Request, fixed
from dph.infer.sampling import Sampling
from dph.infer.token_loop import TokenLoop
from dph.train.budget import flops

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[DTYPE]  # of the largest value
SECONDS = 6.0  # approximate time per row
TARGET = 3.0

tiny, model_path = bench_family.tiny, bench_family.model_path  # fixtures


class Job(NamedTuple):
    """One prompt, its candidates, and the tokens of each."""

    prompt: int
    candidates: int
    tokens: int


JOBS = [Job(256, 16, 64)] if DEVICE == "cpu" else [Job(512, 16, 128), Job(512, 128, 128)]


class FullLengthLoop(TokenLoop):
    """The engine's loop on a GPU, with candidates that end at their last token."""

    def choose(self, logits: Tensor) -> Tensor:
        """Replace the tokens that end too early, and those that do not end."""
        chosen = super().choose(logits)
        chosen = chosen.where(chosen != self.end, chosen + 1)
        return chosen.where(self.said + 1 < self.limit, self.end)


class FullLength(PooledEngine):
    """The engine, with candidates that end at their last token."""

    loop_type = FullLengthLoop

    def _draw(self, logits: Tensor) -> None:
        super()._draw(logits)
        states = self._states
        states["ending"] = states["said"] == states["limit"]
        last = (states["start"] + states["said"] - 1)[states["ending"]]
        drawn = self.pool.tokens[last].copy()
        self.pool.tokens[last] = self.end
        known = torch.from_numpy(drawn != self.end)
        if known.any():  # the log-probability is that of the token that takes the drawn one's place
            self.pool.keep_logprobs(last, logits, self.pool.tokens[last])


class Ours:
    """The engine with an identity head of random weights."""

    def __init__(self, directory: str, dtype: torch.dtype) -> None:
        config = dph.ModelConfig.from_pretrained(directory, reward_heads=["default"], reward_pooler="identity")
        self.model = dph.Model.from_pretrained(directory, config=config, dtype=dtype).to(DEVICE).eval()
        self.tokenizer = lengths.small_tokenizer()
        self._engines: dict[int, FullLength] = {}

    def answer(self, prompt: list[int], job: Job, seed: int) -> list[Answer]:
        """Return the candidates of a prompt, by an engine that is kept, as a server keeps its own."""
        rows = len(prompt) + job.candidates * (job.tokens + 1) + 4
        if rows not in self._engines:
            self._engines = {rows: FullLength(self.model, self.tokenizer, rows)}
        request = Request(prompt, fixed(job.candidates), Sampling(max_new_tokens=job.tokens), seed=seed)
        self._engines[rows].submit(request)
        self._engines[rows].run()
        return request.answers


class Transformers:
    """Sampling by ``generate``, and a forward pass over the conversations."""

    def __init__(self, directory: str, dtype: torch.dtype, vector: Tensor, end: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(DEVICE).eval()
        self.model.generation_config.eos_token_id = None
        self.vector, self.end = vector, end

    @torch.no_grad()
    def answer(self, prompt: list[int], job: Job, seed: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and rewards of the candidates of a prompt."""
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=DEVICE)
        said = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=job.candidates,
            max_new_tokens=job.tokens - 1, min_new_tokens=job.tokens - 1, top_k=0, top_p=1.0, temperature=1.0,
            pad_token_id=self.end,
        )  # fmt: skip
        end = said.new_full((len(said), 1), self.end)
        return self.score(torch.cat([said, end], 1), job.tokens)

    @torch.no_grad()
    def score(self, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the last ``tokens`` of conversations [N, S], and rewards of their last token."""
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, -tokens - 1 : -1]).float()
        chosen = logits.log_softmax(-1).gather(-1, ids[:, -tokens:, None]).squeeze(-1)
        return chosen.sum(1), (hidden[:, -1] @ self.vector[0]).float()


@functools.lru_cache(maxsize=4)
def made(kind: Any, directory: str, *arguments: Any) -> Any:
    """Return a contender; the last ones are kept."""
    gc.collect()
    return kind(directory, DTYPE, *arguments)


@pytest.mark.brief
@pytest.mark.parametrize("who", ["ours", "transformers"])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.candidates} of {job.tokens}")
def bench_candidates(job, who, model_path, request, timed, record):
    job = Job(24, 3, 6) if request.config.getoption("--quick") else job
    ours = made(Ours, model_path)
    end = dph.chat.markup(ours.tokenizer).end_of_turn
    vector = ours.model.heads["shared"].reward["default"].weight
    rival = made(Transformers, model_path, vector, end)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(17, ours.model.config.vocab_size, (job.prompt,), generator=generator).tolist()
    compare(ours.answer(prompt, job, 0), prompt, rival)
    timed(lambda: (ours if who == "ours" else rival).answer(prompt, job, 0), SECONDS)
    tokens = job.prompt + job.candidates * job.tokens
    record(
        f"{job.candidates} candidates of {job.tokens} tokens, prompt of {job.prompt}, "
        f"{bench_family.title(ours.model.config)}",
        "ours" if who == "ours" else "generate, then scoring",
        flops=2 * flops.backbone_weights(ours.model.config) * tokens,
        tokens=job.candidates * job.tokens,
        rival=who != "ours",
        target=None if who != "ours" else {"best rival": TARGET},
    )


def compare(answers: list[Answer], prompt: list[int], rival: Transformers) -> None:
    """Require the rival's log-probabilities and rewards of our candidates."""
    ids = torch.tensor([[*prompt, *answer.tokens] for answer in answers], device=DEVICE)
    logprobs, rewards = rival.score(ids, len(answers[0].tokens))
    found = [answer.logprob for answer in answers], [answer.rewards["default"] for answer in answers]
    for got, want in zip(found, (logprobs, rewards), strict=True):
        assert torch.tensor(got) == pytest.approx(want.cpu(), rel=0, abs=TOLERANCE * float(want.abs().max()))
