"""dph evaluate --suite: the tasks that are there, averages, few-shot prompts, and tables in every format."""

import csv
import json
import re
import shutil
import zipfile

import pytest
from helpers.texts import message, write_lines

from dph import chat, tasks
from dph.data.candidates import parse_candidates
from dph.data.dataset import task_documents
from dph.errors import UserError
from dph.evaluate import glue_server
from dph.evaluate.choices import Report, Row
from dph.evaluate.few_shot import Demonstrations
from dph.evaluate.metrics import Interval
from dph.evaluate.suites import GPT4ALL, SUITES, averages, missing
from dph.model.loading import load_tokenizer


def write_tasks(folder, names, splits=(None,), count=3):
    for name in names:
        task = tasks.load(name)
        for split in splits:
            write_lines(folder / name / f"{split or task.evaluated}.jsonl", *[task.example] * count)
    return folder


def report(task, **figures):
    """A report by two methods, the second without a figure."""
    metrics = {name: Interval(value, value - 0.1, value + 0.1) for name, value in figures.items()}
    return Report(task, 10, 10, (Row("a", metrics, 0, 10), Row("b", dict.fromkeys(metrics), 0, 10)))


def test_averages_by_hand():
    glue = [
        report("glue/cola", matthews=0.5), report("glue/sst2", accuracy=0.9), report("glue/mrpc", f1=0.8, accuracy=0.6),
        report("glue/qqp", f1=0.7, accuracy=0.9), report("glue/stsb", pearson=0.3, spearman=0.5),
        report("glue/mnli_matched", accuracy=0.7), report("glue/mnli_mismatched", accuracy=0.5),
        report("glue/qnli", accuracy=0.8), report("glue/rte", accuracy=0.6),
    ]  # fmt: skip
    eight = (0.5 + 0.9 + 0.7 + 0.8 + 0.4 + 0.6 + 0.8 + 0.6) / 8
    ((name, method, figure),) = averages(glue, SUITES["glue"].averages)
    assert (name, method) == ("GLUE without WNLI", "a")
    assert figure.value == pytest.approx(eight)
    width = (7 * 0.1**2 / 64 + 2 * 0.1**2 / 16**2) ** 0.5
    assert figure.high - figure.value == pytest.approx(width)
    assert missing(glue, SUITES["glue"].averages) == {"GLUE": ["glue/wnli"]}
    hidden = Report("glue/wnli", 10, 0, (Row("a", {"accuracy": None}, 0, 0),))
    assert missing([*glue, hidden], SUITES["glue"].averages) == {"GLUE": ["glue/wnli"]}
    with_wnli = averages([*glue, report("glue/wnli", accuracy=0.4)], SUITES["glue"].averages)
    assert with_wnli[0][2].value == pytest.approx((8 * eight + 0.4) / 9)
    race = averages([report("race/middle", accuracy=0.5), report("race/high", accuracy=0.3)], SUITES["race"].averages)
    assert [figure.value for _, _, figure in race] == pytest.approx([0.4, (1436 * 0.5 + 3498 * 0.3) / 4934])


def test_every_suite_has_known_tasks():
    for suite in SUITES.values():
        assert set(suite.tasks) <= set(tasks.names())
        assert {task for average in suite.averages for task in average.tasks} <= set(suite.tasks)
        assert all(sum(average.weights) == pytest.approx(1) for average in suite.averages)


@pytest.mark.parametrize("suffix", ["md", "csv", "json"])
def test_a_suite_of_local_files(dph_command, models, tmp_path, suffix):
    folder = write_tasks(tmp_path / "data", GPT4ALL)
    table = tmp_path / f"table.{suffix}"
    argv = ["evaluate", models / "judge", "--suite", "gpt4all", "--directory", folder, "--table", table, "--json"]
    code, out, err = dph_command(*argv)
    assert (code, "no average" in err) == (0, False)
    lines = list(map(json.loads, out.splitlines()))
    accuracies = [line["rows"][1]["metrics"]["accuracy"]["value"] for line in lines if "task" in line]
    average = next(line for line in lines if line.get("average") == "GPT4All" and line["method"] == "reward")
    assert len(accuracies) == 7
    assert average["value"] == pytest.approx(sum(accuracies) / 7)
    if suffix == "json":
        saved = json.loads(table.read_text())
        assert [row["method"] for row in saved["averages"]] == ["log-probability", "reward"]
    else:
        rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
        rows = list(csv.reader(table.open())) if suffix == "csv" else rows
        assert rows[-1][:3] == ["GPT4All", "reward", "average"]
        assert float(rows[-1][3]) == pytest.approx(average["value"], abs=5e-4)
    if suffix == "csv":  # its intervals are numbers
        assert rows[0][3:6] == ["value", "low", "high"]
        assert list(map(float, rows[-1][4:6])) == pytest.approx([average["low"], average["high"]])


def test_tasks_that_are_not_there_are_said(dph_command, refused, models, tmp_path):
    folder = write_tasks(tmp_path / "data", GPT4ALL[2:])
    write_tasks(folder, GPT4ALL[1:2], ["train"])
    code, out, err = dph_command("evaluate", models / "judge", "--suite", "gpt4all", "--directory", folder)
    assert code == 0
    assert f"left out, as {folder} has no file: hellaswag/no_choice" in err
    assert f"openbookqa/main: train records are evaluated, as {folder} has none of the split test" in err
    assert "no average GPT4All, for want of records with labels of hellaswag/no_choice\n" in err
    assert "GPT4All" not in out
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refused("evaluate", models / "judge", "--suite", "race", "--directory", empty)
    assert "expected DIR/TASK/SPLIT.jsonl of a task of race, got none there" in line
    assert "--glue-submission: expected one of them, got none" in refused("evaluate", models / "judge")
    line = refused("evaluate", models / "judge", "--task", "boolq", "--directory", folder, "--table", "a.txt")
    assert "--table: expected a file that ends in .md, .csv, .json, got a.txt" in line
    argv = ["evaluate", models / "judge", "--task", "boolq", "--directory", folder]
    both = tmp_path / "both.json"
    line = refused(*argv, "--output", both, "--table", tmp_path / "data/../both.json")
    assert "--table: expected another file than --output" in line
    assert not both.exists()
    line = refused(*argv, "--table", folder / "boolq/validation.csv", "--normalise", "number")
    assert "--normalise: expected --candidates with it" in line
    (folder / "boolq/table.csv").write_text("")
    line = refused(*argv, "--table", folder / "boolq/table.csv")
    assert "--table: expected another file than the input" in line
    assert "--shots: " in refused(*argv, "--shots", 1)


def test_other_log_probabilities_choose_too(dph_command, models, tmp_path):
    folder, output = write_tasks(tmp_path / "data", ["piqa"]), tmp_path / "answers.jsonl"
    argv = ["--task", "piqa", "--directory", folder, "--logprob", "mean", "sum", "bytes", "--logprob-only"]
    assert dph_command("evaluate", models / "judge", *argv, "--output", output)[0] == 0
    line = json.loads(output.read_text().splitlines()[0])
    answers = [choice[-1]["content"] for choice in tasks.load("piqa").choices(line["record"])]
    sums = line["scores"]["log-probability (sum)"]
    assert line["scores"]["log-probability (per byte)"] == pytest.approx(
        [value / len(answer.encode()) for value, answer in zip(sums, answers, strict=True)]
    )
    assert next(iter(line["scores"])) == "log-probability"


def test_demonstrations_are_earlier_turns_of_the_same_subject(dph_command, refused, models, tmp_path):
    task = tasks.load("mmlu/all")
    shown = []
    for subject in ("math", "law"):
        for i in range(2):
            shown.append({**task.example, "question": f"{subject} {i}?", "subject": subject, "answer": i})
    write_lines(tmp_path / "mmlu/all/fewshot.jsonl", *shown)
    write_lines(tmp_path / "mmlu/all/test.jsonl", task.example)
    demonstrations = Demonstrations(task, 2, tmp_path)
    (found, *_) = demonstrations.before(task.example, task.choices(task.example))
    plain = task.choices(task.example)[0]
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert found[0] == plain[0]
    assert found[-2:] == plain[-2:]
    assert ["math 0?" in found[1]["content"], "math 1?" in found[3]["content"]] == [True, True]
    assert found[4] == task.targets(shown[1])[0][-1]
    with pytest.raises(UserError, match="expected at least 3 records in mmlu/all, fewshot, subject math, got 2"):
        Demonstrations(task, 3, tmp_path)
    with pytest.raises(UserError, match="expected demonstrations of subject art, got none"):
        demonstrations.before({**task.example, "subject": "art"}, task.choices(task.example))
    argv = ["evaluate", models / "judge", "--task", "mmlu/all", "--directory", tmp_path]
    (zero, two) = (dph_command(*argv, "--shots", k, "--json")[1] for k in (0, 2))
    assert json.loads(zero)["n"] == json.loads(two)["n"] == 1
    short = shutil.copytree(models / "judge", tmp_path / "short")  # its context holds the question alone
    longest = max(len(chat.encode(choice, load_tokenizer(str(short)))) for choice in task.choices(task.example))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    argv[1] = short
    assert dph_command(*argv)[0] == 0
    line = refused(*argv, "--shots", 2)
    assert f"test.jsonl:1: expected at most {longest} tokens, the model's context, got " in line


def test_demonstrations_of_other_tasks_are_drawn_from_training_records(tmp_path):
    task = tasks.load("boolq")
    write_lines(tmp_path / "boolq/train.jsonl", *[{**task.example, "question": f"q{i}"} for i in range(20)])
    documents = task_documents(task, "train", tmp_path)
    drawn = Demonstrations(task, 3, tmp_path).before(documents[0], [[message("user", "x")]])[0]
    assert len(drawn) == 7
    assert drawn == Demonstrations(task, 3, tmp_path).before(documents[5], [[message("user", "x")]])[0]
    assert drawn != Demonstrations(task, 3, tmp_path, seed=1).before(documents[0], [[message("user", "x")]])[0]


def test_a_question_is_not_among_its_own_demonstrations(dph_command, models, tmp_path):
    """A file of the user has one split alone, and a training split may hold questions of another one."""
    rows = [{"question": f"q{i}", "choices": ["yes", "no"], "label": i % 2} for i in range(4)]
    path = write_lines(tmp_path / "own.jsonl", *rows)
    task = tasks.load(str(path))
    demonstrations, seen = Demonstrations(task, 3, None), set()
    for row in rows:
        (found, _) = demonstrations.before(row, task.choices(row))
        asked = [turn["content"].split()[1] for turn in found if turn["role"] == "user"]
        assert len(set(asked)) == 4
        assert asked[-1] == row["question"]
        seen.add(tuple(asked[:-1]))
    assert len(seen) > 1
    with pytest.raises(UserError, match="expected at least 4 records in own, train besides the question, got 3"):
        Demonstrations(task, 4, None).before(rows[0], task.choices(rows[0]))
    other = write_lines(tmp_path / "other.jsonl", *rows[:3])
    assert demonstrations.fingerprint() != Demonstrations(tasks.load(str(other)), 2, None).fingerprint()
    argv = ["evaluate", models / "judge", "--task", path, "--shots", 2, "--json"]
    assert json.loads(dph_command(*argv)[1])["n"] == 4


def test_candidates_of_files(dph_command, refused, models, tmp_path):
    rows = []
    for i in range(4):
        texts = ["is good", "dull", "is not", "late"][: 2 + i % 3]
        rows.append({"prompt": f"a film {i}?", "candidates": texts, "correct": [j == i % 2 for j in range(len(texts))]})
    sampled = write_lines(tmp_path / "sampled.jsonl", *rows)
    bench = []
    for i in range(3):
        bench.append(
            {"id": str(i), "prompt": f"q{i}", "chosen": ["good"], "rejected": ["bad", "late", "no"], "subset": "Math"}
        )
    bench = write_lines(tmp_path / "bench.jsonl", *bench)
    output = tmp_path / "scores.jsonl"
    argv = ["evaluate", models / "judge", "--candidates", sampled, bench, "--output", output, "--json"]
    code, out, err = dph_command(*argv)
    assert code == 0, err
    written = list(map(json.loads, output.read_text().splitlines()))
    assert [len(line["scores"]["reward"]) for line in written] == [2, 3, 4, 2, 4, 4, 4]
    lines = list(map(json.loads, out.splitlines()))
    oracle = next(line for line in lines if line.get("rule") == "oracle")
    assert (oracle["ns"], oracle["right"][-1]["value"]) == ([1, 2, 4], 1.0)
    by_reward = next(line for line in lines if line.get("rule") == "reward")
    right = [row["correct"][max(range(len(row["correct"])), key=line["scores"]["reward"].__getitem__)]
             for row, line in zip(rows, written[:4], strict=True)]  # fmt: skip
    assert by_reward["right"][-1]["value"] == pytest.approx(sum(right) / 4)
    subset = next(line for line in lines if line.get("name") == "Math" and line["method"] == "reward")
    best = [line["scores"]["reward"][0] == max(line["scores"]["reward"]) for line in written[4:]]
    assert subset["value"] == pytest.approx(sum(best) / 3)
    assert "subset" in dph_command(*argv[:-3])[1]
    for option in (["--task", "boolq"], ["--shots", 2], ["--split", "test"], ["--glue-submission", tmp_path / "glue"]):
        assert f"--candidates: expected no {option[0]} with it, got one" in refused(*argv[:-1], *option)
    given_twice = [f"{{source: {sampled}, limit: {count}}}" for count in (1, 2)]
    out = dph_command("evaluate", models / "judge", "--candidates", *given_twice)[1]
    assert [f"limit: {count}}}: {count} prompts" in out for count in (1, 2)] == [True, True]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"messages": [message("user", "q")]}, "expected prompt or messages, got both"),
        ({"prompt": None}, "expected prompt or messages, got neither"),
        ({"correct": [1, 2]}, "correct.1: expected true, false or a number from 0 to 1, got 2"),
    ],
)
def test_rows_of_candidates(fields, error):
    row = {"prompt": "q", "candidates": ["a", "b"], "correct": [1, 0], "id": None, "subset": None}
    read = parse_candidates(row, "x:1")
    assert (read.texts, read.correct, read.id, read.subset) == (["a", "b"], [1.0, 0.0], "", None)
    by_messages = parse_candidates({**row, "prompt": None, "messages": [message("user", "q")]}, "x:1")
    assert by_messages.conversations == read.conversations
    with pytest.raises(UserError, match=f"x:1: {re.escape(error)}"):
        parse_candidates({**row, **fields}, "x:1")


def test_a_submission_to_the_glue_server(dph_command, refused, models, tmp_path, monkeypatch):
    files = {task: file._replace(rows=3) for task, file in glue_server.FILES.items()}
    folder = write_tasks(tmp_path / "data", files, ["test"])
    argv = ["evaluate", models / "judge", "--glue-submission", tmp_path / "out", "--directory", folder]
    line = refused(*argv)
    assert "glue/cola: expected the 1,063 records of the test set, got 3" in line
    monkeypatch.setattr(glue_server, "FILES", files)
    assert dph_command(*argv, "--output", tmp_path / "lines.jsonl")[0] == 0
    lines = list(map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines()))
    for method in ("log-probability", "reward"):
        written = tmp_path / "out" / method
        assert len(list(written.glob("*.tsv"))) == 11
        chosen = [line["predictions"][method]["choice"] for line in lines if line["task"] == "glue/ax"]
        labels = ["entailment", "neutral", "contradiction"]
        expected = ["index\tprediction", *(f"{i}\t{labels[choice]}" for i, choice in enumerate(chosen))]
        assert (written / "AX.tsv").read_text().splitlines() == expected
        assert (written / "STS-B.tsv").read_text().splitlines()[1].split("\t")[1] in [f"{i}.000" for i in range(6)]
        with zipfile.ZipFile(written / "submission.zip") as archive:
            assert archive.read("QNLI.tsv") == (written / "QNLI.tsv").read_bytes()
    for change in ("1\tyes", "2\tentailment", "1"):
        broken = tmp_path / "broken.zip"
        with zipfile.ZipFile(written / "submission.zip") as old, zipfile.ZipFile(broken, "w") as new:
            for name in old.namelist():
                text = old.read(name).decode().splitlines()
                new.writestr(name, "\n".join([*text[:2], change, *text[3:]]) if name == "RTE.tsv" else "\n".join(text))
        with pytest.raises(UserError, match=r"RTE.tsv:3: expected 1 and a label of the task"):
            glue_server.check(broken)
    assert "expected no --task" in refused(*argv, "--limit", 3)
