"""Recipes for machines: the paper's stages in everything but how an update is cut and computed, within the memory."""

import dataclasses
import re

import pytest
import torch
from helpers.stages import STAGES, records
from helpers.texts import small_tokenizer

from dph.train import build, recipe
from dph.train.budget import memory
from dph.train.build import make_stage

MACHINES = {"a100": 72e9, "h200": 125e9}  # bytes that a run is to take at most, of 80 and 141 GB
PAPER = {"head": "paper-head"}  # where it is not the recipe of the stage's name
CUTS = {"batch.micro", "batch.tokens", "checkpointing"}  # and how it is computed


def flat(values, where=""):
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return found


def test_every_stage_has_a_recipe_for_every_machine():
    names = {f"{machine}{stage}" for machine in ("", "mini-", *(f"{m}-" for m in MACHINES)) for stage in STAGES}
    assert set(recipe.shipped()) == names | {"paper-head", "improve"}
    assert all(recipe.load(name).stage == name.split("-")[-1] for name in names)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("machine", MACHINES)
def test_machines_differ_in_the_cut_alone(machine, stage):
    paper, own = (flat(recipe.load(name).as_dict()) for name in (PAPER.get(stage, stage), f"{machine}-{stage}"))
    assert {key for key in paper if paper[key] != own[key]} <= CUTS


def stage_of(name):
    """The stage of a shipped recipe, of weights that take no memory, over stand-ins for its records."""
    made = dataclasses.replace(recipe.load(name), precision="bf16", device="cpu")
    held_out = {s.source: (records(made.stage, 3) * s.limit)[: s.limit] for s in made.evaluation.sources}
    with torch.device("meta"):
        model = build.new_model({"vocab_size": 50272}, small_tokenizer())
        if made.kind == "preference":
            model = build.with_heads(model, made.objective)
    return make_stage(made, model, small_tokenizer(), records(made.stage), held_out, device=torch.device("meta"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("machine", MACHINES)
def test_machines_have_room(machine, stage):
    """All on the device, memory of streams included; the figure is the one that the recipe states."""
    made = stage_of(f"{machine}-{stage}")
    assert made.model.device.type == "meta"
    batch = made.recipe.batch
    rows = batch.tokens if made.recipe.kind == "preference" else batch.micro * made.recipe.data.context
    taken = sum(memory.on_device(made, rows, torch.device("cuda"), "device").values())
    assert taken < MACHINES[machine]
    text = (recipe.SHIPPED / f"{machine}-{stage}.yaml").read_text()
    assert float(re.search(r"([\d.]+) GB by the estimate", text)[1]) == round(taken / 1e9, 1)
