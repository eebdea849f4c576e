"""Every data set of the paper, rendered as its own code does."""

import json
import sys
import types

import pytest
from helpers.texts import write_lines

from dph import chat, tasks
from dph.data.dataset import task_documents
from dph.errors import UserError
from dph.tasks import squad

SPEC = [
    "glue/cola",
    "glue/mnli",
    "glue/mnli_matched",
    "glue/mnli_mismatched",
    "glue/mrpc",
    "glue/qnli",
    "glue/qqp",
    "glue/rte",
    "glue/sst2",
    "glue/stsb",
    "glue/wnli",
    "glue/ax",
    "hellaswag/no_choice",
    "hellaswag/choice",
    "openbookqa/main",
    "winogrande/no_choice",
    "arc/easy",
    "arc/challenge",
    "boolq",
    "copa",
    "piqa",
    "race/all",
    "race/middle",
    "race/high",
    "mmlu/all",
    "squad/v1.1",
    "squad/v2",
    "sciq/no_choice",
    "coqa/all",
    "cnn_dailymail/3.0.0",
    "tinystories/instruct",
    "tinystories/summary",
    "alpaca/cleaned",
    "orca/openorca",
    "orca/dpo_pairs",
    "ultrafeedback/binarized",
]


def test_renderings_are_those_of_the_papers_code(shared):
    records = json.loads((shared / "golden/tasks.json").read_text())
    assert len(records) == 45
    for record in records:
        task, doc = tasks.load(record["task"]), record["doc"]
        for field in ("targets", "distractors", "choices"):
            if record[field] is not None:
                assert getattr(task, field)(doc) == record[field], (record["task"], field)
        gold = task.gold(doc)
        assert (type(gold), gold) == (type(record["gold"]), record["gold"]), record["task"]


def test_all_tasks_of_the_specification_are_there():
    assert sorted(tasks.names()) == sorted(SPEC)


@pytest.mark.parametrize("name", SPEC)
def test_an_entry_is_complete_and_its_example_renders(name):
    task = tasks.load(name)
    assert task.name == name
    assert "/" in task.hub
    assert task.splits.keys() <= {"train", "validation", "test", "fewshot"}
    assert "train" in task.splits or task.evaluated in task.splits
    assert set(task.fields) <= task.example.keys()
    targets, distractors, choices = (getattr(task, f)(task.example) for f in ("targets", "distractors", "choices"))
    assert targets
    for turns in targets + distractors + choices:
        chat.check(turns)
        assert [turn["role"] for turn in turns[:2]] == ["system", "user"]
        assert turns[-1]["role"] == "assistant"
    assert bool(choices) == (task.metric is not None) == (task.gold(task.example) is not None)
    if choices:
        assert len(targets) == 1
        assert len(distractors) == len(choices) - 1
        assert choices[round(task.gold(task.example))] == targets[0]
        assert task.evaluated in task.splits
    assert task.paired == bool(distractors)


@pytest.mark.parametrize("name", [n for n in SPEC if tasks.load(n).metric and n != "sciq/no_choice"])
def test_a_hidden_label_hides_the_answers_and_keeps_the_choices(name):
    task = tasks.load(name)
    key = next(k for k in ("label", "answerKey", "answer") if k in task.example)
    bare = {k: v for k, v in task.example.items() if k != key}
    for hidden in (bare, bare | {key: "" if isinstance(task.example[key], str) else -1}):
        assert (task.gold(hidden), task.targets(hidden), task.distractors(hidden)) == (None, [], [])
        assert task.choices(hidden) == task.choices(task.example)


def test_errors_name_the_task():
    with pytest.raises(UserError, match=r"got 'glue/sst'; the nearest is 'glue/sst2'"):
        tasks.load("glue/sst")
    with pytest.raises(UserError, match=r"task glue/cola: expected the fields sentence, got a record with text"):
        tasks.load("glue/cola").choices({"text": "a"})
    with pytest.raises(UserError, match=r"task glue/cola: expected one of the labels 0 to 1, got 2"):
        tasks.load("glue/cola").targets({"sentence": "a", "label": 2})
    for name, key, wrong, expected in (
        ("winogrande/no_choice", "answer", "0", "expected one of the labels 0 to 1, got -1"),
        ("winogrande/no_choice", "answer", "x", "invalid literal"),
        ("arc/easy", "answerKey", "Z", "'Z' is not in list"),
    ):
        task = tasks.load(name)
        with pytest.raises(UserError, match=f"task {name}: {expected}"):
            task.targets(task.example | {key: wrong})
    with pytest.raises(UserError, match=r"task glue/ax: expected split test, got 'train'"):
        task_documents(tasks.load("glue/ax"), "train")


def test_documents_come_from_a_folder(tmp_path):
    docs = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]
    write_lines(tmp_path / "glue/cola/validation.jsonl", *docs)
    assert list(task_documents(tasks.load("glue/cola"), "validation", tmp_path)) == docs
    with pytest.raises(UserError, match=r"glue/cola/train\.jsonl"):
        task_documents(tasks.load("glue/cola"), "train", tmp_path)


def test_documents_come_from_the_hub_by_name_config_and_split(monkeypatch):
    calls = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or [{"question": "q"}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(task_documents(tasks.load("mmlu/all"), "train")) == [{"question": "q"}]
    assert calls == [(("cais/mmlu", "all"), {"split": "auxiliary_train"})]

    def refuse(*args, **kwargs):
        raise ConnectionError("no\nroute")

    fake.load_dataset = refuse
    with pytest.raises(UserError, match=r"nyu-mll/glue \(mnli\), split validation_matched: no route"):
        task_documents(tasks.load("glue/mnli"), "validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets package: pip install -e '\.\[data\]'$"):
        task_documents(tasks.load("glue/mnli"), "validation")


UNANSWERABLE = {"title": "t", "context": "The cat saw a dog and the cat.", "question": "?", "answers": {"text": []}}


@pytest.fixture
def fresh_spacy():
    squad._spacy_model.cache_clear()
    squad.noun_phrases.cache_clear()
    yield
    squad._spacy_model.cache_clear()
    squad.noun_phrases.cache_clear()


@pytest.mark.usefixtures("fresh_spacy")
def test_squad_sets_noun_phrases_against_unanswerable(monkeypatch):
    fake = types.ModuleType("spacy")
    chunks = [types.SimpleNamespace(text=text) for text in ("The cat", "a dog", "The cat")]
    fake.load = lambda name: lambda text: types.SimpleNamespace(noun_chunks=chunks)
    monkeypatch.setitem(sys.modules, "spacy", fake)
    task = tasks.load("squad/v2")
    assert [turns[-1]["content"] for turns in task.distractors(UNANSWERABLE)] == ["The cat", "a dog"]
    assert [turns[-1]["content"] for turns in task.targets(UNANSWERABLE)] == ["unanswerable"]


@pytest.mark.usefixtures("fresh_spacy")
@pytest.mark.parametrize("present", [False, True])
def test_squad_without_spacy_or_its_model_says_how_to_get_it(monkeypatch, present):
    fake = types.ModuleType("spacy") if present else None
    if present:

        def refuse(name):
            raise OSError(name)

        fake.load = refuse
    monkeypatch.setitem(sys.modules, "spacy", fake)
    with pytest.raises(UserError, match="pip install spacy && python -m spacy download en_core_web_md"):
        tasks.load("squad/v2").distractors(UNANSWERABLE)


def test_ultrafeedback_takes_the_answer_and_drops_pairs_without_a_difference(tmp_path):
    task = tasks.load("ultrafeedback/binarized")
    same = task.example | {"rejected": task.example["chosen"]}
    write_lines(tmp_path / "ultrafeedback/binarized/train.jsonl", same, task.example, same)
    docs = task_documents(task, "train", tmp_path)
    assert list(docs) == [task.example]
    assert [turns[-1]["content"] for turns in task.targets(docs[0]) + task.distractors(docs[0])] == ["Hi!", "No."]
