"""dph ablate: every combination and seed is trained once, judged as dph score does, and kept."""

import json

import pytest
from helpers.texts import write_lines

from dph.cli import ablate
from dph.evaluate.metrics import wilson
from dph.train import entry


def pairs(words):
    return [
        {"prompt": f"a film {i}?", "chosen": f"is {word}", "rejected": f"not {word}"} for i, word in enumerate(words)
    ]


@pytest.fixture
def command(models, tmp_path):
    train = write_lines(tmp_path / "train.jsonl", *pairs(["gripping", "watchable", "positive", "good"] * 4))
    held_out = write_lines(tmp_path / "held_out.jsonl", *pairs(["negative", "gripping", "late", "a"] * 3))
    recipe = [
        "head", f"model.path={models / 'judge'}", f"data.sources=[{train}]", f"evaluation.sources=[{held_out}]",
        "evaluation.share=0", "optimiser.steps=3", "optimiser.warmup=1", "evaluation.every=0", "output.best=null",
        "output.model=last", "evaluation.patience=null", "objective.heads=[new]", "precision=fp32", "device=cpu",
        "objective.layer=-1", "batch.size=4",
    ]  # fmt: skip
    return ["ablate", *recipe, "--output", tmp_path / "runs", "--seeds", 2, "--vary"]


def test_every_combination_is_trained_once_and_judged(command, dph_command, monkeypatch, tmp_path):
    varied = ["objective.pooler=[bert, identity]", "--vary", "objective.objective=[separable, contrastive]"]
    code, out, err = dph_command(*command, *varied)
    assert code == 0, err
    report = json.loads((tmp_path / "runs/ablation.json").read_text())
    assert report["options"] == ["objective.pooler", "objective.objective"]
    rewards = [row for row in report["rows"] if row["score"] == "reward"]
    assert [row["values"] for row in rewards] == [
        ["bert", "separable"], ["bert", "contrastive"], ["identity", "separable"], ["identity", "contrastive"],
    ]  # fmt: skip
    for row in rewards:
        assert len(row["seeds"]) == 2
        assert row["pairs"] == [12, 12]
        assert row["accuracy"]["value"] == pytest.approx(sum(row["seeds"]) / 2)
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    run = tmp_path / "runs/bert, separable/seed1"
    code, scored, _ = dph_command("score", run, tmp_path / "held_out.jsonl", "--head", "new", "--json")
    (line,) = (line for line in map(json.loads, scored.splitlines()) if line["method"] == "reward")
    assert line["accuracy"]["value"] == rewards[0]["seeds"][1]
    assert (tmp_path / "runs/ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "pair accuracy" in (tmp_path / "runs/ablation.md").read_text()
    monkeypatch.setattr(entry, "train", None)  # nothing is trained again
    assert dph_command(*command, *varied)[:2] == (0, out[out.index("objective.pooler") :])


def test_seeds_that_are_always_right_are_no_proof():
    """The interval of right choices alone is not empty, and pairs of one prompt in several seeds are one prompt."""
    seeds = [[(str(prompt), 1.0) for prompt in range(8)] for _ in range(3)]
    assert ablate._mean(seeds) == wilson(8, 8)
    assert ablate._mean([[("a", 1.0)], [("b", 0.5), ("c", 0.0)]]) == wilson(1.5, 3)


def test_an_interrupted_command_goes_on(command, dph_command, monkeypatch, tmp_path):
    varied, trained = ["objective.pooler=[bert, identity]"], []
    train = entry.train

    def fail_at_third(recipe, **options):
        trained.append(recipe.output.directory)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(recipe, **options)

    monkeypatch.setattr(entry, "train", fail_at_third)
    assert dph_command(*command, *varied)[0] == 130
    assert dph_command(*command, *varied)[0] == 0
    assert len(trained) == 5
    assert len(set(trained)) == 4


def test_what_is_refused(command, refused, dph_command, tmp_path):
    assert "--vary objective.pooler: expected a list of values" in refused(*command, "objective.pooler=bert")
    assert "objective.poolr" in refused(*command, "objective.poolr=[bert]")
    assert "expected different values" in refused(*command, "batch.size=[4, 4]")
    assert "seed: expected --seeds in its place, got 'seed=[1, 2]'" in refused(*command, "seed=[1, 2]")
    line = refused(*command[:2], "seed=3", *command[2:], "objective.pooler=[bert]")
    assert "seed: expected --seeds in its place" in line
    line = refused(*command, "objective.pooler=[bert]", "--vary", "objective.pooler=[identity]")
    assert "--vary objective.pooler: expected all values in one list, got two" in line
    assert "expected more than 0, as rewards are compared" in refused(*command, "objective.dph_weight=[0]")
    assert dph_command(*command, "objective.pooler=[bert]")[0] == 0
    line = refused(*command[:2], "optimiser.lr=0.5", *command[2:], "objective.pooler=[identity, bert]")
    assert "expected the result of this recipe, got one of another" in line
    assert not (tmp_path / "runs/identity").exists()  # nothing is trained before that


def test_heads_of_a_run_have_pairs_of_their_own(command, dph_command, tmp_path):
    rows = []
    for i in range(12):
        answers = (
            {"chosen": "is good", "rejected": "not good"} if i < 4 else {"completion": "good", "label": i % 2 == 0}
        )
        rows.append({"prompt": f"a film {i}?", **answers})
    held_out = write_lines(tmp_path / "own.jsonl", *rows)
    sources = f"evaluation.sources=[{held_out}, {{source: {tmp_path / 'held_out.jsonl'}, head: safe}}]"
    options = ["objective.heads=[new, safe]", sources, "--seeds", 1]
    code, _, err = dph_command(*command, "objective.objective=[separable]", *options)
    assert code == 0, err
    report = json.loads((tmp_path / "runs/ablation.json").read_text())
    pairs = {row["score"]: row["pairs"] for row in report["rows"]}
    assert list(pairs)[::3] == ["reward new", "reward safe"]
    assert (pairs["reward new"], pairs["log-probability (sum) safe"]) == ([4], [16])
    alone = write_lines(tmp_path / "alone.jsonl", *rows[4:])
    command[command.index(tmp_path / "runs")] = tmp_path / "others"
    code, out, err = dph_command(*command, "objective.objective=[separable]", f"evaluation.sources=[{alone}]", "--json")
    assert (code, out) == (2, "")
    assert "head new: expected held-out pairs, got labels of single answers alone" in err


def test_folders_of_combinations_are_different_and_inside():
    names = ["bert, separable", "a/b", "a_b", "..", "", ".", "x" * 300, "x" * 301]
    folders = list(map(ablate._folder_name, names))
    assert folders[0] == names[0]
    assert len(set(folders)) == len(names)
    assert all(folder.strip(".") and "/" not in folder and len(folder) < 150 for folder in folders[:4] + folders[5:])
