"""One optimizer step of every stage: from records in memory to new weights, through the trainer, against rivals.

On a GPU at the paper's shape (551M, 128 streams of 2048 tokens with a full memory of 2048; 64 pairs) in bf16 with fp32
master weights, on the CPU in miniature in fp32. Lengths are real if ../shared/data exists (benchmarks/lengths.py). All
contenders start from the same weights and take the same records. Each is first checked, in fp32 on a tiny model and
without dropout, to have our loss, gradients and weights. Useful arithmetic (dph/train/budget/flops.py) is the same for
all.

TRL's DPOTrainer, if installed, trains a Llama of the same size, since it cannot train this architecture: it is checked
against DPO's equation (benchmarks/trl_rival.py), and its useful arithmetic is assumed to be ours.
"""

import functools
import gc
import math

import pytest
import torch

from benchmarks import lengths, train_step
from benchmarks.train_step import MINIATURE, PAIRS, PAPER, TINY, Job, contenders
from dph.errors import UserError
from dph.train.budget import flops
from dph.train.cuda_graph import WARMUP_CALLS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = PAPER if DEVICE == "cuda" else MINIATURE
LOWERED = DEVICE == "cuda"
SECONDS = 5.0  # approximate time per row
ROUND = 1.0 if DEVICE == "cuda" else 0.0  # seconds of queued steps: the GPU does not wait for data
CLOSE = 0.02  # tolerance relative to our first loss, at the timed shape and precision
ALIGN = {"cpu": {"paper_layout": 4, "padding-free, no sharing": 1.4}, "cuda": {"paper_layout": 8}}[DEVICE]
GOALS = {"align": ALIGN, "sft": {"paper_layout": 1.3}}
STAGES = ("vocab", "sft", "align", "head")
BRIEF = (("sft", "ours"), ("align", "ours"))


def title(stage, shape=SHAPE):
    if stage in PAIRS:
        return f"{stage}, {shape.name}, {shape.pairs} pairs, {lengths.by_source()[0]}"
    return f"{stage}, {shape.name}, {shape.streams} x {shape.context} tokens, memory {shape.memory}"


@functools.cache
def amounts(stage, shape):
    return Job(stage=stage, shape=shape).amounts()


@functools.cache
def first_loss(stage, shape):
    job = Job(stage=stage, shape=shape, device=DEVICE, lowered=LOWERED, dropout=0.0)
    return float(contenders(stage, shape.pad)[0].make(job).step())


def checked(contender, stage, shape):
    """Return the contender at the timed shape, after checks there and, in fp32, at a tiny shape."""
    index = [c.who for c in contenders(stage, SHAPE.pad)].index(contender.who)
    train_step.check(contenders(stage, TINY.pad)[index], Job(stage=stage, shape=TINY, device=DEVICE))
    gc.collect()  # here and below: a trainer is a reference cycle, and would count in the next peak
    job = Job(stage=stage, shape=shape, device=DEVICE, lowered=LOWERED, dropout=0.0)
    loss = float(contender.make(job).step())
    expected = first_loss(stage, shape) if contender.check is None else math.log(2)
    assert abs(loss - expected) <= CLOSE * abs(expected), f"loss: expected {expected}, got {loss}"
    gc.collect()
    return contender.make(Job(stage=stage, shape=shape, device=DEVICE, lowered=LOWERED))


def peak(step):
    """Return the peak bytes in use during a step, weights included; None on the CPU, which does not count them."""
    if DEVICE == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


@pytest.fixture(scope="session")
def shape(request):
    return TINY if request.config.getoption("--quick") else SHAPE


@pytest.fixture
def clean():
    """Drop compiled graphs and GPU memory of the contender."""
    yield
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("stage", "contender"),
    [
        pytest.param(stage, c, id=f"{stage}-{c.who}", marks=[pytest.mark.brief] if (stage, c.who) in BRIEF else [])
        for stage in STAGES
        for c in contenders(stage, SHAPE.pad)
    ],
)
def bench_train_step(stage, contender, shape, timed, record, limits):
    ours = contender.kind == "ours"
    if contender.missing:
        pytest.skip(contender.missing)
    try:
        training = checked(contender, stage, shape)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, UserError) as error:
        if isinstance(error, UserError) and not str(error).startswith("compile:"):
            raise
        pytest.skip(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}")
    for _ in range(
        max(math.ceil(shape.memory / shape.context), WARMUP_CALLS) + 1
    ):  # memories filled, kernels tuned, graph recorded
        training.step()
    used = peak(training.step)
    estimate = training.estimated_peak() if ours and used and not contender.cached else None
    timed(training.step, SECONDS, ROUND)
    done = flops.Workload(judged=2 * shape.pairs) if contender.cached else amounts(stage, shape)
    record(
        title(stage, shape) + (", states cached" if contender.cached else ""),
        contender.who,
        flops=Job(stage=stage, shape=shape).needs(done),
        tokens=done.tokens or None,
        limit=limits.matmul(DEVICE, torch.bfloat16 if LOWERED else torch.float32),
        peak=used,
        estimate=estimate,
        rival=not ours,
        kind=contender.kind,
        target=GOALS.get(stage) if ours else None,
    )
