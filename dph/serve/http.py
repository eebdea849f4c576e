"""Checks that every request passes (host, key, number, time), and the reading of its body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dph.errors import one_line
from dph.serve.limits import ApiError, Limits, busy, origin, out_of_time, stopping
from dph.serve.metrics import Metrics

log = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health")  # without a key
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
GRACE = 10.0  # seconds after the time limit, by which a request has to report it
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed the connection."""


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error.body(), error.status, error.headers)


class Gate:
    """ASGI middleware: refuses requests of other hosts, without the key, or too many; ends those that take too long.

    Args:
        app: the application.
        limits: of the number of requests at once and their time.
        metrics: counts requests.
        key: that clients must send as a bearer token; None for none.
        loopback: whether the server listens on a loopback address. The Host header must name one then: a page of
            another site could otherwise reach the server by a host name that resolves to 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, key: str | None, loopback: bool) -> None:
        self._app, self._limits, self._metrics, self._loopback = app, limits, metrics, loopback
        self._key = None if key is None else key.encode()
        self._active = 0  # requests for work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, count it and log a line about it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        is_work = scope["method"] == "POST"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._active += is_work
        try:
            self._check(scope)
            await asyncio.wait_for(self._app(scope, receive, watched), self._limits.seconds + GRACE)
        except ApiError as error:
            await error_response(error)(scope, receive, watched)
        except asyncio.TimeoutError:  # also a client that reads too slowly
            if not status:
                await error_response(out_of_time(self._limits.seconds))(scope, receive, watched)
        except asyncio.CancelledError:  # by uvicorn, once it has waited for the requests that run at its end
            if not status:
                await error_response(stopping())(scope, receive, watched)
        except Exception as error:  # the application has answered; uvicorn would log its text
            log.error("%s", origin(error))
        finally:
            self._active -= is_work
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s %s %.3f s", one_line(scope["method"], most=10), route, status or "no response", seconds)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that is refused before its body is read."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._loopback and name not in LOOPBACK:
            raise ApiError(400, f"Host: expected one of {', '.join(LOOPBACK)}, got {one_line(host, most=80)!r}")
        if scope["path"] in OPEN_PATHS:
            return
        if self._key is not None:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
                message = "Authorization: expected 'Bearer' and this server's API key, got none or another"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and self._active > self._limits.requests:
            raise busy(self._limits.requests)


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request of JSON.

    Raises ApiError: 413 for one that is too large, 408 for one that does not arrive in time, 415 for another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no other site's page can send unasked
        raise ApiError(415, f"Content-Type: expected application/json, got {one_line(kind, most=80)!r}")
    most = limits.body_bytes
    too_large = ApiError(413, f"body: expected at most {most} bytes, got more", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise too_large

    async def read() -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise too_large
        return bytes(content)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"body: expected all of it within {limits.body_seconds:g} s, got a part"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of ``work``, which is cancelled if the client goes away. Raises ClientGone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGone
    finally:
        for task in tasks:
            task.cancel()


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol that also closes connections without a request for ``seconds``, or twice as long.

    That is one whose headers do not arrive: uvicorn itself waits for them without an end.
    """

    class TimedProtocol(H11Protocol):
        """HTTP/1.1 with a bound on the time for a request's headers."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Start to watch the connection."""
            super().connection_made(transport)
            self._watched, self._is_idle = None, False
            self.loop.call_later(seconds, self._watch)

        def _watch(self) -> None:
            if self.transport.is_closing():
                return
            was_idle = self._is_idle and self._watched is self.cycle
            self._watched = self.cycle
            self._is_idle = self.cycle is None or self.cycle.response_complete
            if was_idle and self._is_idle:
                self.transport.close()
            else:
                self.loop.call_later(seconds, self._watch)

    return TimedProtocol
