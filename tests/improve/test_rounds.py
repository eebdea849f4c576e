"""Rounds of improvement: what is made, kept and never made twice; killed anywhere, the same command continues."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.texts import message, small_tokenizer, write_lines
from helpers.tiny import tiny_model

from dph import chat
from dph.cli import improve, results
from dph.cli.main import main
from dph.data.candidates import read_candidates
from dph.improve import rounds
from dph.improve.prompts import Prompt
from dph.improve.rounds import Sampler
from dph.improve.selection import Selection
from dph.infer.best_of_n import sample
from dph.model.model import Model
from dph.train import entry
from dph.train.trainer import Trainer

TOK = small_tokenizer()
RUN = [
    "optimiser.steps=6", "optimiser.warmup=1", "evaluation.every=3", "batch.size=4", "evaluation.share=0.2",
    "objective.layer=auto", "objective.sample=10", "precision=fp32", "device=cpu", "output.save_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Directory of a tiny model without a head that ends its answers now and then."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    ids = {name: getattr(TOK, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = TOK.convert_tokens_to_ids("<|im_end|>")
    model = tiny_model(vocab_size=len(TOK), im_end_token_id=end, reward_heads=[], **ids)
    with torch.no_grad():
        model.backbone.embedding.weight[end] *= 8
    model.save_pretrained(folder)
    TOK.save_pretrained(folder)
    return folder


@pytest.fixture
def words(talker, tmp_path, monkeypatch):
    """Arguments of a command of two rounds, but for --output: right is an answer with an even number of letters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "even_checks", raising=False)  # of another folder
    monkeypatch.setattr(rounds, "BATCH", 6 * 4 * 5)  # five prompts
    (tmp_path / "even_checks.py").write_text("def even(row, answer): return len(answer) % 2 == 0\n")
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": f"The fox {i}?"} for i in range(24)))
    yield [
        "improve", str(talker), "--prompts", str(prompts), "--judge", "even_checks:even", "--rounds", "2", "-n", "4,6",
        "--held-out", "0.3", "--held-out-n", "5", "--max-new-tokens", "6", "--most", "3", *RUN,
    ]  # fmt: skip
    sys.modules.pop("even_checks", None)


def content(folder):
    """The bytes of the files of all rounds that depend on the command alone."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.endswith((".jsonl", "metrics.json", "model.safetensors", "head.safetensors")) and (
            "tensorboard" not in name and "checkpoints" not in name and not name.endswith("run/metrics.jsonl")
        ):
            found[name] = path.read_bytes()
    return found


def test_every_round_keeps_samples_records_figures_and_a_head(words, dph_command, tmp_path):
    code, out, err = dph_command(*words, "--output", tmp_path / "out")
    assert code == 0, err
    out_dir = tmp_path / "out"
    held_out = len((out_dir / "round0/held-out.jsonl").read_text().splitlines())
    assert 0 < held_out < 24
    for number, n in ((1, 4), (2, 6)):
        folder = out_dir / f"round{number}"
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 24 - held_out
        for line in samples:
            columns = [line[name] for name in ("candidates", "correct", "finished", "logprobs", "rewards")]
            assert {len(column) for column in columns} == {n}
            for text, correct, finished, _, reward in zip(*columns, strict=True):
                assert correct == float(finished and len(text) % 2 == 0)
                assert (reward is not None) == (finished and number > 1)
        assert len(read_candidates(folder / "samples.jsonl")) == len(samples)  # as dph evaluate --candidates reads them
        for pair in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()):
            assert (len(pair["chosen"]) % 2, len(pair["rejected"]) % 2) == (0, 1)
        assert Model.from_pretrained(folder / "run/model").untrained_heads == set()
        assert (folder / "run/heads/default/head.json").is_file()
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["figures"]["n"] == [1, 2, 4, 5]
        assert set(metrics["figures"]["rules"]) == {"one sample", "most probable", "by reward", "vote", "oracle"}
        cut_off = [not ended for line in samples for ended in line["finished"]]
        assert 0 < metrics["cut_off"] == pytest.approx(sum(cut_off) / len(cut_off))
        summary = f"round {number}: {24 - held_out} prompts with {n} answers each, "
        assert f"{summary}{100 * metrics['right']:.1f} % right, {100 * metrics['cut_off']:.1f} % cut off, " in out
    recipe = json.loads((out_dir / "round2/run/config.json").read_text())
    sources = [str(out_dir / f"round{i}/pairs.jsonl") for i in (1, 2)]
    assert [source["source"] for source in recipe["data"]["sources"]] == sources
    assert (out_dir / "improve.png").read_bytes().startswith(b"\x89PNG")
    same = [(out_dir / f"round{i}/held-out.jsonl").read_text().splitlines() for i in (0, 1, 2)]
    texts = [[json.loads(line)["candidates"] for line in lines] for lines in same]
    assert texts[0] == texts[1] == texts[2]  # a frozen model says the same
    for line, rewards in zip(map(json.loads, same[2]), rewards_of(out_dir / "round2"), strict=True):
        assert [reward for reward in line["rewards"] if reward is not None] == pytest.approx(rewards, abs=1e-5)


def rewards_of(folder):
    """The rewards of each held-out prompt's finished answers, sampled again with the round's model."""
    model = Model.from_pretrained(folder / "run/model").eval()
    for line in map(json.loads, (folder / "held-out.jsonl").read_text().splitlines()):
        prompt = chat.prompt(line["prompt"], TOK)
        (answers,) = sample(model, TOK, [prompt], len(line["candidates"]), seed=0, max_new_tokens=6)
        yield [answer.rewards["default"] for answer in answers if answer.finished]


def test_a_complete_command_does_nothing_again_and_another_one_is_refused(words, dph_command, monkeypatch, tmp_path):
    code, out, err = dph_command(*words, "--output", tmp_path / "out")
    assert code == 0, err
    monkeypatch.setattr(entry, "train", None)
    monkeypatch.setattr(Sampler, "__call__", None)
    assert dph_command(*words, "--output", tmp_path / "out")[:2] == (0, out)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = dph_command(*words, "--output", tmp_path / "out", "--seed", 1, "optimiser.lr=1e-2")
    assert code == 2
    assert "expected the command that began there, got another prompts, held_out, selection, seed, recipe" in err
    with open("even_checks.py", "a") as checker:
        checker.write("# judges in another way\n")
    code, _, err = dph_command(*words, "--output", tmp_path / "out")
    assert code == 2
    assert "expected the command that began there, got another judge's files" in err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("x")
    code, _, err = dph_command(*words, "--output", tmp_path / "other")
    assert code == 2
    assert "expected a new folder, got one with mine.txt" in err


def killed(argv, owner, name, count):
    """Run a command in a child process that is killed at call ``count`` of a method; whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    calls, method = 0, getattr(owner, name)

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **options)

    setattr(owner, name, call)
    with contextlib.suppress(BaseException):
        main(argv)
    os._exit(0)


def test_killed_anywhere_it_continues_to_the_same_bytes(words, dph_command, tmp_path):
    (tmp_path / "whole").mkdir()
    os.chdir(tmp_path / "whole")
    (tmp_path / "whole/even_checks.py").write_text((tmp_path / "even_checks.py").read_text())
    assert dph_command(*words, "--output", "out")[0] == 0
    (tmp_path / "parts").mkdir()
    os.chdir(tmp_path / "parts")
    (tmp_path / "parts/even_checks.py").write_text((tmp_path / "even_checks.py").read_text())
    argv = [*words, "--output", "out"]
    places = [
        (Sampler, "__call__", 4),  # the second batch of round 1
        (Trainer, "train_step", 4),  # after a checkpoint of round 1
        (Selection, "rows", 1),  # all samples of round 2 are there, no records
        (Trainer, "train_step", 3),  # of round 2
        (Sampler, "__call__", 2),  # the last held-out prompts
    ]
    for place in places:
        assert killed(argv, *place), place
    assert dph_command(*argv)[0] == 0
    whole, parts = content(tmp_path / "whole/out"), content(tmp_path / "parts/out")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []
    assert len([name for name in whole if name.endswith("model.safetensors")]) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe", "mini-sft", "evaluation.share=0"], "recipe: expected stage head or align"),
        (["objective.heads=[a, b]"], "objective.heads: expected one head, got a, b"),
        (["data.sources=[x.jsonl]"], "data.sources: expected none, as records are made from --prompts"),
        (["output.directory=x"], "output.directory=x: expected --output in its place, got both"),
        (["model.path=x"], "model.path=x: expected MODEL in its place, got both"),
        (
            ["evaluation.share=0"],
            "evaluation.share: expected a share above 0, as output.best is reward_accuracy, got 0",
        ),
        (["seed=3"], "seed=3: expected --seed in its place, got both"),
        (["--held-out", "1.5"], "--held-out: expected a source, or a share of at least 0 and below 1, got 1.5"),
        (
            ["--held-out", "0.0001"],
            "--held-out: expected prompts on both sides of the share 0.0001, got 24 of 24 to train",
        ),
        (["--held-out", "PROMPTS"], "held-out prompts: expected other prompts than those of training, got 24 of them"),
        (["--records", "labels"], "objective.objective: expected separable, got contrastive"),
        (["-n", "0"], "expected a whole number of at least 1, got '0'"),
        (["--judge", "reference"], "prompts.jsonl:1: reference: expected the right answer"),
        (["--judge", "even_checks:odd"], "--judge: expected a function of even_checks, got odd, which is none"),
    ],
)
def test_wrong_options_are_one_line(words, refused, tmp_path, change, message):
    change = [str(tmp_path / "prompts.jsonl") if word == "PROMPTS" else word for word in change]
    assert message in refused(*words, *change, "--output", tmp_path / "out")


def test_a_prompt_that_is_too_long_is_named_before_the_first_answer(words, refused, monkeypatch, tmp_path):
    config = json.loads((Path(words[1]) / "config.json").read_text())
    shutil.copytree(words[1], tmp_path / "small")
    (tmp_path / "small/config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    monkeypatch.setattr(Sampler, "__call__", None)
    with open("prompts.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "word " * 40}) + "\n")
    line = refused("improve", tmp_path / "small", *words[2:], "--output", tmp_path / "out")
    assert "prompts.jsonl:25: expected at most 24 tokens, the model's context, with --max-new-tokens 6, got" in line


def test_a_reward_that_is_no_number_is_an_error_that_names_the_prompt(talker):
    model = tiny_model(vocab_size=len(TOK), im_end_token_id=TOK.convert_tokens_to_ids("<|im_end|>"))
    with torch.no_grad():
        model.lm_head.weight[model.config.im_end_token_id] *= 8
        for parameter in model.heads.parameters():
            parameter.fill_(torch.nan)
    sampler = Sampler(model, TOK, lambda prompt, answers: [0.0] * len(answers), "default", 8, 0, {"max_new_tokens": 8})
    with pytest.raises(ValueError, match="expected a number as its reward, got NaN") as caught:
        sampler([Prompt([message("user", "The fox?")], {}, "asked.jsonl:7")])
    assert caught.value.__notes__ == ["answering asked.jsonl:7"]


def test_interrupted_it_says_how_to_go_on(words, dph_command, monkeypatch, tmp_path):
    whole, calls = Sampler.__call__, []

    def interrupted(self, prompts):
        calls.append(prompts)
        if len(calls) == 4:  # the second batch of round 1
            raise KeyboardInterrupt
        return whole(self, prompts)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    code, _, err = dph_command(*words, "--output", "out")
    assert code == 130
    assert err.splitlines()[-1] == "dph: interrupted; the same command continues what is in out"
    assert len((tmp_path / "out/round1/samples.jsonl.partial").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("device", "values", "expected"),
    [("cpu", [], "cpu"), ("cuda:1", [], "cuda:1"), ("auto", ["device=cuda:2"], "cuda:2"), ("auto", [], "auto")],
)
def test_training_has_the_device_of_the_command(device, values, expected):
    args = argparse.Namespace(recipe="improve", overrides=values, seed=3, device=device)
    recipe = improve._recipe(args)
    assert (recipe.device, recipe.seed) == (expected, 3)


def test_progress_of_a_file_has_its_ends_and_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(results, "LINE_EVERY", 0)
    progress = improve.Progress()
    for name in ("round 0: held-out prompts", "round 1: prompts"):
        for done in (2, 5, 10):
            progress(name, done, 10)
    lines = [re.sub(r" records, .*", " records", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["round 0: held-out prompts: 2 of 10", "round 0: held-out prompts: 5 of 10 records"]
    assert lines[-1] == "round 1: prompts: 10 of 10"


def test_labels_of_single_answers_train_a_separable_head(words, dph_command, tmp_path):
    changes = ["--recipe", "head", "--records", "labels", "--rounds", 1, "--held-out", 0]
    code, out, err = dph_command(*words, *changes, "--output", tmp_path / "out")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "out/round1/labels.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {True, False}
    for row in rows:
        assert row["label"] == (len(row["completion"]) % 2 == 0)
    assert "held-out" not in out
    assert not (tmp_path / "out/improve.png").exists()


def test_prompts_without_right_and_wrong_answers_are_an_error_that_says_so(words, dph_command, tmp_path):
    (tmp_path / "even_checks.py").write_text("def even(row, answer): return True\n")
    code, _, err = dph_command(*words, "--output", tmp_path / "out")
    assert code == 2
    assert "expected right and wrong answers to some prompt, got none among" in err.splitlines()[-1]
    assert re.search(r"4 answers each, \d+ % of them cut off by --max-new-tokens: ", err)


def test_locked(words, dph_command, tmp_path):
    (tmp_path / "out").mkdir()
    with rounds._locked(tmp_path / "out"):
        code, _, err = dph_command(*words, "--output", tmp_path / "out")
    assert code == 2
    assert "another process is working there" in err
