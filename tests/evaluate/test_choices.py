"""Choices and pairs judged by a small model, and tables."""

import math

import numpy as np
import pytest
import torch

import dph
from dph import chat, tasks
from dph.data import tokenizer
from dph.errors import UserError
from dph.evaluate.choices import evaluate, prefer
from dph.evaluate.metrics import wilson
from dph.evaluate.tables import table

DOCS = [
    {"sentence": "a gripping and moving film", "label": 1},
    {"sentence": "dull", "label": 0},
    {"sentence": "never less than watchable", "label": 1},
]


@pytest.fixture(scope="module")
def tok():
    return tokenizer.from_iterator(["positive or negative? a gripping film is watchable"] * 2, 280)


@pytest.fixture(scope="module")
def model(tok):
    return tiny(tok)


def tiny(tok, **config):
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = dph.Model(dph.ModelConfig(vocab_size=len(tok), num_attention_heads=2, **sizes, **config))
    for parameter in model.parameters():  # large enough that the choices differ
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def test_prefer_counts_ties_half():
    row = prefer("reward", [1.0, 2.0, 0.0, None, 1.0], [0.0, 2.0, 1.0, 0.0, None])
    assert row.accuracy == wilson(1.5, 3)
    assert (row.ties, row.n, row.margin) == (1, 3, 0.0)
    none = prefer("reward", [None], [1.0])
    assert (none.accuracy, none.margin, none.n) == (None, None, 0)
    with pytest.raises(RuntimeError, match=r"reward: pair 1: expected finite numbers, got \[nan, 0.0\]"):
        prefer("reward", [1.0, math.nan], [0.0, 0.0])


def test_choices_equal_those_judged_alone(model, tok):
    task = tasks.load("glue/sst2")
    report = evaluate(model, tok, task, DOCS, max_tokens=200)  # several batches
    assert [row.method for row in report.rows] == ["log-probability", "reward"]
    assert (report.task, report.n, [row.n for row in report.rows]) == ("glue/sst2", 3, [3, 3])
    for row, judge in zip(report.rows, (alone_by_logprob, alone_by_reward), strict=True):
        chosen = [int(np.argmax([judge(model, tok, c) for c in task.choices(doc)])) for doc in DOCS]
        want = np.mean([c == task.gold(doc) for c, doc in zip(chosen, DOCS, strict=True)])
        assert row.metrics["accuracy"].value == want
        assert row.ties == 0


def alone_by_reward(model, tok, conversation):
    return model.score(tok, [conversation]).item()


def alone_by_logprob(model, tok, conversation):
    encoded = chat.encode(conversation, tok)
    targets = [t if on else -100 for t, on in zip(encoded.targets, encoded.score_mask, strict=True)]
    with torch.no_grad():
        logits = model(torch.tensor([encoded.tokens])).logits
    return dph.losses.sequence_logprobs(logits, torch.tensor([targets]), "mean").item()


def test_broken_weights_are_an_error_before_the_last_record(tok):
    model = tiny(tok)
    model.backbone.output_norm.weight.data.fill_(math.nan)
    docs = iter(DOCS * 2)
    with pytest.raises(RuntimeError, match=r"record 0: log-probability: expected finite numbers, got \[nan, nan\]"):
        evaluate(model, tok, tasks.load("glue/sst2"), docs, max_tokens=1)


def test_equal_rewards_share_the_record(tok):
    model = tiny(tok)
    for weight in model.heads["shared"].reward.parameters():
        weight.data.zero_()
    for gold in range(4):
        docs = [{"ctx": "It", "endings": ["is", "is not", "or", "film"], "label": gold}] * 3
        row = evaluate(model, tok, tasks.load("hellaswag/no_choice"), docs).rows[1]
        assert (row.metrics["accuracy"].value, row.ties) == (0.25, 3)


def test_a_record_with_an_empty_choice_is_not_compared_by_the_mean(model, tok):
    docs = [{"ctx": "It", "endings": ["is", second], "label": 0} for second in ("", "or")]
    rows = evaluate(model, tok, tasks.load("hellaswag/no_choice"), docs).rows
    assert [(row.method, row.n) for row in rows] == [("log-probability", 1), ("reward", 2)]
    none = evaluate(model, tok, tasks.load("hellaswag/no_choice"), docs[:1], head=None).rows[0]
    assert (none.n, none.metrics) == (0, {"accuracy": None})


def test_evaluation_refuses(model, tok):
    sst2 = tasks.load("glue/sst2")
    with pytest.raises(UserError, match=r"record 1: expected a label, got none"):
        evaluate(model, tok, sst2, [DOCS[0], DOCS[1] | {"label": -1}])
    with pytest.raises(UserError, match="expected at least one record"):
        evaluate(model, tok, sst2, [])
    with pytest.raises(UserError, match="expected one with choices"):
        evaluate(model, tok, tasks.load("squad/v2"), DOCS)
    with pytest.raises(ValueError, match="expected one of default, got 'helpful'"):
        evaluate(model, tok, sst2, DOCS, head="helpful")
    headless = tiny(tok, reward_heads=())
    with pytest.raises(ValueError, match="got one without"):
        evaluate(headless, tok, sst2, DOCS)
    assert len(evaluate(headless, tok, sst2, DOCS, head=None).rows) == 1


def test_table():
    text = table(["method", "n", "accuracy"], [["reward", 12, 0.5], ["two\nlines", None, 0.25]])
    assert text.splitlines() == [
        "method       n  accuracy",
        "----------  --  --------",
        "reward      12     0.500",
        "two\\nlines   -     0.250",
    ]
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        table(["a", "b"], [[1]])
    assert table(["a"], []) == "a\n-"


@pytest.mark.parametrize(
    ("label", "error"),
    [
        (7, "record 1: task glue/sst2: label: expected one of the labels 0 to 1, got 7"),
        (0.5, "record 1: task glue/sst2: label: expected one of the labels 0 to 1, got 0.5"),
        ("yes", "record 1: task glue/sst2: label: expected a number, got 'yes'"),
        ([1], r"record 1: task glue/sst2: label: expected a number, got \[1\]"),
        ("--1", "record 1: task glue/sst2: label: expected a number, got '--1'"),
        (math.inf, "record 1: task glue/sst2: label: expected a number, got inf"),
        (math.nan, "record 1: task glue/sst2: label: expected a number, got nan"),
    ],
)
def test_a_label_that_is_none_of_the_choices_is_an_error(model, tok, label, error):
    docs = [DOCS[0], {**DOCS[1], "label": label}]
    with pytest.raises(UserError, match=error):
        evaluate(model, tok, tasks.load("glue/sst2"), docs, head=None)
