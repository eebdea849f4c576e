"""Layer and figures of new heads, the development split, and the end of a run that no longer improves."""

import json

import pytest
import torch
from helpers.stages import Killed, Trap, die, go, records, same, settings, taken, tiny
from helpers.texts import small_tokenizer, write_lines

import dph
from dph.data import dataset
from dph.errors import UserError
from dph.train import build, head_states, layer_choice
from dph.train.entry import train
from dph.train.precompute.fill import fill_cache
from dph.train.stages.held_out import HeldOutPairs

AUTO = {"objective__layer": "auto", "objective__standardised": True, "objective__sample": 20}


def planted(pairs, layers, width, good, seed=0):
    """States in which the layer ``good`` tells chosen from rejected answers, and the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(pairs, 2, layers, width, generator=generator) * 5 + 3
    states[:, 0, good, 1] += 8.0
    return states


@pytest.mark.parametrize("good", [0, 2, 4])
def test_the_layer_that_tells_is_found(good):
    accuracies = layer_choice.probe_layers(planted(200, 5, 12, good), [i // 2 for i in range(200)])
    assert max(range(5), key=accuracies.__getitem__) == good
    assert accuracies[good] > 0.75
    assert all(abs(value - 0.5) < 0.2 for i, value in enumerate(accuracies) if i != good)


def test_neighbours_count_and_the_last_of_equals_wins():
    assert layer_choice.best_layer([0.5, 0.9, 0.5, 0.8, 0.8, 0.8]) == (5, pytest.approx(0.8))
    assert layer_choice.best_layer([0.7, 0.9, 0.8, 0.2]) == (1, pytest.approx(0.8))
    assert layer_choice.best_layer([0.6]) == (0, 0.6)


def test_pairs_of_one_prompt_are_in_one_fold():
    """Noise that is the same for all pairs of a prompt would be learnt by heart otherwise."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.randn(10, 60, generator=generator).repeat_interleave(20, 0)
    states = torch.stack([marks, -marks], 1)[:, :, None] * torch.randn(200, 1, 1, 1, generator=generator).sign()
    apart = layer_choice.probe_layers(states, [i // 20 for i in range(200)])[0]
    assert apart < 0.75


def new_model():
    model = tiny(num_hidden_layers=3, reward_standardised=True)
    model.untrained_heads = {"default"}
    return model


def probes(single, mixed):
    """Stand-in for the probes: the accuracy of layer 2, of four, and that of the mix."""
    return lambda states, prompts, seed, chosen=None: [0.5, 0.6, single, 0.6] if chosen is None else [mixed]


@pytest.mark.parametrize(("stage", "mixed", "layer"), [("head", 0.8, 2), ("align", 0.8, 2), ("head", 0.95, [1, 2])])
def test_a_run_chooses_once_and_resumes(stage, mixed, layer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head_states, "probe_layers", probes(0.9, mixed))
    monkeypatch.setattr(head_states, "best_layer", lambda values: (values.index(max(values)), max(values)))
    recipe = settings(stage, tmp_path / "whole", **AUTO)
    whole = go(recipe, model=new_model(), quiet=False)
    assert f"the head judges layer {layer}; linear probes judge right, of 20 pairs" in capsys.readouterr().err
    assert whole.model.config.reward_layer == layer
    assert whole.model.heads["shared"].standardise.is_fitted
    opened = dph.Model.from_pretrained(tmp_path / "whole/model")
    assert opened.config.reward_layer == layer
    assert opened.heads["shared"].layers == (tuple(layer) if isinstance(layer, list) else (layer,))

    parts = settings(stage, tmp_path / "parts", **AUTO)
    with pytest.raises(Killed):
        go(parts, Trap(records(stage), 20 + taken(recipe, 5), die), model=new_model())
    model = new_model()
    model.set_reward_layer(layer)
    monkeypatch.setattr(head_states, "sample_states", die)
    same(whole, go(parts, model=model, resume=True))


def test_states_of_each_layer_have_a_cache_of_their_own(tmp_path):
    """Runs in one folder share caches: the same backbone and pairs, but not the same states."""
    changes = {"data__cache": f"{tmp_path}/cache"}
    for layer in (-1, 1, 2):
        model = tiny(num_hidden_layers=3, reward_layer=layer)
        shared = go(settings("head", tmp_path / f"shared{layer}", **changes), model=model)
        alone = go(settings("head", tmp_path / f"alone{layer}"), model=tiny(num_hidden_layers=3, reward_layer=layer))
        same(shared, alone)
    kinds = sorted(path.name.split("-")[0:2] for path in (tmp_path / "cache").iterdir())
    assert [kind for kind in kinds if kind[1] in ("1", "2")] == [["states", "1"], ["states", "2"]]
    assert len(kinds) == 3


def test_a_cache_is_filled_with_the_states_of_the_chosen_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(head_states, "probe_layers", probes(0.9, 0.8))
    monkeypatch.setattr(head_states, "best_layer", lambda values: (2, 0.9))
    recipe = settings("head", tmp_path / "run", **AUTO)
    model = new_model()
    filled = fill_cache(recipe, model=model, tokenizer=small_tokenizer(), records=records("head"), quiet=True)
    assert model.config.reward_layer == 2
    assert filled.directory.name.startswith("states-2-")


def test_the_sample_is_computed_once(tmp_path, monkeypatch):
    """Its states of the chosen layers serve training, and the next head on them."""
    recipe = settings("head", tmp_path / "run", **AUTO)
    stage = build.make_stage(recipe, new_model(), small_tokenizer(), records("head"), None)
    head_states.prepare_heads(stage, quiet=True)
    assert stage.frozen.cache.computed == len(stage.frozen.cache.store) == 20
    pairs = stage.first_pairs(20)[:20]
    found = stage.frozen.cache.rows(pairs, die).view(40, -1)
    expected = stage.model.reward_states(dph.pack(pairs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    model = new_model()
    model.set_reward_layer(stage.model.config.reward_layer)
    recipe = settings("head", tmp_path / "run", **AUTO | {"objective__layer": None})
    again = build.make_stage(recipe, model, small_tokenizer(), records("head"), None)
    monkeypatch.setattr(model.backbone, "forward", die)
    head_states.prepare_heads(again, quiet=True)
    mean, expected = (each.model.heads["shared"].standardise.mean for each in (again, stage))
    assert torch.equal(mean, expected)


def test_a_new_head_finds_its_layer_next_to_trained_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(head_states, "probe_layers", probes(0.9, 0.8))
    monkeypatch.setattr(head_states, "best_layer", lambda values: (2, 0.9))
    model = new_model()
    model.untrained_heads = set()
    model.heads["shared"].standardise.fit(torch.randn(30, 16))
    trained = model.heads["shared"].reward["default"].weight.clone()
    recipe = settings("head", tmp_path / "run", **AUTO, objective__heads=["new"])
    model = go(recipe, model=build.with_heads(model, recipe.objective)).model
    assert {key: head.layers for key, head in model.heads.items()} == {"shared": (-1,), "task_new": (2,)}
    assert model.config.reward_layer == -1
    assert torch.equal(model.heads["shared"].reward["default"].weight, trained)
    opened = dph.Model.from_pretrained(tmp_path / "run/model")
    assert opened.heads["task_new"].layers == (2,)


def test_trained_heads_keep_their_layer(tmp_path):
    model = new_model()
    model.untrained_heads = set()
    model.heads["shared"].standardise.fit(torch.randn(9, 16))
    mean = model.heads["shared"].standardise.mean.clone()
    result = go(settings("head", tmp_path, **AUTO), model=model)
    assert result.model.config.reward_layer == -1
    assert torch.equal(result.model.heads["shared"].standardise.mean, mean)


def test_states_of_a_sample_are_the_model_s():
    recipe, model = settings("head", "unused", **AUTO), new_model()
    stage = build.make_stage(recipe, model, small_tokenizer(), records("head"), {})
    position = stage.batches.state_dict()
    pairs = stage.first_pairs(7)[:7]
    assert len(pairs) == 7
    assert stage.batches.state_dict() == position
    states = head_states.sample_states(model, pairs, [0, 1, 2, -1], quiet=True)
    for pair, found in zip(pairs, states.view(7, 2, 4, -1), strict=True):
        for side, own in zip(pair, found, strict=True):
            hidden = model(torch.tensor([side.tokens]), output_hidden_states=True).hidden_states
            expected = torch.stack([layer[0, side.reward_position] for layer in hidden])
            torch.testing.assert_close(own, expected)


# Development split


def write_pairs(path, prompts=40):
    rows = []
    for i in range(prompts):
        for k in range(1 + i % 3):
            rows.append({"prompt": f"question {i}", "chosen": f"good {k}", "rejected": f"bad {i} {k}"})
    return write_lines(path, *rows)


def test_prompts_are_kept_apart(tmp_path):
    whole = dataset.load(write_pairs(tmp_path / "pairs.jsonl"), "preference")
    train_part, kept = dataset.split_by_prompt(whole, 0.25, seed=1)
    assert len(train_part) + len(kept) == len(whole)
    prompts = [{dataset.prompt_key(record) for record in part} for part in (train_part, kept)]
    assert not prompts[0] & prompts[1]
    assert 4 <= len(prompts[1]) <= 16
    again = dataset.split_by_prompt(whole, 0.25, seed=1)
    assert again[1] == kept
    assert again[0].fingerprint() == train_part.fingerprint() != whole.fingerprint()
    assert dataset.split_by_prompt(whole, 0.25, seed=2)[1] != kept
    assert dataset.split_by_prompt(whole, 0.0, seed=1)[1] == []


def test_a_share_of_the_prompts_is_evaluated_on_and_not_trained_on(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl")
    recipe = settings(
        "head", tmp_path / "run", data__sources=[str(source)], evaluation__share=0.2, evaluation__every=4,
        output__best="reward_accuracy",
    )  # fmt: skip
    model, tokenizer = tiny(), small_tokenizer()
    stage = build.make_stage(recipe, model, tokenizer, None, None)
    _, kept = dataset.split_by_prompt(dataset.load(source, "preference"), 0.2, recipe.seed)
    assert list(stage.held_out.sources) == ["development"]
    assert stage.held_out.sources["development"] == kept
    assert stage.batches.records.size == 79 - len(kept)
    train(recipe, model=model, tokenizer=tokenizer, quiet=True)
    assert "eval/reward_accuracy" in (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"evaluation\.share: expected 0 with records in memory"):
        build.make_stage(recipe, model, tokenizer, records("head"), None)
    with pytest.raises(UserError, match=r"evaluation\.share: expected 0 in stage sft, got 0\.1"):
        settings("sft", tmp_path, evaluation__share=0.1)


# Early end


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations after steps 2, 4, ... give these accuracies."""
    values = {2: 0.5, 4: 0.8, 6: 0.6, 8: 0.8, 10: 0.7, 12: 0.9}
    at = {"step": 0}

    def evaluate(self):
        at["step"] += 2
        return {"reward_accuracy": values[at["step"]], "logprob_accuracy": 0.5}

    monkeypatch.setattr(HeldOutPairs, "evaluate", evaluate)
    return at


PATIENT = {
    "evaluation__every": 2, "evaluation__patience": 2, "output__best": "reward_accuracy", "output__model": "best",
    "optimiser__steps": 12,
}  # fmt: skip


def test_a_run_without_improvement_ends_with_the_best_weights(tmp_path, scripted, capsys):
    result = go(settings("head", tmp_path / "run", **PATIENT), quiet=False)
    text = capsys.readouterr().err
    assert "step 8 is the last: the best by reward_accuracy (0.8) is step 4" in text
    assert "its weights are those of step 4" in text
    assert result.step == 8
    scripted["step"] = 0
    exact = go(settings("head", tmp_path / "four", **PATIENT | {"output__model": "last", "evaluation__patience": None}),
               resume=False)  # fmt: skip
    assert exact.step == 12
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 8
    again = go(settings("head", tmp_path / "run", **PATIENT), resume=True)
    same(result, again)
    assert again.step == 8


def test_patience_needs_a_metric(tmp_path):
    for key, value in (("evaluation__patience", 3), ("output__model", "best")):
        name = key.replace("__", r"\.")
        with pytest.raises(
            UserError, match=rf"output\.best: expected the metric that {name} {value} goes by, got null"
        ):
            settings("head", tmp_path, **{key: value})
