"""The server's process: its socket, signals and log."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn

from dph.errors import UserError
from dph.model.judging import JudgingModel
from dph.serve.api import application
from dph.serve.engine_thread import EngineThread
from dph.serve.http import timed_protocol
from dph.serve.limits import Limits
from dph.serve.service import Service

BACKLOG = 2048  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; connections are refused until :func:`serve`.

    Raises UserError if the address is unknown or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"--host, --port: expected a free address, got {host} port {port}: {error}") from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Return whether only programs on this machine can connect."""
    return bound.getsockname()[0] in ("::1",) or bound.getsockname()[0].startswith("127.")


def make(
    model: JudgingModel,
    tokenizer: Any,
    name: str,
    heads: Sequence[str],
    limits: Limits,
    *,
    best_of: int = 1,
    cache_bytes: int = 1 << 30,
    **options: Any,
) -> Any:
    """Return the application of a model; arguments as ``Service``, ``EngineThread`` and ``application``."""
    engine = EngineThread(model, tokenizer, limits, cache_bytes)
    return application(Service(engine, tokenizer, name, heads, limits, best_of=best_of), **options)


def serve(app: Any, bound: socket.socket, limits: Limits, stop_seconds: float) -> None:
    """Answer requests until SIGINT or SIGTERM; then finish those that run, for ``stop_seconds`` at most.

    A second SIGINT ends them at once.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again once it has stopped
    config = uvicorn.Config(
        app,
        http=timed_protocol(limits.body_seconds),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(round(limits.body_seconds), 1),
        timeout_graceful_shutdown=max(round(stop_seconds), 1),
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    asyncio.run(uvicorn.Server(config).serve(sockets=[bound]))
