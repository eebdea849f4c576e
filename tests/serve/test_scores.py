"""Rewards of conversations and ranking of documents."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import QUESTION, RERANK, SCORE, answered


def conversations(n):
    return [[*QUESTION, {"role": "assistant", "content": f"is gripping {'film ' * (i % 9)}"}] for i in range(n)]


def test_scores_are_those_of_the_library(client, opened):
    model, tokenizer = opened
    asked = conversations(7)
    rows = answered(client, {"conversations": asked}, "/v1/score")["data"]
    for head in ("default", "short"):
        got = [row["rewards"][head] for row in rows]
        assert got == pytest.approx(model.score(tokenizer, asked, head).tolist(), abs=1e-5)
    assert [row["index"] for row in rows] == list(range(7))
    assert rows[0]["probabilities"] == {"default": None, "short": None}
    (row,) = answered(client, {**SCORE, "heads": ["short"]}, "/v1/score")["data"]
    assert row["rewards"].keys() == {"short"}


def test_scores_of_many_clients_are_batched(served, opened, monkeypatch):
    model, _ = opened
    calls, judge = [], model.judge

    def counted(groups, **options):
        calls.append(len(groups))
        return judge(groups, **options)

    monkeypatch.setattr(model, "judge", counted)
    with served() as client, ThreadPoolExecutor(16) as pool:
        asked = conversations(48)
        results = list(pool.map(lambda one: answered(client, {"conversations": [one]}, "/v1/score"), asked))
    assert sum(calls) == 48
    got = [result["data"][0]["rewards"]["default"] for result in results]
    assert got == pytest.approx([one.rewards["default"][0] for one in _judged(opened, asked)], abs=1e-5)


def _judged(opened, asked):
    from dph import chat

    model, tokenizer = opened
    return model.judge([[chat.encode(messages, tokenizer)] for messages in asked])


def test_probabilities_of_a_calibrated_head(served, opened, monkeypatch):
    model, _ = opened
    record = {"calibration": {"midpoint": 0.5, "temperature": 2.0}}
    monkeypatch.setitem(model.head_records, "default", record)
    with served() as client:
        (row,) = answered(client, SCORE, "/v1/score")["data"]
    reward = row["rewards"]["default"]
    assert row["probabilities"] == {"default": pytest.approx(model.probability([reward]).item()), "short": None}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("head", [None, "short"])
def test_documents_are_ranked_by_reward(client, opened, path, head):
    model, tokenizer = opened
    texts = RERANK["documents"]
    answers = [[*QUESTION, {"role": "assistant", "content": text}] for text in texts]
    rewards = model.score(tokenizer, answers, head or "default").tolist()
    documents = [texts[0], {"text": texts[1]}, texts[2]]
    body = {**RERANK, "documents": documents, "model": "judge", **({"head": head} if head else {})}
    results = answered(client, body, path)["results"]
    order = sorted(range(3), key=lambda i: -rewards[i])
    assert [result["index"] for result in results] == order
    assert [result["relevance_score"] for result in results] == pytest.approx([rewards[i] for i in order], abs=1e-5)
    assert [result["document"] for result in results] == [{"text": texts[i]} for i in order]
    (best,) = answered(client, {**body, "top_n": 1, "return_documents": False}, path)["results"]
    assert best == {name: results[0][name] for name in ("index", "relevance_score")}
