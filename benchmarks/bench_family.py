"""A Llama-family model in our implementation, compared with transformers' own and with TRL's trainer.

    .venv/bin/pytest benchmarks/bench_family.py --benchmark-only --llama models/SmolLM2-135M

times a directory of transformers; without ``--llama`` one with random weights: tiny on the CPU, of TinyLlama's sizes
(1.1B) on a GPU. fp32 on the CPU, bf16 on a GPU.

| row | ours | transformers, with SDPA |
|---|---|---|
| prefill | logits of the last of 2048 tokens | the same call |
| pairs, forward + backward | log-probabilities of packed pairs, prompts shared | rows padded to the longest of some |
| rows, forward + backward | loss of rows of whole conversations | the same call |
| step | our trainer, stages align and sft: loss, gradients, LaProp | TRL's DPOTrainer on the same pairs |

Both start from the same weights. Before the timing, loss and gradients are compared in fp32 on a tiny model, and again
at the timed size; gradients by their norm, which does not depend on the joining of weights, and by the embedding's. On
the CPU prefill and gradients are timed in turns. Peak memory of a step there is that of a process of its own, beyond
the libraries' (benchmarks/peak_memory.py).
"""

import dataclasses
import functools
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dph
from benchmarks import lengths, train_step, trl_rival
from benchmarks.llama import SMALL_LLAMA, TINY_LLAMA, TINYLLAMA_1B, save_llama
from benchmarks.paper_layout import Padded
from benchmarks.train_step import FAMILY, FAMILY_GPU, FAMILY_TINY, Job, Shape
from dph.chat import Encoded
from dph.data.packing import pack
from dph.losses import IGNORED, sequence_logprobs
from dph.train.budget import flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PREFILL = 2048
ROWS = 8 if DEVICE == "cuda" else 4  # of a row
SECONDS = 3.0  # approximate time per row
ROOT = Path(__file__).resolve().parents[1]

# Relative tolerances of loss, gradient's norm and embedding's gradient. The GPU's fp32 products split numbers.
EXACT = {"cpu": (1e-5, 1e-4, 1e-4), "cuda": (1e-4, 1e-3, 1e-2)}[DEVICE]
TIMED = {"cpu": EXACT, "cuda": (1e-2, 2e-2, 5e-2)}[DEVICE]
LOGITS = {torch.float32: 1e-3, torch.bfloat16: 4e-2}  # of the largest


def make_shape(quick: bool) -> Shape:
    """Return the sizes of a step."""
    if quick:
        return FAMILY_TINY
    return FAMILY_GPU if DEVICE == "cuda" else FAMILY


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny"), TINY_LLAMA, torch.float32, DEVICE)


@pytest.fixture(scope="session")
def shape(request):
    return make_shape(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def model_path(request, tiny, tmp_path_factory):
    if given := request.config.getoption("--llama"):
        return given
    if request.config.getoption("--quick"):
        return tiny
    sizes = TINYLLAMA_1B if DEVICE == "cuda" else SMALL_LLAMA
    return save_llama(tmp_path_factory.mktemp("llama"), sizes, DTYPE, DEVICE)


@pytest.fixture
def clean():
    """Drop the models of the row before."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Models(NamedTuple):
    """The same weights in both implementations."""

    ours: dph.Model
    theirs: nn.Module

    @classmethod
    @functools.lru_cache(maxsize=2)
    def load(cls, directory: str, dtype: torch.dtype) -> "Models":
        """Return both models of a directory on the device, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        ours = dph.Model.from_pretrained(directory, dtype=dtype)
        return cls(*(model.to(DEVICE).eval() for model in (ours, theirs)))

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.ours.config.vocab_size


# The work: name -> functions that return a loss


class Losses(NamedTuple):
    """A loss in both implementations, and its work.

    Attributes:
        ours, theirs: return the parts of the loss, one after the other, each to be followed by its backward pass.
    """

    ours: Callable[[], list[Callable[[], Tensor]]]
    theirs: Callable[[], list[Callable[[], Tensor]]]
    work: flops.Workload


def pair_losses(models: Models, shape: Shape) -> Losses:
    """Return the mean negative log-probability of the answers of preference pairs."""
    pairs = lengths.pairs(shape.pairs, models.vocabulary, shape.pad)
    work = flops.pairs_workload(pairs)
    packed = pack(pairs).to(DEVICE)
    groups = [pairs[i : i + shape.micro_pairs] for i in range(0, len(pairs), shape.micro_pairs)]
    padded = [Padded.from_pairs(group, None, torch.device(DEVICE)) for group in groups]

    def theirs(batch: Padded) -> Tensor:
        mask = torch.arange(batch.tokens.shape[1], device=DEVICE) <= batch.ends[:, None] + lengths.TAIL
        logits = models.theirs(batch.tokens, attention_mask=mask.long()).logits
        return -sequence_logprobs(logits, batch.targets).sum() / work.targets

    return Losses(
        lambda: [lambda: -models.ours.forward_packed(packed).logprobs.sum() / work.targets],
        lambda: [lambda batch=batch: theirs(batch) for batch in padded],
        flops.Workload(work.tokens, work.visible, 0, work.targets),
    )


def row_losses(models: Models, shape: Shape, rows: int = ROWS) -> Losses:
    """Return the mean negative log-probability of the targets in rows of whole conversations, end to end."""
    tokens, labels = [], []
    while len(tokens) < rows * shape.context:
        for one in lengths.conversations(shape.pairs, models.vocabulary, shape.pad):
            tokens += one.tokens
            labels += _labels(one)
    ids, labels = (
        torch.tensor(values[: rows * shape.context], device=DEVICE).view(rows, -1) for values in (tokens, labels)
    )
    targets = int((labels[:, 1:] != IGNORED).sum())
    work = flops.streams_workload(rows, shape.context, 0, targets)

    def parts(model: nn.Module) -> Callable[[], list[Callable[[], Tensor]]]:
        return lambda: [lambda: model(ids, labels=labels).loss]

    return Losses(parts(models.ours), parts(models.theirs), work)


def _labels(one: Encoded) -> list[int]:
    """Return a label per token: itself if it is a target, else -100."""
    shifted = [target if counted else IGNORED for target, counted in zip(one.targets, one.loss_mask, strict=True)]
    return [IGNORED, *shifted[:-1]]


WORKS = {"pairs": pair_losses, "rows": row_losses}


def run(model: nn.Module, losses: Callable[[], list[Callable[[], Tensor]]]) -> float:
    """Run forward and backward passes from no gradients; return the loss."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses():
        value = loss()
        value.backward()
        total += value.detach()
    return total


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients."""
    return sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5


def compare(models: Models, losses: Losses, tolerances: tuple[float, float, float]) -> None:
    """Require the same loss, the same norm of the gradients and the same gradient of the embedding."""
    got, want = (float(run(model, each)) for model, each in zip(models, losses[:2], strict=True))
    assert abs(got - want) <= tolerances[0] * abs(want), f"loss: expected {want}, got {got}"
    got, want = (gradient_norm(model) for model in models)
    assert abs(got - want) <= tolerances[1] * want, f"norm of the gradients: expected {want}, got {got}"
    got, want = (model.get_input_embeddings().weight.grad.float() for model in models)
    off = float((got - want).norm() / want.norm())
    assert off <= tolerances[2], f"gradient of the embedding: off by {off:.1e}"


@functools.lru_cache(maxsize=1)
def compared(name: str, tiny: str, directory: str, shape: Shape) -> tuple[Models, Losses]:
    """Return models and losses of a row, after checks of a tiny model in fp32 and of the timed one."""
    models = Models.load(tiny, torch.float32)
    with train_step.every_kernel():
        compare(models, WORKS[name](models, FAMILY_TINY), EXACT)
    models = Models.load(directory, DTYPE)
    losses = WORKS[name](models, shape)
    compare(models, losses, TIMED)
    return models, losses


def title(config: Any) -> str:
    """Return the sizes of a model for a row's name."""
    return f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.vocab_size} tokens"


@pytest.mark.brief
@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("who", ["ours", "transformers"])
def bench_prefill(who, tiny, model_path, timed, peak_memory, record, limits):
    for directory, dtype in ((tiny, torch.float32), (model_path, DTYPE)):
        models = Models.load(directory, dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(models.vocabulary, (1, PREFILL), generator=generator).to(DEVICE)
        with torch.no_grad():
            got, want = (model(ids, logits_to_keep=1).logits.float() for model in models)
        error = (got - want).abs().max() / want.abs().max()
        assert error <= LOGITS[dtype], f"logits: off by {error:.1e}"
    mine, other = models if who == "ours" else models[::-1]

    @torch.no_grad()
    def call(model):
        model(ids, logits_to_keep=1)

    peak = peak_memory(lambda: call(mine))
    timed(lambda: call(mine), SECONDS, before=None if DEVICE == "cuda" else lambda: call(other))
    config = models.ours.config
    work = flops.streams_workload(1, PREFILL, 0, 1)
    record(
        f"prefill of {PREFILL} tokens, {title(config)}",
        who,
        flops=2 * (flops.backbone_weights(config) * PREFILL + flops.head_weights(config)) + attention(config, work, 2),
        tokens=PREFILL,
        limit=limits.matmul(DEVICE, DTYPE),
        peak=peak,
        rival=who != "ours",
    )


def attention(config: Any, work: flops.Workload, products: int) -> float:
    """Return the operations of ``products`` products of attention in all layers."""
    return 2 * products * config.num_attention_heads * config.head_dim * config.num_hidden_layers * work.visible


@pytest.mark.brief
@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("who", ["ours", "transformers"])
@pytest.mark.parametrize("name", WORKS)
def bench_gradients(name, who, shape, tiny, model_path, timed, peak_memory, record, limits):
    models, losses = compared(name, tiny, model_path, shape)
    turns = {"ours": lambda: run(models.ours, losses.ours), "transformers": lambda: run(models.theirs, losses.theirs)}
    mine, other = turns.pop(who), *turns.values()
    for model in models:
        model.zero_grad(set_to_none=True)
    peak = peak_memory(mine)
    timed(mine, SECONDS, before=None if DEVICE == "cuda" else other)
    config = models.ours.config
    shown = f"{shape.pairs} pairs" if name == "pairs" else f"{ROWS} rows of {shape.context} tokens"
    record(
        f"{shown}, forward + backward, {title(config)}",
        who,
        flops=flops.step_flops(config, "sft", losses.work),
        tokens=losses.work.tokens,
        limit=limits.matmul(DEVICE, DTYPE),
        peak=peak,
        rival=who != "ours",
    )


# Steps

TRL = train_step.TRL._replace(who="TRL DPOTrainer, no reward")
STEPS = [("align", train_step.contenders("align", FAMILY.pad)[0]), ("align", TRL)]
STEPS.append(("sft", train_step.contenders("sft", FAMILY.pad)[0]))


def check_step(stage: str, directory: str) -> None:
    """Compare loss and gradients of our step with DPO's equation, or with transformers' loss, on a tiny model in fp32.

    The policy is the reference in the first step: the loss is log 2, whatever the model is, but not its gradient.
    """
    terms = ("objective.dph_weight=0", "objective.dpo_epsilon=0") if stage == "align" else ()
    job = Job(stage=stage, shape=FAMILY_TINY, model=directory, device=DEVICE, overrides=terms, dropout=0.0)
    theirs = trl_rival.llama(job).to(DEVICE)
    if stage == "align":
        examples = [trl_rival.example(pair) for pair in job.records()]
        loss = trl_rival.equation(theirs, theirs, examples)
    else:
        tokens, targets = (x.to(DEVICE) for x in next(job.make_stage().batches))
        counted = (targets != IGNORED).sum()
        loss = -sequence_logprobs(theirs(tokens).logits, targets).sum() / counted
    loss.backward()
    seen: dict[str, Tensor] = {}
    training = train_step.Ours(job.packed().make_stage())
    training.watch = lambda gradients: seen.update({name: g.clone() for name, g in gradients.items() if g is not None})
    with train_step.every_kernel():
        got = float(training.step())
    want = float(loss.detach())
    assert abs(got - want) <= EXACT[0] * abs(want), f"loss: expected {want}, got {got}"
    norm = sum(float(gradient.double().square().sum()) for gradient in seen.values()) ** 0.5
    assert abs(norm - gradient_norm(theirs)) <= EXACT[1] * norm, f"gradients: expected {gradient_norm(theirs)}"


def peak_in_a_process(directory: str, who: str) -> tuple[float, float | None]:
    """Return peak bytes of steps in a process of their own beyond the libraries', and our estimate."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", directory, "--who", who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures["peak"] - figures["baseline"], figures["estimate"]


@pytest.mark.brief
@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(("stage", "contender"), STEPS, ids=lambda x: x if isinstance(x, str) else x.who)
def bench_step(stage, contender, shape, tiny, model_path, timed, record, limits):
    if contender.missing:
        pytest.skip(contender.missing)
    if contender.check is None:
        check_step(stage, tiny)
    else:
        contender.check(Job(stage=stage, shape=FAMILY_TINY, model=tiny, device=DEVICE))
    job = Job(stage=stage, shape=shape, model=model_path, device=DEVICE, lowered=DEVICE == "cuda")
    if contender.kind != "ours" and DEVICE == "cpu":
        job = job.with_overrides(train_step.FEW_PAIRS)
    for cached in (Models.load, compared):  # models of the rows before, whose memory the step needs
        cached.cache_clear()
    training = contender.make(job)
    training.step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        training.step()
        peak = torch.cuda.max_memory_allocated()
        estimate = training.estimated_peak() if contender.kind == "ours" else None
    else:
        quick = shape is FAMILY_TINY  # no step has the memory of the timed one
        peak, estimate = (
            (None, None) if quick or stage == "sft" else peak_in_a_process(model_path, contender.who.split()[0])
        )
    timed(training.step, SECONDS)
    amounts, config = dataclasses.replace(job, model=tiny).amounts(), job.config()  # amounts: the same for all models
    record(
        f"step of stage {stage}, {title(config)}",
        contender.who,
        flops=job.needs(amounts),
        tokens=amounts.tokens,
        limit=limits.matmul(DEVICE, DTYPE),
        peak=peak,
        estimate=estimate,
        rival=contender.kind != "ours",
    )
