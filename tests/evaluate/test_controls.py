"""Chance controls: figures that know nothing are chance, and the order of choices means nothing."""

import random

import numpy as np
import pytest
from helpers.command_line import save_models

from dph import tasks
from dph.evaluate.choices import choice_scores, encoded_choices, evaluate, report
from dph.model.loading import load_model, load_tokenizer

WORDS = ["a", "gripping", "film", "is", "watchable", "the", "not", "positive", "or", "negative"]
CHOICES = 4
TASK = tasks.load("hellaswag/no_choice")  # whose prompt does not list the choices


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = save_models(tmp_path_factory.mktemp("models")) / "judge"
    return load_model(folder), load_tokenizer(str(folder))


def documents(count, seed=0):
    """Questions of four choices with random labels."""
    rng = random.Random(seed)
    text = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
    docs = []
    for _ in range(count):
        endings = [text(5) for _ in range(CHOICES)]
        docs.append({**TASK.example, "ctx": text(6), "endings": endings, "label": str(rng.randrange(CHOICES))})
    return docs


def test_random_labels_give_chance(judge):
    found = evaluate(*judge, TASK, documents(400))
    for row in found.rows:
        accuracy = row.metrics["accuracy"]
        assert accuracy.low <= 1 / CHOICES <= accuracy.high, row.method


def test_permuted_choices_permute_scores(judge):
    model, tokenizer = judge
    docs = documents(12, seed=1)
    order = [2, 0, 3, 1]
    permuted = []
    for doc in docs:
        permuted.append({**doc, "endings": [doc["endings"][i] for i in order]})
    scores = []
    for some in (docs, permuted):
        judged = model.judge(encoded_choices(TASK, some, tokenizer))
        scores.append([choice_scores(one, ["default", "short"], "") for one in judged])
    for plain, other in zip(*scores, strict=True):
        for method, values in plain.items():
            assert [values[i] for i in order] == pytest.approx(other[method], abs=1e-5), method


@pytest.mark.parametrize("gold", ["first", "last", "random"])
def test_a_judge_without_an_opinion_scores_chance_wherever_the_right_choice_stands(gold):
    rng = np.random.default_rng(0)
    references = {"first": [0] * 60, "last": [3] * 60, "random": rng.integers(0, CHOICES, 60).tolist()}[gold]
    found = report(TASK, [{"none": [0.5] * CHOICES}] * 60, references)
    assert found.rows[0].metrics["accuracy"].value == pytest.approx(1 / CHOICES)
    assert found.rows[0].ties == 60
