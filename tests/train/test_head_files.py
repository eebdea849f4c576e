"""Heads that training writes as files, what the files record, and the commands that take several of them."""

import json

import pytest
import torch
from helpers.stages import Trap, go, records, settings, strike, tiny
from helpers.texts import small_tokenizer

import dph
from dph.cli.main import main
from dph.model import head_file
from dph.train import recipe


@pytest.mark.parametrize("stage", ["head", "align"])
def test_a_run_writes_its_heads(stage, tmp_path):
    result = go(settings(stage, tmp_path / "run"))
    (path,) = head_file.head_directories(tmp_path / "run")
    assert path == tmp_path / "run/heads/default"
    saved = head_file.read(path)
    about = saved.about
    assert (about["stage"], about["steps"], about["pairs"], about["dph"]) == (stage, 8, 23, dph.__version__)
    assert (
        recipe.from_dict({"stage": stage, "objective": about["objective"]}).objective == settings(stage, ".").objective
    )
    assert about["format"] == "chatml"
    assert about["evaluation"] == result.evaluation
    assert about["accuracy"] == result.evaluation["reward_accuracy"]
    assert about["rewards"]["answers"] == 46
    assert not list((tmp_path / "run").glob(".*"))
    model = dph.Model.from_pretrained(tmp_path / "run/model", dtype=torch.bfloat16)
    model.load_head(path, "again")  # the backbone as a GPU reads it
    model = dph.Model.from_pretrained(tmp_path / "run/model", reward_heads=())
    model.load_head(path)
    conversations = [side for pair in records(stage) for side in (pair.chosen, pair.rejected)]
    rewards = model.score(small_tokenizer(), conversations)
    torch.testing.assert_close(rewards, result.model.score(small_tokenizer(), conversations))
    assert about["rewards"]["mean"] == pytest.approx(float(rewards.mean()), abs=0.1)


def test_the_figures_are_those_of_the_first_answers(tmp_path):
    result = go(settings("head", tmp_path / "run", objective__sample=10, optimiser__steps=5))
    figures = head_file.read(tmp_path / "run/heads/default").about["rewards"]
    assert figures["answers"] == 20
    assert not result.model.training
    go(settings("head", tmp_path / "run", objective__sample=10, optimiser__steps=5), resume=True)
    assert head_file.read(tmp_path / "run/heads/default").about["rewards"] == figures


def test_several_heads_with_names_that_are_no_folders(tmp_path):
    model = tiny(reward_heads=("a/b", "c"))
    go(settings("head", tmp_path / "run", objective__heads=["a/b", "c"]), model=model)
    names = [path.name for path in head_file.head_directories(tmp_path / "run")]
    assert names == ["a%2Fb", "c"]
    assert head_file.read(tmp_path / "run/heads/a%2Fb").name == "a/b"


def test_a_stopped_run_and_an_untrained_head_write_none(tmp_path):
    trap = Trap(records("head"), 14, strike)
    result = go(settings("head", tmp_path / "run"), trap)
    assert result.interrupted
    assert not (tmp_path / "run/heads").exists()
    go(settings("head", tmp_path / "run"), resume=True)
    assert head_file.head_directories(tmp_path / "run")
    model = tiny()
    model.untrained_heads = {"default"}
    untrained = go(settings("align", tmp_path / "align", objective__dph_weight=0.0), model=model).model
    assert untrained.untrained_heads == {"default"}
    assert not (tmp_path / "align/heads").exists()
    with pytest.raises(ValueError, match="the checkpoint holds no weights for it"):
        untrained.score(small_tokenizer(), [records("head")[0].chosen])
    opened = dph.Model.from_pretrained(tmp_path / "align/model")
    assert opened.untrained_heads == {"default"}


@pytest.fixture
def run(tmp_path):
    """A run of stage head, and pairs in a file."""
    go(settings("head", tmp_path / "run"))
    lines = [json.dumps({"chosen": pair.chosen, "rejected": pair.rejected}) for pair in records("head", 6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_commands_take_several_heads(run, capsys):
    words = [str(run / "run"), str(run / "pairs.jsonl"), "--json"]
    heads = ["--head", "default", "--head", str(run / "run"), "--head", str(run / "run/heads/default")]
    main(["score", *words, *heads, "--output", str(run / "scores.jsonl")])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    methods = [row["method"] for row in rows]
    assert methods[:3] == ["reward default", "reward default-2", "reward default-3"]
    assert rows[0]["margin"] == rows[1]["margin"] == rows[2]["margin"]
    scores = json.loads((run / "scores.jsonl").read_text().splitlines()[0])["scores"]["chosen"]
    assert list(scores) == ["reward_default", "reward_default-2", "reward_default-3", "logprob", "mean_logprob"]
    main(["score", *words, "--head", str(run / "run")])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["method"] == "reward"
    data = run / "data/glue/sst2"
    data.mkdir(parents=True)
    (data / "validation.jsonl").write_text(json.dumps({"sentence": "good", "label": 1, "idx": 0}))
    task = ["--task", "glue/sst2", "--directory", str(run / "data"), "--json"]
    main(["evaluate", str(run / "run"), *task, *heads[:4]])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["log-probability", "reward default", "reward default-2"]
    main(["evaluate", str(run / "run"), *task, "--logprob-only"])
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


def test_heads_are_listed(run, capsys):
    main(["heads", str(run / "run")])
    text = capsys.readouterr().out
    for word in ("directory", "trained on", "accuracy", "records in memory (23 pairs)", "kB", "swiglu_bert"):
        assert word in text
    main(["heads", str(run / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["about"]["steps"] == 8


def test_a_run_of_several_heads_is_no_single_head(tmp_path, refused):
    model = tiny(reward_heads=("a", "b"))
    go(settings("head", tmp_path / "run", objective__heads=["a", "b"]), model=model)
    message = refused("generate", str(tmp_path / "run"), "--prompt", "x", "--head", str(tmp_path / "run"))
    assert "--head: expected one head, got a run of a-2, b-2: give" in message
