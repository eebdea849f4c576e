"""Limits of the server, and the errors that it answers with."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from dph.errors import UserError, one_line

MOST_MESSAGE = 400  # characters of an error's message


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what one client may request.

    Attributes:
        body_bytes: size of a request's body.
        candidates: n and best_of.
        tokens: of a prompt with its longest answer, and of a conversation that is scored.
        documents: conversations to score, or documents to rank, in one request.
        requests: requests that run or wait at once; further ones are refused.
        seconds: time of a request from its arrival to its end.
        body_seconds: time for a request's headers, and for its body, to arrive.
    """

    body_bytes: int = 1 << 20
    candidates: int = 128
    tokens: int = 4096
    documents: int = 1024
    requests: int = 256
    seconds: float = 300.0
    body_seconds: float = 10.0


class ApiError(Exception):
    """An error with its HTTP status, in OpenAI's form.

    Args:
        status: of HTTP.
        message: one line.
        param: field of the body that it is about.
        code: a name for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error as JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = one_line(self, most=MOST_MESSAGE)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refusal(error: ValueError) -> ApiError:
    """Return the answer (400) to input that the library refuses; ``param`` is the name that its message begins with."""
    name, colon, _ = str(error).partition(":")
    is_name = isinstance(error, UserError) and colon and " " not in name
    return ApiError(400, str(error), param=name if is_name else None)


def busy(limit: int) -> ApiError:
    """Return the answer to a request that is one too many."""
    message = f"expected at most {limit} requests at once, got another one; try again"
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    """Return the answer to a request that comes while the server stops."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "10"})


def out_of_time(seconds: float) -> ApiError:
    """Return the answer to a request that took longer than allowed."""
    return ApiError(504, f"expected an end within {seconds:g} s, got none; the request was dropped", code="timeout")


def origin(error: BaseException) -> str:
    """Return type and place of an error, for a log that must hold no text of users."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
