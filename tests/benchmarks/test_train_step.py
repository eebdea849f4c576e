"""The benchmark of training steps: rivals compute what ours computes, lengths are as told, arithmetic is counted."""

import dataclasses

import pytest
import torch

import dph
from benchmarks import lengths, train_step
from benchmarks.train_step import PAIRS, TINY, Job
from dph.data.formats import Preference
from dph.data.packing import pack
from dph.train.budget import flops
from dph_kernels import PackedLayout
from dph_kernels.layout import common_prefix

STAGES = ("vocab", "sft", "align", "head")
CONTENDERS = [
    (stage, contender)
    for stage in STAGES
    for contender in train_step.contenders(stage, TINY.pad)[1:]
    if "compile" not in contender.who and not contender.missing
]


@pytest.fixture(autouse=True)
def synthetic(monkeypatch, tmp_path):
    """The same lengths whether or not the real ones are there."""
    monkeypatch.setattr(lengths, "SHARED", tmp_path)
    lengths.by_source.cache_clear()
    yield
    lengths.by_source.cache_clear()


@pytest.mark.parametrize("stage", STAGES)
def test_each_contender_has_a_name_of_its_own(stage):
    """By which it is found at another shape, and in a table."""
    names = [contender.who for contender in train_step.contenders(stage, TINY.pad)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("stage", "contender"), CONTENDERS, ids=lambda x: x if isinstance(x, str) else x.who)
def test_a_contender_has_our_loss_gradients_and_weights(stage, contender):
    train_step.check(contender, Job(stage=stage, shape=TINY))


def test_a_contender_that_computes_something_else_is_caught():
    other = next(c for c in train_step.contenders("align", TINY.pad) if "longest" in c.who)
    made = other.make

    def make(job):
        return made(dataclasses.replace(job, overrides=(*job.overrides, "objective.beta=0.61")))

    with pytest.raises(AssertionError, match=r"loss|gradient"):
        train_step.check(other._replace(make=make), Job(stage="align", shape=TINY))


@pytest.mark.parametrize("changed", [{"betas": (0.9, 0.99)}, {"betas": (0.8, 0.95)}, {"prior_decay": 0.0}])
def test_an_optimiser_that_moves_weights_otherwise_is_caught(changed):
    other = next(c for c in train_step.contenders("sft", TINY.pad) if c.who == "paper_layout")

    def make(job):
        stepping = other.make(job)
        stepping.optimiser.betas = changed.get("betas", stepping.optimiser.betas)
        for group in stepping.optimiser.groups:
            group |= changed
        return stepping

    with pytest.raises(AssertionError, match="weights moved otherwise"):
        train_step.check(other._replace(make=make), Job(stage="sft", shape=TINY))


# Lengths


def test_synthetic_lengths_are_fixed_and_in_their_ranges():
    name, sources = lengths.by_source()
    assert name == "synthetic lengths"
    for source, ranges in zip(sources, lengths.SYNTHETIC, strict=True):
        assert len(source) == lengths.LIMIT
        assert all(low <= n <= high for x in source for n, (low, high) in zip(x, ranges, strict=True))
    lengths.by_source.cache_clear()
    assert lengths.by_source()[1] == sources


def test_pairs_have_the_sampled_lengths():
    sampled, pairs = lengths.sample(7, 200), lengths.pairs(7, 500, 200)
    assert len(pairs) == 7
    for (prompt, chosen, rejected), sides in zip(sampled, pairs, strict=True):
        assert [len(side) for side in sides] == [prompt + n + lengths.TAIL for n in (chosen, rejected)]
        assert max(map(len, sides)) <= 200
        assert common_prefix([side.tokens for side in sides]) == prompt
        assert [sum(side.score_mask) for side in sides] == [chosen, rejected]
        assert all(max(side.tokens) < 500 for side in sides)


def test_a_record_is_counted_with_its_markup():
    sides = ([{"role": "user", "content": "x" * 9}, {"role": "assistant", "content": text}] for text in ("y", "z" * 8))
    assert lengths.of_record(Preference(*sides)) == (1 + 3 + 3 + 2 + 3, 1, 2)


# Arithmetic

CONFIG = dph.ModelConfig(
    vocab_size=100, embedding_size=3, hidden_size=4, intermediate_size=5, num_hidden_layers=2, num_attention_heads=2
)
BACKBONE, HEAD, POOLER = 3 * 4 + 2 * (4 * 16 + 3 * 4 * 5), 3 * (4 + 100), 4 * 10 + 5 * 4 + 4


def test_weights_that_rows_are_multiplied_with_are_the_models():
    model = dph.Model(CONFIG)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    heads = sum(n for name, n in matrices.items() if name.startswith("heads."))
    assert flops.pooler_weights(CONFIG) == (4 * 10, POOLER)
    assert heads == POOLER
    backbone, head = flops.backbone_weights(CONFIG), flops.head_weights(CONFIG)
    assert (backbone, head) == (BACKBONE, HEAD)
    assert backbone + head == sum(matrices.values()) - heads


def test_visible_pairs_are_those_of_the_layout():
    for layout in (
        PackedLayout.shared_prefix([4, 6], [[3, 1], [2, 5]]),
        PackedLayout.with_memory([5, 7], [3, 0], 4),
        PackedLayout.documents([3, 0, 2]),
    ):
        amounts, seen = flops.layout_workload(layout), layout.visible()
        assert (amounts.tokens, amounts.visible) == (layout.queries, int(seen.sum()))
        assert amounts.detached == int(seen[:, : layout.memory].sum())


def test_steps_are_counted_by_hand():
    """A prompt of 2 tokens with answers of 3 and 1, all predicted; and a stream of 3 tokens with 2 of memory."""
    pair = flops.layout_workload(PackedLayout.shared_prefix([2], [[3, 1]]), targets=4, judged=2)
    assert pair == flops.Workload(tokens=6, visible=3 + (6 + 6) + (1 + 2), targets=4, judged=2)
    product = 2 * 4 * 18 * 2  # one product of attention: 2 C a pair that sees each other, in 2 layers
    forward = 2 * (6 * BACKBONE + 4 * HEAD) + 2 * product
    policy = 6 * (6 * BACKBONE + 4 * HEAD + 2 * POOLER) + 6 * product
    assert flops.step_flops(CONFIG, "align", pair) == policy + forward
    assert flops.step_flops(CONFIG, "align", pair, reference=False) == policy
    # The pooler's first layer has no gradient of its input to give.
    head = 2 * 6 * BACKBONE + 2 * product + 2 * 2 * (40 * 2 + (POOLER - 40) * 3)
    assert flops.step_flops(CONFIG, "head", pair) == head

    stream = flops.streams_workload(1, 3, 2, targets=1)
    assert stream == flops.Workload(tokens=3, visible=6 + 6, detached=6, targets=1)
    attention = 2 * 4 * 2 * (2 * 12 + 4 * 6 + 2 * 6)  # the memory needs no gradient of keys and values
    assert flops.step_flops(CONFIG, "sft", stream) == 6 * (3 * BACKBONE + HEAD) + attention
    embedding = 2 * 3 * 100  # the one weight that trains
    assert flops.step_flops(CONFIG, "vocab", stream) == 4 * (3 * BACKBONE + HEAD) + embedding + attention


@pytest.mark.parametrize("stage", STAGES)
def test_a_jobs_amounts_are_those_of_its_updates(stage):
    job = Job(stage=stage, shape=TINY)
    amounts, taken = job.amounts(), job.make_stage()
    if stage in PAIRS:
        parts = taken.next_batch().micro_batches
        assert flops.pairs_workload([pair for part in parts for pair in part.pairs]) == amounts
        packed = pack(job.records())
        counted = flops.layout_workload(packed.layout, len(packed.rows), int((packed.reward_rows >= 0).sum()))
        assert amounts == counted == sum((flops.pairs_workload([pair]) for pair in job.records()), flops.Workload())
    else:
        assert amounts.tokens == taken.next_batch().tokens == TINY.streams * TINY.context
    assert job.needs(amounts) > 0


def test_unshared_pairs_repeat_their_prompts():
    stage = Job(stage="align", shape=TINY).make_stage()
    shared, repeated = stage.next_batch(), train_step.unshared(Job(stage="align", shape=TINY).make_stage()).next_batch()
    prompts = sum(common_prefix([side.tokens for side in pair]) for part in shared.micro_batches for pair in part.pairs)
    assert repeated.tokens == shared.tokens + prompts == sum(len(part.packed.tokens) for part in repeated.micro_batches)
    pairs = zip(shared.micro_batches, repeated.micro_batches, strict=True)
    assert all(torch.equal(one.packed.answers, two.packed.answers) for one, two in pairs)
