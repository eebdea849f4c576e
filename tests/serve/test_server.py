"""A server in a process of its own: many clients, slow ones, those that leave, and its end."""

import json
import signal
import socket
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.server_process import Server
from helpers.serving import CHAT, QUESTION

import dph


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(models / "judge", log, "--body-timeout", 1, "--max-tokens", 1024) as server:
        yield server


def test_64_clients_get_the_answers_of_the_library(server, opened):
    bodies = [{**CHAT, "best_of": 1 + seed % 4, "seed": seed} for seed in range(64)]
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(server.post, bodies))
    for body, result in zip(bodies, results, strict=True):
        best = dph.best_of_n(*opened, QUESTION, body["best_of"], seed=body["seed"], max_new_tokens=8)[0]
        assert result["choices"][0]["message"]["content"] == best.text


def received(server, content, seconds=30):
    """Everything that the server sends on a connection until it closes it."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n"
)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (HEAD + b"\r\n{", b"HTTP/1.1 408 "),
        (HEAD + b"Connection: keep-", b""),
        (b"", b""),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
    ],
)
def test_slow_clients_are_cut_off(server, content, answer):
    start = time.monotonic()
    assert received(server, content).startswith(answer)
    assert time.monotonic() - start < 25


def test_an_oversized_body_is_refused_while_it_is_sent(server):
    head = HEAD.replace(b"100", b"9999999")
    assert b"413 " in received(server, head + b"\r\n" + b"x" * 2_000_000)


def test_requests_of_clients_that_leave_are_dropped(server):
    body = {**CHAT, "max_tokens": 900, "best_of": 10, "temperature": 0.3}
    for path in ("/v1/chat/completions", "/v1/candidates"):
        content = json.dumps(body).encode()
        head = HEAD.replace(b"100", str(len(content)).encode()).replace(b"/v1/chat/completions", path.encode())
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"\r\n" + content)
            server.wait_for("dph_jobs", 1.0)
        server.wait_for("dph_jobs", 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_waits_for_requests_and_refuses_new_ones(models, tmp_path, number):
    with Server(models / "judge", tmp_path / "log", "--name", "judge") as server:
        body = {**CHAT, "max_tokens": 300, "best_of": 4, "temperature": 0.3, "stream": True}
        results = []
        client = threading.Thread(target=lambda: results.append(server.post(body)))
        client.start()
        server.wait_for("dph_jobs", 1.0)
        assert server.stop(number) == 0
        client.join()
        (text,) = results
        assert text.endswith("data: [DONE]\n\n")
        with pytest.raises(OSError, match="refused"):
            server.post(CHAT)
        log = server.log.read_text()
        assert "POST /v1/chat/completions 200" in log
        assert "Traceback" not in log


def refusal(server, body):
    """Status and code of the error of a request."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(body)
    return caught.value.code, json.load(caught.value)["error"]["code"]


def test_a_bounded_end(models, tmp_path):
    with Server(models / "judge", tmp_path / "log", "--stop-timeout", 1, "--max-tokens", 8000) as server:
        body = {**CHAT, "max_tokens": 7000, "best_of": 2, "temperature": 0.3}
        with ThreadPoolExecutor(1) as pool:
            dropped = pool.submit(refusal, server, body)
            server.wait_for("dph_jobs", 1.0)
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 30
            assert dropped.result() == (503, "stopping")
        assert "Traceback" not in server.log.read_text()
