"""The application: routes, errors and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from dph.errors import printable
from dph.serve import responses
from dph.serve.bodies import Candidates, Chat, Rerank, Score, parse
from dph.serve.http import ClientGone, Gate, error_response, read_body, unless_gone
from dph.serve.jobs import Ended, Event, Piece, Ranked
from dph.serve.limits import ApiError, origin
from dph.serve.metrics import Metrics

if TYPE_CHECKING:
    from dph.serve.service import Asked, Service

log = logging.getLogger(__name__)
NO_STORE = {"Cache-Control": "no-store"}


def application(service: Service, *, key: str | None = None, loopback: bool = True, log_text: bool = False) -> ASGIApp:
    """Return the server's application.

    Args:
        service: the model and its limits; started and stopped with the application.
        key, loopback: see :class:`dph.serve.http.Gate`.
        log_text: whether the log may hold prompts and answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.api = Api(service, log_text)
    app.include_router(router)
    for kind in (ApiError, ClientGone, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return Gate(app, service.limits, app.state.api.metrics, key, loopback)


class Api:
    """State of the routes."""

    def __init__(self, service: Service, log_text: bool) -> None:
        self.service, self.log_text = service, log_text
        self.metrics = Metrics(service.engine)
        self.started = int(time.time())
        self.page = resources.files("dph.serve").joinpath("page.html").read_text(encoding="utf-8")
        self.page_headers = {**NO_STORE, "Content-Security-Policy": content_policy(self.page)}

    def finished(self, asked: Asked, ranked: Ranked) -> None:
        """Count a request's candidates, and log them if that is allowed."""
        self.metrics.sampled(len(asked.request.prompt), ranked.sampled_tokens, ranked.candidates)
        if self.log_text:
            log.info("answer: %s", printable(ranked.candidates[0].text, keep=""))

    def prompted(self, body: Candidates) -> None:
        """Log a prompt if that is allowed."""
        if self.log_text:
            log.info("prompt: %s", printable(body.messages[-1].content, keep=""))

    def failed(self, error: Exception) -> ApiError:
        """Return the error for the client; others than those of its request are logged, without text of users."""
        if isinstance(error, ApiError):
            return error
        log.error("a request failed: %s%s", origin(error), f": {error}" if self.log_text else "")
        message = f"{type(error).__name__} while the model worked on this request; the server's log has more"
        return ApiError(500, message, code="failed")


router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation with the best of the sampled candidates."""
    api: Api = request.app.state.api
    body = parse(await read_body(request, api.service.limits), Chat)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: expected stream with it, got none", param="stream_options")
    max_tokens = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if max_tokens == "max_completion_tokens" and body.max_tokens not in (None, body.max_completion_tokens):
        raise ApiError(400, "max_tokens, max_completion_tokens: expected one of them, got two")
    asked = await unless_gone(request, api.service.candidates(body, body.n, max_tokens))
    api.prompted(body)
    completion = responses.Completion(api.service.name, len(asked.request.prompt), body.return_candidates)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _stream(api, _chat_events(api, asked, completion, with_usage))

    async def whole() -> dict[str, Any]:
        async with api.service.generation(asked, live=False) as events:
            ranked = await anext(events)
        api.finished(asked, ranked)
        return completion.whole(ranked, asked.n)

    return await _work(api, request, whole())


async def _chat_events(
    api: Api, asked: Asked, completion: responses.Completion, with_usage: bool
) -> AsyncIterator[str]:
    """Yield the events of a stream: of a single candidate live, otherwise of the best ones at the end."""
    is_live = asked.choice.n == 1
    async with api.service.generation(asked, live=is_live) as events:
        for index in range(asked.n):
            yield completion.beginning(index)
        async for event in events:
            if isinstance(event, Piece | Ended) and event.text:
                yield completion.piece(0, event.text)
            if isinstance(event, Ranked):
                ranked = event
    api.finished(asked, ranked)
    for index, one in enumerate(ranked.candidates[: asked.n]):
        for piece in () if is_live else completion.pieces(index, one.text):
            yield piece
        yield completion.ending(index, one)
    for event in completion.last(ranked, with_usage):
        yield event


@router.post("/v1/candidates")
async def candidates(request: Request) -> Response:
    """Stream all candidates of a prompt while they grow, for the page: events start, piece, candidate and ranking."""
    api: Api = request.app.state.api
    body = parse(await read_body(request, api.service.limits), Candidates)
    asked = await unless_gone(request, api.service.candidates(body))
    api.prompted(body)
    return _stream(api, _candidate_events(api, asked))


async def _candidate_events(api: Api, asked: Asked) -> AsyncIterator[str]:
    choice = asked.choice
    yield responses.data(
        {
            "type": "start",
            "best_of": choice.n,
            "head": choice.head,
            "seed": asked.request.seed,
            "tokens": len(asked.request.prompt),
        }
    )
    async with api.service.generation(asked, live=True) as events:
        async for event in events:
            yield responses.data(_candidate_event(api, asked, event))
    yield "data: [DONE]\n\n"


def _candidate_event(api: Api, asked: Asked, event: Event) -> dict[str, Any]:
    if isinstance(event, Piece):
        return {"type": "piece", "index": event.index, "text": event.text}
    if isinstance(event, Ended):
        answer, head = event.answer, asked.choice.head
        reward = answer.rewards.get(head)
        probability = None if reward is None else api.service.probabilities(head, [reward])[0]
        end = responses.finish_reason(answer.finished, answer.pruned)
        numbers = {"reward": reward, "probability": probability, "logprob": responses.number(answer.logprob)}
        return {"type": "candidate", "index": event.index, "text": event.text, "finish_reason": end, **numbers}
    api.finished(asked, event)
    return {"type": "ranking", "order": event.indices, "sampled_tokens": event.sampled_tokens}


@router.post("/v1/score")
async def score(request: Request) -> Response:
    """Return the rewards of conversations by head."""
    api: Api = request.app.state.api
    body = parse(await read_body(request, api.service.limits), Score)

    async def work() -> dict[str, Any]:
        answers = await api.service.score(body)
        rewards = await api.service.rewards(answers)
        api.metrics.judged(answers.tokens)
        heads = body.heads or api.service.heads
        probabilities = {head: api.service.probabilities(head, rewards.rewards[head]) for head in heads}
        return responses.scores(api.service.name, heads, rewards, probabilities, answers.tokens)

    return await _work(api, request, work())


@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request) -> Response:
    """Rank documents by their rewards as answers to a query."""
    api: Api = request.app.state.api
    body = parse(await read_body(request, api.service.limits), Rerank)

    async def work() -> dict[str, Any]:
        head, answers = await api.service.rerank(body)
        rewards = (await api.service.rewards(answers)).rewards[head]
        api.metrics.judged(answers.tokens)
        return responses.ranking(
            api.service.name, body.documents, rewards, body.top_n, body.return_documents, answers.tokens
        )

    return await _work(api, request, work())


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Return the one model, with its heads and limits."""
    return {"object": "list", "data": [_model(request.app.state.api)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Return the model. Raises ApiError (404) for another name."""
    api: Api = request.app.state.api
    api.service.check_model(name)
    return _model(api)


def _model(api: Api) -> dict[str, Any]:
    service = api.service
    limits = {"tokens": service.longest, "candidates": service.limits.candidates}
    about = {"heads": list(service.heads), "calibrated": sorted(service.calibrated), "limits": limits}
    return {"id": service.name, "object": "model", "created": api.started, "owned_by": "dph", **about}


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Return whether requests are answered (200) or not (503)."""
    is_alive = request.app.state.api.service.engine.is_alive
    return JSONResponse({"status": "ok" if is_alive else "stopping"}, 200 if is_alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return figures for Prometheus."""
    return Response(request.app.state.api.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/")
async def page(request: Request) -> HTMLResponse:
    """Return the page."""
    api: Api = request.app.state.api
    return HTMLResponse(api.page, headers=api.page_headers)


async def _work(api: Api, request: Request, work: Awaitable[dict[str, Any]]) -> JSONResponse:
    """Return the result of ``work`` as JSON; it is dropped if the client goes away."""
    try:
        return JSONResponse(await unless_gone(request, work))
    except ClientGone:
        raise
    except Exception as error:
        raise api.failed(error) from None


def _stream(api: Api, events: AsyncIterator[str]) -> StreamingResponse:
    """Return events as a response; an error is the last one."""

    async def guarded() -> AsyncIterator[str]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield event
            except Exception as error:
                yield responses.data(api.failed(error).body())

    return StreamingResponse(guarded(), media_type="text/event-stream", headers=NO_STORE)


async def _on_error(_: Request, error: Exception) -> Response:
    """Return an error in OpenAI's form."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # for the log
    if isinstance(error, HTTPException):
        error = ApiError(
            error.status_code, f"{error.detail}: see /v1/models, /v1/chat/completions, /v1/score, /v1/rerank"
        )
    if not isinstance(error, ApiError):
        error = ApiError(500, f"{type(error).__name__} in the server; its log has more", code="failed")
    return error_response(error)


def content_policy(html: str) -> str:
    """Return a Content-Security-Policy that allows the page's own script and style, and requests to this server."""
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "img-src data:"]
    rules.append("frame-ancestors 'none'")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(rules)
