"""Tasks of the user, from a file of rows or a YAML file, and ``dph tasks``."""

import json
import pickle

import pytest
from helpers.texts import small_tokenizer, write_lines
from helpers.tiny import tiny_model

from dph import tasks
from dph.cli.main import main
from dph.data import dataset
from dph.data.sources import fingerprint
from dph.errors import UserError
from dph.evaluate.choices import evaluate
from dph.tasks.base import CHOOSE

ROWS = [
    {"question": "Which is a gas?", "choices": ["ice", "steam", "rock"], "answer": 1},
    {"question": "Which is a solid?", "choices": ["ice", "steam"], "label": "A"},
    {"prompt": "The sky is", "choices": ["blue", "B"], "answer": "B"},
    {"prompt": "One and one:", "choices": ["three", "two"], "label": "1"},
    {"prompt": "Hidden:", "choices": ["a", "b"]},
]


def answers(task, doc):
    return [choice[-1]["content"] for choice in task.choices(doc)]


def test_rows_with_questions_and_choices(tmp_path):
    task = tasks.load(str(write_lines(tmp_path / "own.jsonl", *ROWS)))
    docs = dataset.task_documents(task, "validation")
    assert [task.gold(doc) for doc in docs] == [1, 0, 1, 1, None]
    assert answers(task, docs[0]) == ["A. ice", "B. steam", "C. rock"]
    assert answers(task, docs[2]) == ["blue", "B"]
    asked = [task.choices(doc)[0][1]["content"] for doc in (docs[0], docs[2])]
    assert asked == ["Question: Which is a gas?\n\nChoices:\nA. ice\nB. steam\nC. rock\n\nAnswer:", "The sky is"]
    records = dataset.load(f"task:{tmp_path / 'own.jsonl'}", "preference", limit=4)
    copied = pickle.loads(pickle.dumps(records))  # as workers read it
    assert [record.chosen[-1]["content"] for record in copied] == ["B. steam", "A. ice", "B", "two"]
    assert copied[1].rejected[-1]["content"] == "B. steam"
    assert copied[0].rejected[-1]["content"] in ("A. ice", "C. rock")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "answer: expected a number from 0 to 1, a letter, or the text of one"),
        ({"choices": ["B", "A"], "label": "A"}, "got 'A', which is the text, number or letter of the choices 0, 1"),
        ({"choices": ["3", "0"], "label": "0"}, "got '0', which is the text, number or letter of the choices 0, 1"),
        ({"choices": ["a", "b"], "label": 0, "system": 3}, "system: expected text, got 3"),
        ({"choices": ["a", "a"], "label": "a"}, "label: expected a number from 0 to 1"),
        ({"choices": ["a", "b"], "label": True}, "label: expected a number from 0 to 1"),
        ({"choices": ["a", "b"], "label": 0, "answer": 0}, "expected either label or answer, got both"),
        ({"choices": ["a"], "label": 0}, "choices: expected at least"),
        ({"choices": "ab", "label": 0}, "choices: expected a list of texts, got 'ab'"),
        ({"question": "x", "choices": ["a", "b"], "label": 0}, "expected either question or prompt, got both"),
        ({"prompt": None, "choices": ["a", "b"], "label": 0}, "expected question or prompt, got the fields"),
    ],
)  # fmt: skip
def test_malformed_rows_name_file_line_and_field(row, text, tmp_path):
    path = write_lines(tmp_path / "own.jsonl", ROWS[0], {"prompt": "x", **row})
    with pytest.raises(UserError) as error:
        dataset.task_documents(tasks.load(str(path)), "validation")
    assert str(error.value).startswith(f"{path}:2: task own: ")
    assert text in str(error.value)


def test_a_system_message_of_a_row_is_used_and_unknown_fields_are_reported(tmp_path, caplog):
    rows = ROWS[0] | {"system": "Be brief.", "answerKey": "B"}, ROWS[1]
    task = tasks.load(str(path := write_lines(tmp_path / "own.jsonl", *rows)))
    docs = dataset.task_documents(task, "validation")
    assert [task.question(doc)[0]["content"] for doc in docs] == ["Be brief.", CHOOSE]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: ignored fields: answerKey"]


YAML = """
data: rows.csv
prompt: "{passage}\\nIs that so, {name}?"
choices: [no, yes]
gold: truth
first: 1
listed: true
"""


def test_a_yaml_file_describes_other_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("passage,name,truth\nSnow is white.,Ann,2\nSnow is red.,Bob,no\n")
    path = tmp_path / "task.yaml"
    path.write_text(YAML)
    task = tasks.load(str(path))
    docs = dataset.task_documents(task, "train")
    assert [task.gold(doc) for doc in docs] == [1, 0]
    assert answers(task, docs[0]) == ["A. no", "B. yes"]  # text, not the booleans of YAML
    assert task.choices(docs[0])[0][1]["content"].startswith("Snow is white.\nIs that so, Ann?\n\nChoices:\nA. no")
    path.write_text(YAML.replace("[no, yes]", "options").replace("listed: true", "metric: f1"))
    write_lines(tmp_path / "rows.csv", {})
    (tmp_path / "rows.json").write_text(json.dumps([{"passage": "", "name": "", "options": ["a", "b"], "truth": "B"}]))
    path.write_text(path.read_text().replace("rows.csv", "rows.json"))
    task = tasks.load(str(path))
    (doc,) = dataset.task_documents(task, "train")
    assert (task.metric, answers(task, doc), task.gold(doc)) == ("f1", ["a", "b"], 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("gold: truth", "golds: truth"), "golds: expected one of data, prompt"),
        (("gold: truth\n", ""), "expected gold, got data, prompt"),
        (("first: 1", "first: 2"), "first: expected 0 or 1, got '2'"),
        (("listed: true", "listed: maybe"), "listed: expected true or false"),
        (("[no, yes]", "[no]"), "choices: expected at least"),
        (("{name}", "{name.x}"), "prompt: expected names of fields in braces, got 'name.x'"),
        (("{name}", "{name"), "prompt: expected fields in braces"),
        (("listed: true", "metric: bleu"), "metric: expected accuracy, f1, matthews"),
        ((YAML, "[1, 2"), "expected YAML"),
        ((YAML, "- 1"), "expected the settings of a task"),
    ],
)
def test_a_malformed_yaml_file_names_the_key(change, text, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(YAML.replace(*change))
    with pytest.raises(UserError) as error:
        tasks.load(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert text in str(error.value)


def test_own_tasks_are_evaluated_and_shown(tmp_path, capsys):
    path, tokenizer = write_lines(tmp_path / "own.jsonl", *ROWS[:4]), small_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), im_end_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    docs = dataset.task_documents(tasks.load(str(path)), "validation")
    report = evaluate(model, tokenizer, tasks.load(str(path)), docs)
    assert (report.task, report.n) == ("own", 4)
    assert main(["tasks", str(path), "--show", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("{B. steam}[<|im_end|>]") == 2  # right for the first record, wrong for the second
    assert "--- record 1, right answer" in text
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert main(["tasks", "glue/sst2", "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "{positive}[<|im_end|>]" in capsys.readouterr().out
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in tasks.names())


def test_the_description_of_a_task_is_part_of_its_fingerprint(tmp_path):
    (tmp_path / "rows.csv").write_text("passage,name,truth\nSnow is white.,Ann,2\n")
    path = tmp_path / "task.yaml"
    path.write_text(YAML)
    records = dataset.load(f"task:{path}", "preference")
    path.write_text(YAML + "system: Be brief.\n")
    assert fingerprint(dataset.load(f"task:{path}", "preference")) != fingerprint(records)
    with pytest.raises(UserError, match=r"task\.yaml: the file changed during the run"):
        records[0]
    path.write_text(YAML)
    assert fingerprint(dataset.load(f"task:{path}", "preference")) == fingerprint(records)
    assert records[0].chosen[-1]["content"] == "B. yes"
