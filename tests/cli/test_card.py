"""dph card: figures of a head on held-out answers, beside its file, and probabilities from its rewards."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.stages import settings, tiny
from helpers.texts import conversation, small_tokenizer, write_lines
from scipy.special import expit

import dph
from dph import chat
from dph.cli.held_out import judge
from dph.data.formats import Encoder, parse_record
from dph.data.labels import labels_of
from dph.errors import UserError
from dph.evaluate.card import Judgements, card, gather
from dph.model.judging import Judged
from dph.model.loading import load_model
from dph.train.entry import train

WORDS = ["fox", "dogs", "hello", "world", "late", "12", "quick", "brown"]


def pairs(count, start=0):
    """Preferences for the answer that says good; a tenth is exchanged."""
    rows = []
    for i in range(start, start + count):
        word = WORDS[i % 8]
        sides = [f"good {word} {WORDS[i * 3 % 7]}", f"bad {word}"]
        chosen, rejected = sides if i % 10 else reversed(sides)
        rows.append({"prompt": f"{word} {i}", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of stage head, with a development share."""
    folder = tmp_path_factory.mktemp("run")
    source = write_lines(folder / "train.jsonl", *pairs(120))
    changes = {
        "data__sources": [{"source": str(source)}], "evaluation__share": 0.2, "optimiser__steps": 60,
        "batch__size": 16, "output__save_every": 0, "evaluation__every": 30, "optimiser__lr": 0.02,
    }  # fmt: skip
    train(settings("head", folder / "run", **changes), model=tiny(), tokenizer=small_tokenizer(), quiet=True)
    return folder / "run"


def test_a_card_of_the_runs_own_held_out_pairs(run, dph_command):
    code, out, err = dph_command("card", run, "--dtype", "float32")
    assert code == 0, err
    folder = run / "heads/default"
    card = json.loads((folder / "card.json").read_text())
    assert (folder / "card.md").read_text().replace("![calibration", "") != ""
    assert (folder / "card.png").read_bytes().startswith(b"\x89PNG")
    assert "20% of the run's prompts, which also chose its best step" in out
    assert 15 <= card["pairs"] == card["answers"] / 2 <= 40
    reward = card["preferences"][0]
    assert reward["accuracy"]["value"] > 0.8  # a tenth is exchanged
    model = load_model(run)
    fitted = model.head_records["default"]["calibration"]
    assert fitted == {key: card["calibration"][key] for key in ("temperature", "midpoint")}
    rewards = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])
    expected = expit((rewards.numpy() - fitted["midpoint"]) / fitted["temperature"])
    assert torch.allclose(model.probability(rewards), torch.tensor(expected, dtype=torch.float32), atol=1e-6)
    with pytest.raises(ValueError, match="head: expected one of default, got 'nope'"):
        model.probability(rewards, head="nope")


def test_a_card_of_given_pairs_and_candidates(run, dph_command, tmp_path):
    held_out = write_lines(tmp_path / "held_out.jsonl", *pairs(80, start=200))
    candidates = []
    for i in range(30):
        texts = [f"{'good' if j % 3 == i % 3 else 'bad'} {WORDS[(i + j) % 8]}" for j in range(3 + i % 3)]
        correct = [text.startswith("good") for text in texts]
        candidates.append({"prompt": f"{WORDS[i % 8]} {i}", "candidates": texts, "correct": correct})
    sampled = write_lines(tmp_path / "sampled.jsonl", *candidates)
    output = tmp_path / "card"
    code, out, err = dph_command(
        "card", run, held_out, "--candidates", sampled, "--output", output, "--dtype", "float32"
    )
    assert code == 0, err
    card = json.loads((output / "card.json").read_text())
    assert (card["pairs"], card["prompts"]) == (80, 80)
    (curves,) = card["candidates"].values()
    right = {curve["rule"]: [point["value"] for point in curve["right"]] for curve in curves}
    assert curves[0]["ns"] == [1, 2, 4, 5]
    assert right["reward"][-1] > 0.9 > right["random"][-1]
    assert right["oracle"][-1] == 1
    assert "## Best of N: sampled.jsonl" in out
    # The accuracy is that of score on the same file.
    code, out, _ = dph_command("score", run, held_out, "--json", "--dtype", "float32")
    (scored,) = (line for line in map(json.loads, out.splitlines()) if line["method"] == "reward")
    assert scored["accuracy"] == card["preferences"][0]["accuracy"]


def test_few_prompts_have_no_calibration(run, dph_command, tmp_path):
    held_out = write_lines(tmp_path / "held_out.jsonl", *pairs(4, start=200))
    options = ["--output", tmp_path / "card", "--dtype", "float32"]
    for name in ("a", "b"):  # files of the same name
        row = {"prompt": name, "candidates": ["good", "bad"], "correct": [1, 0]}
        options += ["--candidates", write_lines(tmp_path / name / "sampled.jsonl", row)]
    code, out, err = dph_command("card", run, held_out, *options)
    assert code == 0, err
    assert "Note: calibration: expected at least 10 prompts, got 4." in out
    assert "Note: label noise: expected at least 10 prompts, got 4." in out
    card = json.loads((tmp_path / "card/card.json").read_text())
    assert card["calibration"] is None and card["label_noise"] is None  # noqa: PT018
    assert len(card["candidates"]) == 2


def test_a_calibration_that_a_card_removes_is_named(run, dph_command, tmp_path):
    many = write_lines(tmp_path / "many.jsonl", *pairs(40, start=200))
    few = write_lines(tmp_path / "few.jsonl", *pairs(4, start=200))
    outs = [dph_command("card", run, source, "--dtype", "float32")[1] for source in (many, few, few)]
    assert ["head default has no calibration any more" in out for out in outs] == [False, True, False]


def test_intervals_of_several_pairs_of_a_prompt(run, dph_command, tmp_path):
    """Ten rejected answers of the same text make no narrower interval than one."""
    rows = pairs(20, start=200)
    once = write_lines(tmp_path / "once.jsonl", *rows)
    often = write_lines(tmp_path / "often.jsonl", *({**row, "rejected": [row["rejected"]] * 10} for row in rows))
    written = []
    for source in (once, often):
        assert dph_command("card", run, source, "--output", tmp_path / "card", "--dtype", "float32")[0] == 0
        written.append(json.loads((tmp_path / "card/card.json").read_text()))
    assert [one["pairs"] for one in written] == [20, 200]
    for one, many in zip(*(one["preferences"] for one in written), strict=True):
        assert many["accuracy"] == pytest.approx(one["accuracy"], abs=0.02)


def test_label_noise_needs_no_calibration():
    """Of a head whose rewards are lower for good answers."""
    pairs = np.tile([-1.0, 1.0], (12, 1))
    prompts = [str(i) for i in range(12)]
    judgements = Judgements(
        pairs.ravel(), np.ones(24), np.tile([True, False], 12), np.repeat(prompts, 2).tolist(),
        dict.fromkeys(("reward", "sum", "mean"), pairs), np.ones((12, 2)), prompts,
    )  # fmt: skip
    found = card("default", {}, judgements, {})
    assert (found["calibration"], found["label_noise"]["value"]) == (None, 0.5)
    assert found["notes"] == [
        "calibration: expected good answers to have higher rewards than bad ones, got lower or equal"
    ]


def test_scores_that_are_no_numbers_make_no_card():
    group = [chat.encode(conversation("a", "b"), small_tokenizer())]
    judged = Judged([-1.0], [-1.0], {"default": [float("nan")]})
    config = SimpleNamespace(max_position_embeddings=None)
    judge_batches = lambda groups, _: ([judged] for _ in groups)  # noqa: E731
    model = SimpleNamespace(backbone=None, config=config, judge_batches=judge_batches)
    with pytest.raises(RuntimeError, match="pairs: record 0: default: expected finite numbers"):
        judge(model, [group], "pairs")


def test_what_a_card_needs(run, refused, dph_command, models, tmp_path):
    held_out = write_lines(tmp_path / "held_out.jsonl", *pairs(4))
    assert "expected a run, whose held-out records are known, or PAIRS" in refused("card", models / "judge")
    assert "has no file of head default beside which it is written, got none" in refused(
        "card", models / "judge", held_out
    )
    assert "--output: expected a folder for the card, got the file" in refused(
        "card", run, held_out, "--output", held_out
    )
    assert "--normalise: expected --candidates" in refused("card", run, held_out, "--normalise", "number")
    out = dph_command("card", models / "judge", held_out, "--output", tmp_path / "card")[1]
    assert "model.probability lacks the calibration, as there is no file of head default to keep it" in out
    wrong = write_lines(tmp_path / "wrong.jsonl", {"prompt": "a", "candidates": ["b", "c"], "correct": [1]})
    line = refused("card", run, "--candidates", wrong)
    assert f"{wrong}:1: correct: expected 2 values, one a candidate, got [1]" in line


def test_a_head_without_a_card_has_no_probabilities(models):
    model = dph.Model.from_pretrained(models / "judge")
    with pytest.raises(
        UserError, match="head default: expected one with a calibration, which `dph card` fits, got none"
    ):
        model.probability([0.5])


def test_figures_by_hand():
    """Of labels of both kinds, ties, empty answers and other heads."""
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y z"}, {"prompt": "b", "chosen": "x", "rejected": ""},
        {"prompt": "c", "completion": "x", "label": False}, {"prompt": "d", "completion": "x", "labels": {"other": 1}},
    ]  # fmt: skip
    encode = Encoder(small_tokenizer())
    answers = [encode(parse_record(row, "labelled preference")) for row in rows]
    judged = [
        Judged([-3.0, -3.0], [-1.0, -2.0], {"default": [1.0, 2.0]}),
        Judged([-1.0, -5.0], [-1.0, None], {"default": [0.5, 0.5]}),
        Judged([-1.0], [-1.0], {"default": [4.0]}),
        Judged([-1.0], [-1.0], {"default": [9.0]}),
    ]
    found = gather(answers, list(map(labels_of, answers)), judged, list("abcd"), "default")
    assert found.rewards.tolist() == [1.0, 2.0, 0.5, 0.5, 4.0]
    assert found.is_good.tolist() == [True, False, True, False, False]
    assert found.lengths.tolist() == [sum(answer.score_mask) for group in answers[:3] for answer in group]
    assert found.pairs["reward"].tolist() == [[1.0, 2.0], [0.5, 0.5]]
    assert np.isnan(found.pairs["mean"]).tolist() == [[False, False], [False, True]]
    with pytest.raises(UserError, match="head default: expected held-out labels for it, got none"):
        gather(answers[3:], list(map(labels_of, answers[3:])), judged[3:], ["d"], "default")


def test_conversations_are_accepted_as_pairs(run, dph_command, tmp_path):
    rows = []
    for row in pairs(12, start=300):
        rows.append({side: conversation(row["prompt"], row[side]) for side in ("chosen", "rejected")})
    held_out = write_lines(tmp_path / "held_out.jsonl", *rows)
    assert dph_command("card", run, held_out, "--output", tmp_path / "card")[0] == 0
