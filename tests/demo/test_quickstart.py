"""The quickstart's road on a few steps; what it is worth in full is in the README."""

import itertools
import shlex
import signal

import pytest

from dph.cli.main import main, parse
from dph.demo import puzzles, quickstart, report
from dph.improve.rounds import Sampler
from dph.model.model import Model
from dph.train.trainer import Result

SHORT = ["quickstart", "--scale", "0.01", "--prompts", "4", "--pairs-from", "8", "--output"]


def truth_and_lie(sampler, prompts):
    """Lines that need no samples: the truth and the popular falsehood."""
    known = {puzzle.prompt: puzzle for puzzle in itertools.islice(puzzles.puzzles(1), 100)}
    lines = []
    for prompt in prompts:
        puzzle = known[prompt.place]
        correct = sampler.checker(prompt, [puzzle.truth, puzzle.falsehood])
        both = {"finished": [True, True], "logprobs": [-1.0, -1.0], "rewards": [None, None], "correct": correct}
        lines.append({"prompt": prompt.messages, "candidates": [puzzle.truth, puzzle.falsehood], **both})
    return lines


def test_it_ends_with_the_table_pictures_and_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "__call__", truth_and_lie)
    assert main([*SHORT, str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for rule in report.RULES:
        assert rule in printed
    assert "4 held-out prompts" in printed
    for name in ("accuracy.png", "rewards.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    frozen, sft = (Model.from_pretrained(tmp_path / "run" / stage / "model") for stage in ("improve/round2/run", "sft"))
    assert sft.head_names == []
    assert frozen.head_names == ["default"]
    backbone = sft.state_dict()
    assert all(backbone[name].equal(w) for name, w in frozen.state_dict().items() if name in backbone)


def test_a_model_that_gets_nothing_right_is_an_error_in_one_line(tmp_path, capsys):
    assert main([*SHORT, str(tmp_path / "run")]) == 2
    assert "expected right and wrong answers to some prompt" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_run_goes_on_or_says_how(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sampler, "__call__", truth_and_lie)
    assert main([*SHORT, str(tmp_path / "run")]) == 0
    first = (tmp_path / "run" / "align" / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*SHORT, str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*SHORT, str(tmp_path / "run"), "--resume"]) == 0
    assert (tmp_path / "run" / "align" / "model" / "model.safetensors").read_bytes() == first


def test_a_stopped_run_names_the_command_that_goes_on_with_it(tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "a run")
    monkeypatch.setattr(quickstart, "train", lambda *_, **__: Result(None, None, tmp_path, 1, True, signal.SIGINT, {}))
    for argv in ([*SHORT, output, "--seed", "-3"], [*SHORT, output, "--seed", "-3", "--resume"]):
        assert main(argv) == 130
        line = capsys.readouterr().err.splitlines()[-1]
        hint = line.removeprefix("stopped in stage pretrain; ").removesuffix(" continues it")
        command, *argv = shlex.split(hint)
        assert (command, argv[-1], hint.count(f"'{output}'")) == ("dph", "--resume", 1)
        args = parse(argv)
        assert (args.output, args.seed, args.scale, args.prompts, args.pairs_from) == (output, -3, 0.01, 4, 8)


@pytest.mark.parametrize(
    ("option", "value"), [("prompts", "0"), ("pairs-from", "0"), *(("scale", x) for x in ("0.0", "nan", "inf", "-inf"))]
)
def test_numbers_that_make_no_sense(option, value, tmp_path, capsys):
    assert main(["quickstart", f"--{option}={value}", "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"dph: error: --{option}: expected a finite number above 0, got {value}\n"
    assert not (tmp_path / "run").exists()
