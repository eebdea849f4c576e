"""Refused requests: their status, and one line that names the field."""

import copy
import json
import random
import threading
import time

import pytest
from helpers.serving import CHAT, PATHS, QUESTION, RERANK, SCORE, answered, refused, without

ANSWER = {"role": "assistant", "content": "is gripping"}
LONG = [{"role": "user", "content": "film " * 80}]
CHAT_PATH, SCORE_PATH, RERANK_PATH = "/v1/chat/completions", "/v1/score", "/v1/rerank"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT_PATH, without(CHAT, "model"), 400, "model: expected a value, got none"),
        (CHAT_PATH, without(CHAT, "messages"), 400, "messages: expected a value, got none"),
        (CHAT_PATH, {**CHAT, "model": "gpt"}, 404, "model: expected judge, got 'gpt'"),
        (CHAT_PATH, {**CHAT, "n": 17}, 400, "n: expected a number from 1 to 16, got 17"),
        (CHAT_PATH, {**CHAT, "n": 0}, 400, "n: expected a number from 1 to 16, got 0"),
        (CHAT_PATH, {**CHAT, "n": True}, 400, "n: expected a valid integer, got True"),
        (CHAT_PATH, {**CHAT, "best_of": 17}, 400, "best_of: expected a number from 1 to 16, got 17"),
        (CHAT_PATH, {**CHAT, "n": 3, "best_of": 2}, 400, "best_of: expected at least n (3), got 2"),
        (CHAT_PATH, {**CHAT, "n": 2, "prune_every": 2}, 400, "n: expected 1 with confidence or prune_every"),
        (CHAT_PATH, {**CHAT, "max_tokens": 0}, 400, "max_tokens: expected a whole number of at least 1, got 0"),
        (CHAT_PATH, {**CHAT, "max_tokens": 64}, 400, "messages, max_tokens: expected at most 64 tokens in all"),
        (CHAT_PATH, {**CHAT, "messages": LONG}, 400, "expected at most 64 tokens in all, got a prompt of"),
        (CHAT_PATH, {**CHAT, "max_completion_tokens": 4}, 400, "expected one of them, got two"),
        (CHAT_PATH, {**CHAT, "temperature": -1}, 400, "temperature: expected a finite number of at least 0, got -1"),
        (CHAT_PATH, {**CHAT, "temperature": "hot"}, 400, "temperature: expected a valid number, got 'hot'"),
        (CHAT_PATH, {**CHAT, "top_p": 0}, 400, "top_p: expected a number above 0 and at most 1, got 0"),
        (CHAT_PATH, {**CHAT, "seed": 2**63}, 400, "seed: expected a whole number"),
        (CHAT_PATH, {**CHAT, "stop": ""}, 400, "stop: expected a list of texts that are not empty"),
        (CHAT_PATH, {**CHAT, "stop": ["x" * 257]}, 400, "stop: expected texts of at most 256 characters"),
        (CHAT_PATH, {**CHAT, "head": "nice"}, 400, "head: expected one of default, short, got 'nice'"),
        (CHAT_PATH, {**CHAT, "rank": "best"}, 400, "rank: expected one of reward, logprob, lower_bound, vote"),
        (CHAT_PATH, {**CHAT, "rank": "lower_bound"}, 400, "rank: expected an ensemble"),
        (CHAT_PATH, {**CHAT, "confidence": 0.9}, 400, "head default: expected one with a calibration"),
        (CHAT_PATH, {**CHAT, "logprobs": True}, 400, "logprobs: not supported"),
        (CHAT_PATH, {**CHAT, "presence_penalty": 1}, 400, "presence_penalty: not supported"),
        (CHAT_PATH, {**CHAT, "tools": [{"type": "function"}]}, 400, "tools: not supported"),
        (CHAT_PATH, {**CHAT, "prefix": "x"}, 400, "prefix: not supported"),
        (CHAT_PATH, {**CHAT, "stream_options": {}}, 400, "stream_options: expected stream with it"),
        (CHAT_PATH, {**CHAT, "messages": []}, 400, "messages: expected at least 1, got 0"),
        (CHAT_PATH, {**CHAT, "stop": ["x"] * 17}, 400, "stop: expected at most 16, got 17"),
        (CHAT_PATH, {**CHAT, "messages": [*QUESTION, ANSWER]}, 400, "messages: expected the user's message at the end"),
        (CHAT_PATH, {**CHAT, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role: expected"),
        (
            CHAT_PATH,
            {**CHAT, "messages": [{"role": "user", "content": None}]},
            400,
            "messages[0].content: expected a value",
        ),
        (CHAT_PATH, {**CHAT, "messages": [{**QUESTION[0], "name": "x"}]}, 400, "messages[0].name: not supported"),
        (SCORE_PATH, {**SCORE, "heads": ["nice"]}, 400, "heads: expected one of default, short, got 'nice'"),
        (
            SCORE_PATH,
            {"conversations": [QUESTION]},
            400,
            "conversations[0]: expected the assistant's answer at the end",
        ),
        (SCORE_PATH, {"conversations": [[]]}, 400, "conversations[0]: expected at least one message"),
        (SCORE_PATH, {"conversations": [[*LONG, ANSWER]]}, 400, "conversations[0]: expected at most 64 tokens, got"),
        (SCORE_PATH, {"conversations": []}, 400, "conversations: expected at least 1, got 0"),
        (RERANK_PATH, {**RERANK, "documents": []}, 400, "documents: expected at least 1, got 0"),
        (RERANK_PATH, {**RERANK, "documents": ["x"] * 21}, 400, "documents: expected at most 20, got 21"),
        (RERANK_PATH, {**RERANK, "documents": [{"title": "x"}]}, 400, "documents[0]: expected a valid string"),
        (RERANK_PATH, {**RERANK, "documents": ["film " * 80]}, 400, "documents[0]: expected at most 64 tokens"),
        (RERANK_PATH, {**RERANK, "top_n": 0}, 400, "top_n: expected greater than or equal to 1, got 0"),
        (RERANK_PATH, {**RERANK, "rank_fields": ["x"]}, 400, "rank_fields: not supported"),
    ],
)
def test_bodies(client, path, body, status, message):
    error = refused(client.post(path, json=body), status)
    assert message in error["message"]
    name = message.partition(":")[0]
    assert error["param"] in (None, name)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"", JSON, 400, "body: expected JSON"),
        (b'{"model": ', JSON, 400, "body: expected JSON"),
        (b'{"model": "\xff"}', JSON, 400, "body: expected JSON"),
        (b'{"model": "\\ud83d"}', JSON, 400, "body: expected JSON"),
        (b'{"temperature": NaN}', JSON, 400, "body: expected JSON"),
        (b"[" * 10_000, JSON, 400, "body: expected JSON"),
        (b"[1]", JSON, 400, "body: expected a JSON object, got [1]"),
        (b"x" * 20_001, JSON, 413, "body: expected at most 20000 bytes, got more"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "Content-Type: expected application/json, got 'text/plain'"),
        (b"{}", {**JSON, "Host": "evil.example"}, 400, "Host: expected one of 127.0.0.1, localhost, [::1], got 'evil"),
    ],
)
@pytest.mark.parametrize("path", [CHAT_PATH, RERANK_PATH])
def test_contents_and_headers(client, path, content, headers, status, message):
    assert message in refused(client.post(path, content=content, headers=headers), status)["message"]


def test_a_body_in_chunks_without_its_length(client):
    error = refused(client.post(CHAT_PATH, content=(b"x" * 1000 for _ in range(30)), headers=JSON), 413)
    assert error["code"] == "body_too_large"


def test_other_paths_and_methods(client):
    assert "Not Found" in refused(client.get("/v1/embeddings"), 404)["message"]
    assert "Method Not Allowed" in refused(client.get(CHAT_PATH), 405)["message"]
    assert "model: expected judge" in refused(client.get("/v1/models/a/b"), 404)["message"]


def test_the_key_is_needed_for_all_but_page_and_health(served):
    with served(key="s3cret") as client:
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": b"Bearer \xe9"},
        ):
            for path in ("/v1/models", "/metrics"):
                assert refused(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            refused(client.post(CHAT_PATH, json=CHAT, headers=headers), 401)
        assert client.get("/health").status_code == client.get("/").status_code == 200
        headers = {"Authorization": "Bearer s3cret"}
        assert client.post(CHAT_PATH, json=CHAT, headers=headers).status_code == 200


def test_models_without_heads_answer_but_do_not_score(served):
    with served(heads=()) as client:
        assert answered(client, CHAT)["choices"][0]["reward"] is None
        assert "without" in refused(client.post(SCORE_PATH, json=SCORE), 400)["message"]
        assert "without" in refused(client.post(RERANK_PATH, json=RERANK), 400)["message"]
        assert "got reward" in refused(client.post(CHAT_PATH, json={**CHAT, "rank": "reward"}), 400)["message"]


@pytest.fixture
def blocked(monkeypatch):
    """An event that lets steps of the engine pass once it is set."""
    from dph.infer.pooled_engine import PooledEngine

    event, step = threading.Event(), PooledEngine.step

    def waiting(engine):
        event.wait(20)
        return step(engine)

    monkeypatch.setattr(PooledEngine, "step", waiting)
    yield event
    event.set()


def test_too_many_requests_at_once(served, blocked):
    with served({"requests": 2}) as client:
        results = []
        threads = [threading.Thread(target=lambda: results.append(answered(client, CHAT))) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 20
        while "dph_jobs 2.0" not in client.get("/metrics").text:
            assert time.monotonic() < end
        response = client.post(CHAT_PATH, json=CHAT)
        assert "at most 2 requests at once" in refused(response, 503)["message"]
        assert response.headers["Retry-After"] == "1"
        blocked.set()
        for thread in threads:
            thread.join()
        assert len(results) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_take_too_long(served, stream, monkeypatch):
    from dph.infer.pooled_engine import PooledEngine

    monkeypatch.setattr(PooledEngine, "step", lambda engine: time.sleep(0.02) or [])
    with served({"seconds": 0.1}) as client:
        response = client.post(CHAT_PATH, json={**CHAT, "stream": stream})
        if stream:
            (event,) = [line for line in response.text.splitlines() if "error" in line]
            error = json.loads(event.removeprefix("data: "))["error"]
        else:
            error = refused(response, 504)
        assert (error["code"], error["type"]) == ("timeout", "timeout_error")
        assert "dph_jobs 0.0" in client.get("/metrics").text


def test_a_failing_engine_drops_its_requests_and_is_replaced(served, monkeypatch, caplog):
    from dph.infer.pooled_engine import PooledEngine

    def failing(engine):
        raise RuntimeError("a secret of a user")

    with served() as client:
        with monkeypatch.context() as patch:
            patch.setattr(PooledEngine, "step", failing)
            error = refused(client.post(CHAT_PATH, json=CHAT), 500)
        assert (error["code"], "secret" in error["message"]) == ("failed", False)
        assert answered(client, CHAT)
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("log_text", [False, True])
def test_texts_are_logged_only_if_allowed(served, log_text, caplog):
    caplog.set_level("INFO", "dph.serve")
    body = {**CHAT, "messages": [{"role": "user", "content": "gripping\x1b film"}]}
    with served(log_text=log_text) as client:
        answered(client, body)
        client.post(CHAT_PATH, json={**body, "head": "gripping"})
        client.get("/gripping?gripping")
    assert "POST /v1/chat/completions 200" in caplog.text
    assert ("prompt: gripping\\x1b film" in caplog.text) == log_text
    assert ("gripping" in caplog.text) == log_text


JUNK = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.5,
    "",
    "x" * 300,
    "\0",
    "<|im_end|>",
    [],
    {},
    [[]],
    {"a": 1},
)


def changed(rng, body):
    """A body with up to three values replaced, removed, wrapped or added, or with damaged bytes."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        parent, key = None, None
        value = body
        while isinstance(value, dict | list) and value and (parent is None or rng.random() < 0.6):
            parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value = parent[key]
        if parent is None:
            return b"{}"
        kind = rng.choice(["replace", "remove", "wrap", "add", "double"])
        if kind == "replace":
            parent[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == "remove":
            del parent[key]
        elif kind == "wrap":
            parent[key] = [value]
        elif kind == "double" and isinstance(parent, list):
            parent += parent
        elif isinstance(parent, dict):
            parent[rng.choice(["head", "n", "best_of", "stop", "logprobs", "stream", "top_n", "x"])] = copy.deepcopy(
                rng.choice(JUNK)
            )
    content = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        place = rng.randrange(len(content))
        content[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    return bytes(content)


def test_a_thousand_damaged_bodies(client):
    rng, statuses = random.Random(0), []
    for i in range(1000):
        path = sorted(PATHS)[i % len(PATHS)]
        response = client.post(path, content=changed(rng, PATHS[path]), headers=JSON)
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert 400 <= response.status_code < 500, response.text
            refused(response, response.status_code)
        else:
            assert '"error"' not in response.text
    assert min(statuses.count(200), statuses.count(400)) > 20
    assert answered(client, CHAT)
    assert "dph_jobs 0.0" in client.get("/metrics").text
