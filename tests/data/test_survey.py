"""``dph data``: contents of rows, rows that training would refuse, and suspicious ones, with file and line."""

import json

import pytest
from helpers.texts import small_tokenizer, write_lines

from dph.cli.main import main
from dph.data import dataset, survey
from dph.data.formats import parse_record
from dph.errors import UserError

PAIR = {"prompt": "why?", "chosen": "because of this", "rejected": "no"}


def pair(**changes):
    return PAIR | changes


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def look(capsys, *words):
    """Exit code and survey of a command."""
    code = main(["data", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_rows_are_counted_by_what_they_hold(tmp_path, capsys):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    talk.append({"role": "assistant", "content": "hello"})
    rows = [pair(id=7), {"messages": talk}, {"prompt": "a", "completion": "b", "label": False}, {"text": "plain"}]
    scored = {"prompt": "why?", "completions": ["a", "because"], "scores": [1, 2]}
    _, found = look(capsys, write_lines(tmp_path / "b.jsonl", scored, pair(rejected=["a", "b"]), scored))
    assert found["forms"] == {"labelled answers": 3}
    assert list(found["suspicions"]) == ["duplicate"]
    code, found = look(capsys, write_lines(tmp_path / "a.jsonl", *rows))
    assert code == 0
    assert found["rows"] == 4
    assert found["forms"] == {"preference": 1, "conversation": 2, "text": 1}
    assert found["roles"] == {"user": 3, "assistant": 3, "system": 1}
    assert found["turns"] == {"2": 2, "3": 1}
    assert found["labels"] == {"false": 1}
    assert found["ignored"] == {"id": 1}
    assert found["longer_chosen"] == {"longer": 1}
    assert found["characters"] == {"shortest": 2, "median": 16, "95 %": 19, "longest": 19}
    assert (found["tokens"], found["problems"], found["suspicions"], found["refused"]) == (None, {}, {}, 0)


def test_refused_rows_are_those_of_training(tmp_path, capsys):
    bad = [{"prompt": "a", "chosen": "b"}, pair(tools=[1]), {"messages": [{"role": "robot", "content": "x"}]}]
    path = write_lines(tmp_path / "a.jsonl", pair(), *bad, *bad)
    with path.open("a") as file:
        file.write("{oops\n")
    code, found = look(capsys, path)
    assert code == 1
    assert found["refused"] == found["forms"]["refused"] == 7
    counts = sorted(count for count, _ in found["problems"].values())
    assert counts == [1, 2, 2, 2]
    for reason, (_, places) in found["problems"].items():
        number = int(places[0].rpartition(":")[2])
        if number < 8:
            with pytest.raises(UserError):
                parse_record(([pair()] + bad * 2)[number - 1], "text" if "chosen" in reason else "preference", "")
        assert places[0].startswith(f"{path}:")
    assert any(
        reason.startswith("not JSON") and places == [f"{path}:8"] for reason, (_, places) in found["problems"].items()
    )


def test_what_is_suspicious_is_named(tmp_path, capsys):
    rows = [
        pair(),
        pair(),
        pair(rejected="because of this"),
        pair(chosen="no", rejected="because of this"),
        pair(prompt="x"),
        {"chosen": talk("a", "b"), "rejected": talk("c", "d")},
    ]
    path = write_lines(tmp_path / "a.jsonl", *rows)
    other = write_lines(tmp_path / "b.jsonl", pair(prompt="x", chosen="long " * 50))
    held_out = write_lines(tmp_path / "held.jsonl", pair(prompt="x", chosen="other"))
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = [path, other, "--held-out", held_out, "--tokenizer", tmp_path / "tokenizer", "--max-tokens", "100"]
    code, found = look(capsys, *words)
    assert code == 0
    assert found["suspicions"] == {
        "duplicate": [1, [f"{path}:2"]],
        "identical sides": [1, [f"{path}:3"]],
        "different prompts": [1, [f"{path}:6"]],
        "contradiction": [3, [f"{path}:1", f"{path}:2", f"{path}:4"]],
        "held out": [2, [f"{path}:5", f"{other}:1"]],
        "too long": [1, [f"{other}:1"]],
    }
    encoded = survey.Encoder(small_tokenizer())(dataset.load(other, "preference")[0])
    assert found["tokens"]["longest"] == max(map(len, encoded))
    assert look(capsys, *words, "--strict")[0] == 1
    assert main(["data", *map(str, words)]) == 0
    text = capsys.readouterr().out
    for word in ("preference 7", "contradiction: another pair prefers", f"{path}:1, {path}:2", "longer 57%"):
        assert word in text


def test_the_sample_is_fair(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE", 50)
    path = write_lines(tmp_path / "a.jsonl", *({"text": "a" * i} for i in range(1000)))
    surveyor = survey.Surveyor(small_tokenizer())
    assert list(surveyor.read(path))[-1] == 1000
    numbers = [number for number, _ in surveyor._sample]
    assert len(set(numbers)) == 50
    assert 350 < sum(numbers) / 50 < 650
    assert all(surveyor.location(number) == f"{path}:{number + 1}" for number in numbers)


def test_a_source_that_cannot_be_read_is_an_error(tmp_path, refused):
    assert "nothing.jsonl" in refused("data", str(tmp_path / "nothing.jsonl"))
