"""Many clients of a server at once: errors, latency, memory, and answers compared with those of the library.

    dph serve runs/align --port 8000 &
    python -m benchmarks.serve_load http://127.0.0.1:8000 --clients 64 --seconds 120
    python -m benchmarks.serve_load http://127.0.0.1:8000 --prompts prompts.txt --model runs/align --compare 50

Each client sends one request after another: chat completions with several candidates, a third of them as streams, and
every eighth a ranking of its candidates. Memory is the server's, from its /metrics, after a tenth of the time and at
the end. With ``--model`` the answers to some requests are compared with those of ``dph.best_of_n`` in this process.
Exits with 1 if a request failed or an answer differs.
"""

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dph.evaluate.tables import table

PROMPTS = ("Name a prime number.", "3 + 4 =", "Why is the sky blue?", "Write one line about rain.", "2, 4, 6, ")


@dataclass
class Load:
    """What the clients have seen."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)  # JSON of a request -> text
    sampled: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, seconds: float, error: str | None = None) -> None:
        with self.lock:
            self.seconds.setdefault(kind, []).append(seconds)
            if error is not None:
                self.errors.append(f"{kind}: {error}")


def exchange(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> str:
    """Return the body of a response. Raises RuntimeError for another status than 200."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content[:300]}")
    return content


def streamed(content: str) -> str:
    """Return the text of a stream. Raises RuntimeError if it has an error, or no end."""
    lines = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
    if lines[-1] != "[DONE]":
        raise RuntimeError(f"a stream without its end: {lines[-1][:300]}")
    text = ""
    for line in lines[:-1]:
        for choice in json.loads(line)["choices"]:
            text += choice["delta"].get("content", "")
    return text


def client(number: int, address: tuple[str, int], model: str, options: argparse.Namespace, end: float, load: Load):
    """Send requests until ``end``."""
    rng, connection = random.Random(number), http.client.HTTPConnection(*address, timeout=600)
    turn = 0
    while time.monotonic() < end:
        turn += 1
        prompt = rng.choice(options.prompts)
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages, "seed": rng.randrange(options.seeds), "best_of": options.best_of}
        body |= {"max_tokens": options.max_tokens}
        kind = "stream" if turn % 3 == 0 else "whole"
        start = time.monotonic()
        try:
            content = exchange(connection, "/v1/chat/completions", {**body, "stream": kind == "stream"})
            text = streamed(content) if kind == "stream" else json.loads(content)["choices"][0]["message"]["content"]
            load.add(kind, time.monotonic() - start)
            key = json.dumps(body)
            with load.lock:
                if load.answers.setdefault(key, text) != text:
                    load.errors.append(f"two answers to one request: {text!r}, {load.answers[key]!r}")
            if turn % 8 == 0 and options.rerank:
                kind, start = "rerank", time.monotonic()
                exchange(connection, "/v1/rerank", {"query": prompt, "documents": [text, "yes", "no"]})
                load.add(kind, time.monotonic() - start)
        except (RuntimeError, OSError, http.client.HTTPException, ValueError, KeyError) as error:
            load.add(kind, time.monotonic() - start, f"{type(error).__name__}: {error}")
            connection.close()


def figure(address: tuple[str, int], name: str) -> float:
    """Return a number of /metrics."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    connection.request("GET", "/metrics")
    for line in connection.getresponse().read().decode().splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    return float("nan")


def compare(load: Load, options: argparse.Namespace) -> int:
    """Return how many of some answers differ from the library's."""
    import torch

    import dph
    from dph.devices import inference_dtype
    from dph.model.loading import load_model, load_tokenizer

    dtype = getattr(torch, inference_dtype("auto", "cpu"))  # as the server chooses it
    model, tokenizer = load_model(options.model, dtype=dtype).eval(), load_tokenizer(options.model)
    if options.head:
        from dph.cli.common import add_heads

        (head,) = add_heads(model, options.head)
    else:
        head = next(iter(model.head_names), None)
    keys = random.Random(0).sample(sorted(load.answers), min(options.compare, len(load.answers)))
    wrong = 0
    for key in keys:
        body = json.loads(key)
        best = dph.best_of_n(
            model, tokenizer, body["messages"], body["best_of"], head=head, seed=body["seed"],
            max_new_tokens=body["max_tokens"],
        )[0]  # fmt: skip
        if best.text != load.answers[key]:
            wrong += 1
            print(f"differs: {key}: server {load.answers[key]!r}, library {best.text!r}")
    print(f"{len(keys)} answers compared with the library's: {wrong} differ")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--best-of", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1000, help="different seeds")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on each line")
    parser.add_argument("--model", help="the server's model, to compare answers with the library's")
    parser.add_argument("--head", help="as of dph serve")
    parser.add_argument("--compare", type=int, default=20, help="answers to compare")
    options = parser.parse_args()
    options.prompts = Path(options.prompts).read_text().splitlines() if options.prompts else PROMPTS
    url = urlsplit(options.url)
    address = url.hostname, url.port or 80
    connection = http.client.HTTPConnection(*address, timeout=600)
    connection.request("GET", "/v1/models")
    (about,) = json.loads(connection.getresponse().read())["data"]
    options.rerank = bool(about["heads"])

    load, start = Load(), time.monotonic()
    end = start + options.seconds
    threads = []
    for number in range(options.clients):
        threads.append(threading.Thread(target=client, args=(number, address, about["id"], options, end, load)))
        threads[-1].start()
    time.sleep(options.seconds / 10)
    memory, before = "process_resident_memory_bytes", time.monotonic() - start
    first = figure(address, memory)
    for thread in threads:
        thread.join()
    seconds, last = time.monotonic() - start, figure(address, memory)
    rows = []
    for kind, values in sorted(load.seconds.items()):
        ordered = sorted(values)
        rows.append([
            kind, len(values), len(values) / seconds, statistics.median(values), ordered[int(0.95 * len(values))],
            ordered[-1],
        ])  # fmt: skip
    print(table(["request", "number", "per second", "median s", "95 % s", "longest s"], rows))
    jobs = figure(address, "dph_jobs")
    print(f"{options.clients} clients, {seconds:.0f} s, {len(load.errors)} errors, jobs left: {jobs:g}")
    print(f"memory: {first / 2**20:.0f} MiB after {before:.0f} s, {last / 2**20:.0f} MiB at the end")
    for error in load.errors[:10]:
        print(error)
    wrong = compare(load, options) if options.model else 0
    return int(bool(load.errors or wrong))


if __name__ == "__main__":
    raise SystemExit(main())
