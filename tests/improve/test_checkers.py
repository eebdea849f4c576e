"""Checkers of answers: functions, programs, references and heads, and the errors of bad ones."""

import stat
import sys
from pathlib import Path

import pytest
import torch

import dph
from dph.errors import UserError
from dph.evaluate.best_of import NORMALISERS
from dph.improve.checkers import content_of, open_checker
from dph.improve.prompts import Prompt
from dph.model.loading import load_tokenizer

ROW = {"question": "1 + 2?", "reference": 3}
PROMPT = Prompt([{"role": "user", "content": "1 + 2?"}], ROW, "sums.jsonl:4")

FUNCTIONS = """
def exact(row, answer):
    assert row["messages"][-1]["content"] == row["question"]
    return answer == str(row["reference"])

def share(row, answer): return len(answer) / 4
def text(row, answer): return "yes"
def none(row, answer): return None
def large(row, answer): return 2
def nan(row, answer): return float("nan")
def broken(row, answer): return {}[answer]
"""
PROGRAM = """#!{python}
import json, sys, time
for number, line in enumerate(sys.stdin):
    row = json.loads(line)
    assert row["messages"][-1]["content"] == row["question"]
    {judge}
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Function from the name of a checker and answers to its judgements."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_checks.py").write_text(FUNCTIONS)

    def judged(name, answers, prompt=PROMPT, **options):
        with open_checker(name, [prompt], **options) as checker:
            return checker(prompt, answers)

    yield judged
    sys.modules.pop("own_checks", None)


def program(path, judge):
    path.write_text(PROGRAM.format(python=sys.executable, judge=judge))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("reference", "normalise", "right"),
    [
        (3, "number", ["3", "It is 3.0", "so: 1 + 2 = 3"]),
        (["Three", 3], "words", ["three!", "The three", "3"]),
    ],
)
def test_answers_are_compared_with_references(judge, reference, normalise, right):
    prompt = Prompt(PROMPT.messages, {"reference": reference}, "sums.jsonl:4")
    answers = [*right, "four", "33"]
    assert judge("reference", answers, prompt, normalise=NORMALISERS[normalise]) == [1.0] * len(right) + [0.0, 0.0]


@pytest.mark.parametrize("row", [{}, {"reference": None}, {"reference": []}, {"reference": [True]}])
def test_a_row_without_a_reference_is_named_before_anything_is_checked(judge, row):
    with pytest.raises(UserError, match=r"sums\.jsonl:4: reference: expected the right answer"):
        judge("reference", [], Prompt(PROMPT.messages, row, "sums.jsonl:4"))


def test_functions_and_programs_get_rows_and_give_shares(judge, tmp_path):
    answers = ["3", "33", "3", ""]
    assert judge("own_checks:exact", answers) == [1.0, 0.0, 1.0, 0.0]
    assert judge("own_checks:share", answers) == [0.25, 0.5, 0.25, 0.0]
    exact = program(tmp_path / "exact", 'print(json.dumps(row["answer"] == str(row["reference"])), flush=True)')
    share = program(tmp_path / "share", 'print(json.dumps({"correct": len(row["answer"]) / 4}), flush=True)')
    assert judge(exact, answers) == [1.0, 0.0, 1.0, 0.0]
    assert judge(f"{sys.executable} {share}", answers) == [0.25, 0.5, 0.25, 0.0]


def test_a_program_may_read_all_answers_before_it_writes_and_write_more_than_a_pipe_holds(judge, tmp_path):
    many = ["3" * (1 + i % 5) for i in range(20000)]
    slow = program(tmp_path / "slow", 'print(json.dumps(row["answer"] == "3") + " " * 20, flush=number % 500 == 499)')
    assert judge(slow, many) == [float(answer == "3") for answer in many]


def test_a_program_is_started_once_and_ends_with_its_input(tmp_path):
    counted = program(tmp_path / "counted", "print(min(number / 10, 1), flush=True)")
    with open_checker(counted, [PROMPT]) as checker:
        assert checker(PROMPT, ["a", "b"]) + checker(PROMPT, ["c"]) == [0.0, 0.1, 0.2]
        process = checker._process
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("text", "expected true, false or a number from 0 to 1, got 'yes'"),
        ("none", "expected true, false or a number from 0 to 1, got None"),
        ("large", "expected true, false or a number from 0 to 1, got 2"),
        ("nan", "expected true, false or a number from 0 to 1, got nan"),
        ("broken", "raised KeyError: '3'"),
    ],
)
def test_a_function_that_gives_something_else_is_named_with_the_answer(judge, name, got):
    with pytest.raises(UserError) as caught:
        judge(f"own_checks:{name}", ["3"])
    assert str(caught.value) == f"own_checks:{name}: answer '3' to sums.jsonl:4: {got}"


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ('print("maybe", flush=True)', "expected true, false or a number from 0 to 1, got 'maybe'"),
        ('print("{}", flush=True)', "expected true, false or a number from 0 to 1, got None"),
        ("sys.exit(7)", "expected a line of JSON, got the end of the program's output (exit code 7)"),
        ("time.sleep(9)", "expected a line of JSON within 1 s, got none: does the program flush"),
    ],
)
def test_a_program_that_fails_is_named_with_the_answer(judge, tmp_path, code, got):
    path = program(tmp_path / "bad", f'print("true", flush=True) if number == 0 else [{code}]')
    with pytest.raises(UserError) as caught:
        judge(path, ["3", "4"], timeout=1.0)
    assert f"{path}: answer '4' to sums.jsonl:4: {got}" in str(caught.value)


def test_a_program_with_a_line_too_many_is_refused(judge, tmp_path):
    path = program(tmp_path / "talkative", 'print("true\\nfalse", flush=True)')
    with pytest.raises(UserError, match=r"answer '3' to sums.jsonl:4: expected one line of JSON, got more: 'false'"):
        judge(path, ["3"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "expected a module that can be imported, got no_such_module: ModuleNotFoundError"),
        ("own_checks:nothing", "expected a function of own_checks, got nothing, which is none"),
        ("./nothing here", r"expected reference, head:DIR, module:function or a program, got './nothing here'"),
        ("", "expected reference, head:DIR, module:function or a program, got ''"),
        ("head:MUTE", "head"),
    ],
)
def test_checkers_that_are_not_there(judge, models, name, message):
    with pytest.raises(UserError, match=f"--judge: .*{message}" if "MUTE" in name else f"--judge: {message}"):
        judge(name.replace("MUTE", str(models / "mute")), ["3"])


def test_a_head_judges_by_its_probability(judge, models, tmp_path):
    model, tok = dph.Model.from_pretrained(models / "judge"), load_tokenizer(models / "judge")
    answers = ["gripping", "a film", "not"]
    talks = [[*PROMPT.messages, {"role": "assistant", "content": answer}] for answer in answers]
    expected = torch.sigmoid(model.score(tok, talks)).tolist()
    assert judge(f"head:{models / 'judge'}", answers) == pytest.approx(expected)
    model.save_head(tmp_path / "head", "short")
    expected = torch.sigmoid(model.score(tok, talks, "short")).tolist()
    options = {"backbone": str(models / "judge")}
    assert judge(f"head:{tmp_path / 'head'}", answers, **options) == pytest.approx(expected)
    opened = []

    def in_bfloat16(path):
        opened.append(path)
        return dph.Model.from_pretrained(path, dtype=torch.bfloat16), tok

    low = torch.sigmoid(model.bfloat16().score(tok, talks, "short")).tolist()
    assert low != pytest.approx(expected)
    assert judge(f"head:{tmp_path / 'head'}", answers, **options, open_model=in_bfloat16) == pytest.approx(low)
    assert opened == [str(models / "judge")]


def test_the_files_of_a_checker_are_known_by_their_contents(tmp_path, monkeypatch):
    """Of a program with its arguments, a module and a head in a run; a file that changes has another digest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run/model"
    run.mkdir(parents=True)
    for name in ("judging_module.py", "judge.sh", "words.txt", "run/model/model.safetensors", "run/log.txt"):
        Path(name).write_text("def right(row, answer): return True\n")
    files = {
        "reference": set(), "bash judge.sh --words words.txt": {"judge.sh", "words.txt"},
        "judging_module:right": {str(tmp_path / "judging_module.py")}, "head:run": {"run/model/model.safetensors"},
    }  # fmt: skip
    for name, paths in files.items():
        before = content_of(name)
        assert set(before) == paths
        for path in paths:
            with open(path, "a") as file:
                file.write("#\n")
            assert content_of(name)[path] != before[path]
