"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from dph.serve.responses import finish_reason

if TYPE_CHECKING:
    from dph.infer.best_of_n import Candidate
    from dph.serve.engine_thread import EngineThread

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server; also those of its process, such as its memory (Linux)."""

    def __init__(self, engine: EngineThread) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dph_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "dph_request_seconds", "time of a request", ["route"], buckets=SECONDS, registry=registry
        )
        self._tokens = Counter(
            "dph_tokens", "tokens of prompts, answers, and judged answers", ["kind"], registry=registry
        )
        self._candidates = Counter("dph_candidates", "sampled candidates", ["finish_reason"], registry=registry)
        jobs = Gauge("dph_jobs", "requests that the engine works on or that wait for it", registry=registry)
        jobs.set_function(lambda: engine.jobs)

    def sampled(self, prompt: int, sampled: int, candidates: Sequence[Candidate]) -> None:
        """Count the tokens of a prompt, those of its candidates, and these."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("sampled").inc(sampled)
        for one in candidates:
            self._candidates.labels(finish_reason(one.finished, one.pruned)).inc()

    def judged(self, tokens: int) -> None:
        """Count the tokens of answers that were scored or ranked."""
        self._tokens.labels("judged").inc(tokens)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
