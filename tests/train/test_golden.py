"""The alignment steps of the paper's own code (../shared/golden) through the trainer: order, parts, cache and loop."""

import json

import pytest
import torch
from helpers.forced import forced
from helpers.stages import weights
from safetensors.torch import load_file

import dph
from dph.chat import END, Encoded
from dph.data.sampler import Shuffled
from dph.model.loading import load_tokenizer
from dph.train import recipe
from dph.train.entry import train
from dph.train.precompute import fill
from dph_kernels import dispatch

STEPS, PAIRS, SEED = 4, 4, 7
WAYS = {
    "plain": {},
    "micro": {"batch": {"micro": 1}},
    "tokens": {"batch": {"tokens": 110}},
    "block": {"checkpointing": "block"},
    "cache": {"objective": {"reference": "cache"}},
    "all": {"objective": {"reference": "cache"}, "batch": {"tokens": 110}, "checkpointing": "block"},
}
# What metrics.jsonl calls the figures of the paper's code; rewards of single pairs stand there as their means.
FIGURES = {
    "dph_loss": "loss_dph", "dpo_loss": "loss_dpo", "grad_norm": "grad_norm", "lr": "lr",
    "reward_chosen": "reward_chosen", "reward_rejected": "reward_rejected", "reward_margin": "dph/margin",
    "reward_accuracy": "dph/accuracy", "implicit_chosen": "dpo/chosen", "implicit_rejected": "dpo/rejected",
    "implicit_margin": "dpo/margin", "implicit_accuracy": "dpo/accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(shared):
    """The steps' tensors, and the folder of the model that they start from."""
    path = shared / "golden" / "align.safetensors"
    if not path.is_file():
        pytest.skip("../shared/golden/align.safetensors is not there")
    return load_file(path), path.parent / "checkpoint"


def encoded(ids, targets, tokenizer):
    """One padded row as what ``dph.chat.encode`` gives: the last target is the ``<|im_end|>`` that is judged."""
    last = int((targets != -100).nonzero().max()) + 1
    end = tokenizer.convert_tokens_to_ids(END)
    assert ids[last] == targets[last - 1] == end
    tokens, wanted = ids[: last + 1].tolist(), targets[: last + 1].tolist()
    mask, shifted = [target != -100 for target in wanted], [*tokens[1:], tokenizer.eos_token_id]
    assert all(a == b for a, b, on in zip(wanted, shifted, mask, strict=True) if on)
    return Encoded(tokens, shifted, mask, [on and t != end for on, t in zip(mask, shifted, strict=True)], last)


def pairs(steps, tokenizer):
    """All pairs, laid so that the trainer's shuffled order takes each step's in that step, in their order."""
    taken = [
        tuple(
            encoded(steps[f"step{step}.{side}_ids"][i], steps[f"step{step}.{side}_targets"][i], tokenizer)
            for side in ("chosen", "rejected")
        )
        for step in range(STEPS)
        for i in range(PAIRS)
    ]
    order = Shuffled(range(len(taken)), SEED)
    places = {next(order): pair for pair in taken}
    return [places[i] for i in range(len(taken))]


def settings(directory, **changes):
    """The paper's alignment; the schedule gives the rates of the golden steps, which ``FIGURES`` compares."""
    values = {
        "stage": "align",
        "data": {"context": 48, "cache": str(directory.parent / "cache")},
        "optimiser": {"lr": 3e-3, "final_lr": 3e-3, "warmup": 2, "steps": STEPS, "prior_decay": 0.5, "clip": 1.0},
        "batch": {"size": PAIRS},
        "objective": {"beta": 0.6, "dpo_epsilon": 0.25, "dph_epsilon": 0.1, "dropout": 0.0},
        "output": {"directory": str(directory), "log_every": 1, "save_every": 0},
        "precision": "fp32",
        "device": "cpu",
        "seed": SEED,
    }
    for section, change in changes.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) else change
    return recipe.from_dict(values)


def close(name, got, want, rtol):
    """The comparison of ../shared/conformance/check.py."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape, name
    error, scale = (got - want).abs().max().item(), want.abs().max().item() or 1.0
    assert error <= rtol * scale + 1e-5, f"{name}: error {error:.2e} at a scale of {scale:.2e}"


def check(lines, model, steps):
    """Every figure of every step, and every weight after the last."""
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        for ours, theirs in FIGURES.items():
            close(f"step {step}: {ours}", line[ours], steps[f"step{step}.{theirs}"].mean(), rtol=2e-4)
        assert line["skipped"] == line["refused"] == 0
    final = dph.checkpoint.to_official(weights(model))
    expected = {name.removeprefix("final."): want for name, want in steps.items() if name.startswith("final.")}
    assert final.keys() == expected.keys()
    for name, want in expected.items():
        close(name, final[name], want, rtol=7e-4)


def material(golden):
    """Model, tokenizer and records: arguments of ``train`` and ``fill_cache`` besides a recipe."""
    steps, start = golden
    tokenizer = load_tokenizer(start)
    model = dph.Model.from_pretrained(start)
    return {"model": model, "tokenizer": tokenizer, "records": pairs(steps, tokenizer), "quiet": True}


def run(recipe, golden):
    """Train on the golden steps and hold the run against them."""
    result = train(recipe, **material(golden))
    lines = (result.run / "metrics.jsonl").read_text().splitlines()
    check([json.loads(line) for line in lines], result.model, golden[0])


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_makes_the_golden_steps(way, golden, tmp_path):
    run(settings(tmp_path / "run", **WAYS[way]), golden)


def test_a_full_cache_makes_the_golden_steps(golden, tmp_path):
    recipe = settings(tmp_path / "run", **WAYS["cache"])
    assert fill.fill_cache(recipe, **material(golden)).computed == STEPS * PAIRS
    run(recipe, golden)
    assert fill.fill_cache(recipe, **material(golden)).computed == 0  # training read the rows of these very pairs


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # interpreted Triton takes minutes
def test_each_backend_makes_the_golden_steps(backend, golden, tmp_path):
    if reason := dispatch.missing("rope_attention", backend, "cpu"):
        pytest.skip(reason)
    with forced(backend) as used:
        run(settings(tmp_path / "run", **WAYS["all"]), golden)
    assert {(operator, backend) for operator in dispatch.AUTO if backend in dispatch.implemented(operator)} <= used
