"""One update of the weights in every stage: data in memory to new weights, through the trainer, against other ways.

On a GPU at the paper's shape (551M, 128 streams of 2048 tokens with a full memory of 2048; 64 pairs) in bf16 with fp32
masters, on the CPU in miniature in fp32. Lengths are real where ../shared/data is there (benchmarks/lengths.py). All
contenders start from the same weights and take the same records; each is first checked, in fp32 on a tiny model and
without dropout, to have our loss, gradients and weights. Useful arithmetic (dph/flops.py) is the same for all that are
compared.

TRL's DPOTrainer, where it is installed, trains a Llama as large, since it cannot train this architecture: it is checked
against DPO's equation instead (benchmarks/trl_rival.py), and its useful arithmetic is reckoned to be ours.
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
from dph.train.cuda_graph import WARM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = PAPER if DEVICE == "cuda" else MINIATURE
LOWERED = DEVICE == "cuda"
SECONDS = 5.0  # each row is timed for about so long
ROUND = 1.0 if DEVICE == "cuda" else 0.0  # steps in a row, for whose data the GPU does not wait: as in a trainer's loop
CLOSE = 0.02  # of our first loss, at the shape and in the precision that are timed
ALIGN = {"cpu": {"paper_layout": 4, "padding-free, no sharing": 1.4}, "cuda": {"paper_layout": 8}}[DEVICE]
GOALS = {"align": ALIGN, "sft": {"paper_layout": 1.3}}
STAGES = ("vocab", "sft", "align", "head")


def title(stage):
    shape = SHAPE
    if stage in PAIRS:
        return f"{stage}, {shape.name}, {shape.pairs} pairs, {lengths.found()[0]}"
    return f"{stage}, {shape.name}, {shape.streams} x {shape.context} tokens, memory {shape.memory}"


@functools.cache
def amounts(stage):
    return Job(stage=stage, shape=SHAPE).amounts()


@functools.cache
def first_loss(stage):
    job = Job(stage=stage, shape=SHAPE, device=DEVICE, lowered=LOWERED, dropout=0.0)
    return float(contenders(stage, SHAPE.pad)[0].make(job).step())


def checked(contender, stage):
    """The contender at the shape that is timed, after it was shown to be right there and, in fp32, on a tiny one."""
    place = [c.who for c in contenders(stage, SHAPE.pad)].index(contender.who)
    train_step.check(contenders(stage, TINY.pad)[place], Job(stage=stage, shape=TINY, device=DEVICE))
    gc.collect()  # here and below: a trainer is a cycle, and what is left of it would count as somebody's peak
    job = Job(stage=stage, shape=SHAPE, device=DEVICE, lowered=LOWERED, dropout=0.0)
    loss, expected = float(contender.make(job).step()), first_loss(stage) if contender.check is None else math.log(2)
    assert abs(loss - expected) <= CLOSE * abs(expected), f"loss: expected {expected}, got {loss}"
    gc.collect()
    return contender.make(Job(stage=stage, shape=SHAPE, device=DEVICE, lowered=LOWERED))


def peak(step):
    """Bytes in use at the peak of a step, weights and all; None on the CPU, which does not count."""
    if DEVICE == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


@pytest.fixture
def clean():
    """No compiled graph, and no memory on the GPU, that another contender has left."""
    yield
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("stage", "contender"),
    [(stage, c) for stage in STAGES for c in contenders(stage, SHAPE.pad)],
    ids=lambda x: x if isinstance(x, str) else x.who,
)
def bench_train_step(stage, contender, timed, record, limits):
    ours = contender.kind == "ours"
    if contender.missing:
        pytest.skip(contender.missing)
    try:
        training = checked(contender, stage)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, UserError) as error:
        if isinstance(error, UserError) and not str(error).startswith("compile:"):
            raise
        pytest.skip(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}")
    for _ in range(max(math.ceil(SHAPE.memory / SHAPE.context), WARM) + 1):  # memories full, kernels chosen, recorded
        training.step()
    used = peak(training.step)
    timed(training.step, SECONDS, ROUND)
    done = flops.Amounts(judged=2 * SHAPE.pairs) if contender.cached else amounts(stage)
    record(
        title(stage) + (", states cached" if contender.cached else ""),
        contender.who,
        flops=Job(stage=stage, shape=SHAPE).needs(done),
        tokens=done.tokens or None,
        limit=limits.matmul(DEVICE, torch.bfloat16 if LOWERED else torch.float32),
        peak=used,
        rival=not ours,
        kind=contender.kind,
        target=GOALS.get(stage) if ours else None,
    )
