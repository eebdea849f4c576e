"""Requests to the server."""

import json

QUESTION = [{"role": "user", "content": "a film?"}]
CHAT = {"model": "judge", "messages": QUESTION, "max_tokens": 8, "seed": 3}
SCORE = {"conversations": [[*QUESTION, {"role": "assistant", "content": "is gripping"}]]}
RERANK = {"query": "a film?", "documents": ["is gripping", "is not", "watchable film"]}
PATHS = {"/v1/chat/completions": CHAT, "/v1/candidates": CHAT, "/v1/score": SCORE, "/v1/rerank": RERANK}


def without(body, name):
    return {key: value for key, value in body.items() if key != name}


def answered(client, body, path="/v1/chat/completions"):
    """The JSON of a request that succeeds."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status):
    """The error of a request that fails with this status, which is one line."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].splitlines() == [error["message"]]
    return error


def events(response):
    """The events of a stream, which ends with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return list(map(json.loads, lines))
