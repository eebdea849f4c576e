"""Fused training equals plain training: the stages in turn, 50 steps each, by fused kernels and by plain PyTorch.

Three roads start from the same weights, and every stage from what the road's last one made: the kernels under test and
plain PyTorch in fp32, and plain PyTorch in fp64, which is the truth.
"""

import json
from typing import NamedTuple

import pytest
import torch
from helpers.forced import forced
from helpers.numerics import FLOOR, assert_close_to_fp64
from helpers.stages import settings, tiny, weights
from helpers.texts import conversation, small_tokenizer
from torch import Tensor

from dph.data.formats import Conversation, Preference
from dph.losses import IGNORED
from dph.train import run_dir
from dph.train.build import make_stage
from dph.train.entry import Trainer
from dph_kernels import dispatch

# Of a stage: what it has beyond the stages of the other tests.
STAGES = {
    "vocab": {},
    "sft": {"batch__micro": 2, "optimiser__no_decay": ["embedding"]},
    "align": {"batch__tokens": 200},
    "head": {"batch__micro": 2},
}
STEPS, WARMUP, RATE = 50, 5, 1e-3

# LaProp divides a gradient by its own size, so that of one that is nearly nothing the rounding moves the weight, by as
# much as anything else would: eps, above the gradients' rounding, keeps that out of the comparison.
EPS = 1e-6

# What is granted beside the rule, since 200 steps carry rounding on and in another order of sums it falls elsewhere.
# Of a figure's largest value, or of 1: cDPO hangs on differences of log-probabilities of up to 100 nats, which fp32
# knows to 4e-6. Of the way that a weight can go at the rates of a stage: four times what was needed over five seeds;
# of two steps a hundredth and of eight a thousandth, since a gradient as small as EPS is known no better.
FIGURES, WAY, WAY_OF_TWO_STEPS, WAY_OF_EIGHT_STEPS = 4e-6, 2e-4, 1e-2, 1e-3


class Leg(NamedTuple):
    """A stage of one road: what it logged at each step, and the weights at its end."""

    figures: dict[str, Tensor]
    weights: dict[str, Tensor]


def words(first, count):
    known = ["fox", "dogs", "hello", "world", "late", "12", "quick", "brown"]
    return " ".join(known[(first + 1) * i % 8] for i in range(1, count + 1))


def records(stage, count=40):
    """Questions of 1 to 7 words and answers of 1 to 9, all different."""
    found = []
    for i in range(count):
        question, good, bad = words(i, 1 + i % 7), f"{i} " + words(i + 1, i * 5 % 9), words(i + 2, 1 + i * 3 % 8)
        pair = conversation(question, good), conversation(question, bad)
        found.append(Conversation(pair[0]) if stage in ("vocab", "sft") else Preference(*pair))
    return found


def same_weights(reference, model):
    """Bit for bit: the truth is not to be compared with a reference that has been rounded on the way."""
    own = weights(model)
    return all(torch.equal(p, own[name]) and p.dtype == own[name].dtype for name, p in weights(reference).items())


def leg(stage, model, dtype, folder, steps, **changes):
    """Train ``model`` in ``dtype`` for one stage, by the trainer's own loop."""
    recipe = settings(
        stage, folder, optimiser__steps=steps, optimiser__warmup=min(WARMUP, steps), optimiser__lr=RATE,
        optimiser__final_lr=RATE / 10, optimiser__eps=EPS, output__log_every=1, output__save_every=0,
        **{**STAGES[stage], **changes},
    )  # fmt: skip
    made = make_stage(recipe, model, small_tokenizer(), records(stage), {})
    model.to(dtype)  # a recipe knows no fp64
    run = run_dir.RunDirectory(recipe.output.directory, recipe.as_dict())
    try:
        trainer = Trainer(recipe, made, run, quiet=True)
        assert made.reference is None or same_weights(made.reference, model)
        trainer.train()
    finally:
        run.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == steps
    # Shares of right guesses are left out: a hair's breadth decides each of them.
    names = [name for name in (*made.metrics, "grad_norm") if name in lines[0] and not name.endswith("accuracy")]
    figures = {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in ("lr", *names)}
    return Leg(figures, weights(model))


def small_model(layers=2):
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_hidden_layers": layers}
    return tiny(reward_dropout=0.1, **sizes)


def road(backend, dtype, folder, steps, layers=2, **changes):
    """All stages by one backend, on the CPU."""
    model = small_model(layers)
    with forced(backend) as used:
        legs = {stage: leg(stage, model, dtype, folder / stage, steps, **changes) for stage in STAGES}
    expected = {(operator, backend) for operator in dispatch.AUTO if backend in dispatch.implemented(operator)}
    assert expected <= used, "an operator was not run by the backend"
    return legs


def plain_roads(folder, steps, **changes):
    """Plain PyTorch in fp32, and the truth."""
    return [road("reference", dtype, folder / str(dtype), steps, **changes) for dtype in (torch.float32, torch.float64)]


def relative(granted, values):
    """To the largest value, as the floor of ``assert_close_to_fp64`` is; 0 / 0 is 0 there."""
    return granted / max(values.abs().max().item(), 1e-9)


def check_figures(fused, plain, truth):
    """Of every step, by the worst error of plain PyTorch up to it."""
    assert {"loss", "grad_norm"} <= truth.figures.keys()
    for name in truth.figures:
        for n in range(1, len(truth.figures["loss"]) + 1):
            parts = [leg.figures[name][:n] for leg in (fused, plain, truth)]
            floor = FIGURES * max(1.0, relative(1.0, parts[-1]))
            assert_close_to_fp64(*parts, f"{name} of steps 1 to {n}", floor=floor)


def check_weights(fused, plain, truth, share):
    """Each by itself; ``share`` of the way that it can go is granted."""
    way = truth.figures["lr"].sum().item()
    for name, value in truth.weights.items():
        floor = FLOOR[torch.float32] + relative(share * way, value)
        assert_close_to_fp64(fused.weights[name], plain.weights[name], value, name, floor=floor)


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """The C++ kernels, plain PyTorch, and the truth."""
    if reason := dispatch.missing("laprop", "cpu", "cpu"):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("roads")
    return [road("cpu", torch.float32, folder / "fused", STEPS), *plain_roads(folder, STEPS)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_says_what_plain_pytorch_says(stage, roads):
    check_figures(*(legs[stage] for legs in roads))


@pytest.mark.parametrize("stage", STAGES)
def test_weights_end_where_plain_pytorch_takes_them(stage, roads):
    """In stage vocab one tensor trains, from gradients of one size: it has no more than rounding granted."""
    check_weights(*(legs[stage] for legs in roads), share=0 if stage == "vocab" else WAY)


def test_the_roads_lead_somewhere(roads):
    """Losses fall, and every stage moves what it trains: what is compared is no standstill."""
    *_, truth = roads
    for stage in ("vocab", "sft", "align"):
        losses = truth[stage].figures["loss"]
        assert losses[-5:].mean() < 0.95 * losses[:5].mean(), stage
    before, after = truth["sft"].weights, truth["align"].weights
    assert all((after[name] - value).abs().max() > RATE for name, value in before.items())


def test_interpreted_triton_takes_the_same_road(tmp_path):
    if reason := dispatch.missing("rope_attention", "triton", "cpu"):
        pytest.skip(reason)
    steps, small = 2, {"layers": 1, "batch__size": 2, "data__memory": 8}
    fused = road("triton", torch.float32, tmp_path / "fused", steps, **small)
    plain, truth = plain_roads(tmp_path, steps, **small)
    for stage in STAGES:
        check_figures(fused[stage], plain[stage], truth[stage])
        check_weights(fused[stage], plain[stage], truth[stage], 0 if stage == "vocab" else WAY_OF_TWO_STEPS)


WHOLE = {"batch__micro": None, "batch__tokens": None}
CUTS = [
    ("sft", {"data__context": 6, "data__memory_kind": "kv"}, [{"batch__micro": 1}, {"batch__micro": 2}]),
    ("sft", {"data__context": 6, "data__memory_kind": "hidden"}, [{"batch__micro": 1}, {"batch__micro": 2}]),
    ("align", {}, [{"batch__micro": 1}, {"batch__micro": 2}, {"batch__tokens": 110}]),
    ("head", {"data__cache_states": False}, [{"batch__micro": 1}, {"batch__tokens": 110}]),
]


@pytest.mark.parametrize(("stage", "changes", "cuts"), CUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_update_in_parts_ends_where_the_whole_does(stage, changes, cuts, tmp_path):
    """Eight updates of four streams or pairs, by the same rule: the whole is what earns an error against fp64."""

    def made(name, dtype, cut):
        return leg(stage, small_model(), dtype, tmp_path / name, 8, **{**WHOLE, **changes, **cut})

    whole = made("whole", torch.float32, {})
    with forced("reference"):
        truth = made("truth", torch.float64, {})
    for number, cut in enumerate(cuts):
        parts = made(str(number), torch.float32, cut)
        check_figures(parts, whole, truth)
        check_weights(parts, whole, truth, WAY_OF_EIGHT_STEPS)


def test_those_parts_differ_in_their_targets_and_some_have_none(tmp_path):
    recipe = settings("sft", tmp_path, batch__micro=1, data__context=6)
    made = make_stage(recipe, small_model(), small_tokenizer(), records("sft"), {})
    batches = [made.next_batch().micro_batches for _ in range(8)]
    counts = [[int((micro_batch.targets != IGNORED).sum()) for micro_batch in batch] for batch in batches]
    assert any(0 in update and sum(update) for update in counts)
    assert sum(len(set(update)) > 1 for update in counts) >= 4
