"""Every data set of the paper, rendered as its own code does."""

import json
import sys
import types

import pytest
from helpers.hub import fake_hub
from helpers.texts import write_lines

from dph import chat, tasks
from dph.data.dataset import task_documents
from dph.errors import UserError, printable
from dph.tasks import squad
from dph.tasks.multiple_choice import ARC as ARC_EXAMPLE

ARC = ARC_EXAMPLE["choices"]
ASK = {"role": "user", "content": "Say hi."}

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
    with pytest.raises(UserError, match=r"got 'gsm8k'; dph tasks lists the names"):
        tasks.load("gsm8k")
    with pytest.raises(UserError, match=r"got 'glue/sst'; the nearest is 'glue/sst2'"):
        tasks.load("glue/sst")
    with pytest.raises(UserError, match=r"task glue/cola: expected the fields sentence, got a record with text"):
        tasks.load("glue/cola").choices({"text": "a"})
    with pytest.raises(UserError, match=r"task glue/cola: label: expected one of the labels 0 to 1, got 2"):
        tasks.load("glue/cola").targets({"sentence": "a", "label": 2})
    for name, key, wrong, expected in (
        ("winogrande/no_choice", "answer", "0", "expected one of the labels 1 to 2, got '0'"),
        ("winogrande/no_choice", "answer", "x", "expected a number, got 'x'"),
        ("winogrande/no_choice", "sentence", "none", r"expected a text with a blank \(_\), got 'none'"),
        ("arc/easy", "answerKey", "Z", "expected one of A, B, C, D, got 'Z'"),
        ("arc/easy", "choices", ARC | {"label": ["A", "B"]}, "expected as many .*, got 4 texts and 2 labels"),
        ("arc/easy", "choices", {"text": ["a"]}, "expected an object with text and label, got one without label"),
        ("race/all", "answer", "BC", "expected one of A, B, C, D, got 'BC'"),
        ("race/all", "options", "ABCD", "expected a list of texts, got 'ABCD'"),
        ("race/all", "options", ["a", {"b": 1}], r"expected text, got {'b': 1}"),
        ("arc/easy", "choices", ARC | {"text": ["a", None, "b", "c"]}, "expected text, got None"),
        ("arc/easy", "choices", [{"text": "a"}], "expected an object with text and label, got one without label"),
        ("arc/easy", "choices", [{"text": "a", "label": "B"}, 1], "expected an object with text and label, got 1"),
        ("arc/easy", "choices", [{"text": "a", "label": "B"}] * 2, "expected different labels, got"),
        ("arc/easy", "choices", [], "expected at least one choice, got none"),
        ("mmlu/all", "answer", "E", "expected one of A, B, C, D, got 'E'"),
        ("mmlu/all", "answer", "b", "expected one of A, B, C, D, got 'b'"),
        ("mmlu/all", "choices", ["a"] * 11, "expected at most 10 texts, got 11"),
        ("mmlu/all", "choices", [], "expected at least 1 text, got none"),
        ("boolq", "label", True, "expected a number, got True"),
        ("boolq", "label", float("nan"), "expected a number, got nan"),
        ("boolq", "label", 10**5000, "expected one of the labels 0 to 1, got an integer of thousands of digits"),
        ("glue/sst2", "sentence", None, "expected text, got None"),
        ("copa", "question", "why", "expected cause or effect, got 'why'"),
        ("coqa/all", "answers", {"input_text": ["a"]}, "expected 2 answers, one for each question, got 1"),
        ("squad/v2", "answers", {"text": "Paris"}, "expected a list of texts, got 'Paris'"),
        ("ultrafeedback/binarized", "chosen", [ASK], "expected the assistant's answer at the end, got a user message"),
    ):
        task = tasks.load(name)
        with pytest.raises(UserError, match=rf"task {name}: {key}.*: {expected}") as caught:
            task.targets(task.example | {key: wrong})
        assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match=r"task glue/ax: expected split test, got 'train'"):
        task_documents(tasks.load("glue/ax"), "train")


HOSTILE = (
    None, True, 5, -1, 1.5, float("nan"), 10**5000, "", "BC", "{sentence}", "\ud800", [], ["a", "b"], [None], [["a"]],
    {}, {"text": "a", "label": "b"}, [{"role": "user", "content": 1}], "99", 99, b"bytes",
)  # fmt: skip


def changed_examples(value):
    """The value with each of its parts, at every depth, replaced in turn by each of ``HOSTILE``."""
    yield from HOSTILE
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        for changed in changed_examples(item):
            copy = value.copy()
            copy[key] = changed
            yield copy


@pytest.mark.parametrize("name", SPEC)
def test_no_field_is_used_before_its_type_is_checked(name, monkeypatch):
    """Every record gives conversations of text or an error of one line."""
    monkeypatch.setattr(squad, "noun_phrases", lambda passage: (passage,))
    task = tasks.load(name)
    errors = []
    for doc in changed_examples(task.example):
        try:
            conversations = [*task.targets(doc), *task.distractors(doc), *task.choices(doc)]
            assert task.keep is None or type(task.keep(doc)) is bool
        except UserError as error:
            errors.append(str(error))
            continue
        for turns in conversations:
            chat.check(turns)
    for error in errors:
        assert error.startswith(f"task {name}: ")
        assert printable(error, keep="") == error
        assert len(error) < 500
    assert len(errors) > 10 * len(task.fields)


def test_documents_come_from_a_folder(tmp_path):
    docs = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]
    write_lines(tmp_path / "glue/cola/validation.jsonl", *docs)
    assert list(task_documents(tasks.load("glue/cola"), "validation", tmp_path)) == docs
    with pytest.raises(UserError, match=r"glue/cola/train\.jsonl"):
        task_documents(tasks.load("glue/cola"), "train", tmp_path)


def test_documents_come_from_the_hub_by_name_config_and_split(monkeypatch):
    calls = []
    load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or [{"question": "q"}]  # noqa: E731
    fake = fake_hub(monkeypatch, load_dataset)
    assert list(task_documents(tasks.load("mmlu/all"), "train")) == [{"question": "q"}]
    assert calls == [(("cais/mmlu", "all"), {"split": "auxiliary_train"})]

    def refuse(*args, **kwargs):
        raise ConnectionError("no\nroute")

    fake.load_dataset = refuse
    with pytest.raises(UserError, match=r"nyu-mll/glue \(mnli\), split validation_matched: no route"):
        task_documents(tasks.load("glue/mnli"), "validation")
    fake_hub(monkeypatch, refuse, reachable=False)
    expected = r"https://huggingface.co cannot be reached .* local files, DIR/TASK/SPLIT.jsonl"
    with pytest.raises(UserError, match=expected):
        task_documents(tasks.load("glue/mnli"), "validation")
    assert not sys.modules["datasets"].config.HF_HUB_OFFLINE
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package datasets: pip install 'dph\[data\]', or give a task's local"
    ):
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


SYSTEM = {"role": "system", "content": "Be kind."}
HI = {"role": "assistant", "content": "Hi!"}


@pytest.mark.parametrize("chosen", [[ASK, HI], [SYSTEM, ASK, HI], [SYSTEM, HI], [HI], [SYSTEM, ASK, HI, ASK, HI]])
def test_ultrafeedback_takes_the_final_answer(chosen):
    task = tasks.load("ultrafeedback/binarized")
    (turns,) = task.targets(task.example | {"chosen": chosen})
    assert turns[-1] == HI


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mmlu/all", {"answer": "B"}),
        ("arc/easy", {"choices": [{"text": t, "label": n} for t, n in zip(ARC["text"], ARC["label"], strict=True)]}),
    ],
)
def test_other_forms_of_the_same_record_render_alike(name, fields):
    task = tasks.load(name)
    assert task.labelled(task.example | fields) == task.labelled(task.example)


def test_ultrafeedback_takes_the_answer_and_drops_pairs_without_a_difference(tmp_path):
    task = tasks.load("ultrafeedback/binarized")
    same = task.example | {"rejected": task.example["chosen"]}
    write_lines(tmp_path / "ultrafeedback/binarized/train.jsonl", same, task.example, same)
    docs = task_documents(task, "train", tmp_path)
    assert list(docs) == [task.example]
    assert [turns[-1]["content"] for turns in task.targets(docs[0]) + task.distractors(docs[0])] == ["Hi!", "No."]
