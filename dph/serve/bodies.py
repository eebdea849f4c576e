"""Bodies of requests: their fields and types, checked strictly. Ranges are those of ``dph.infer.sampling``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dph.errors import shown
from dph.serve.limits import ApiError

# Fields of OpenAI's clients that change no answer.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are accepted at the value that stands for their absence.
NEUTRAL: dict[str, Any] = {
    "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [],
    "functions": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip
MOST_STOPS, LONGEST_STOP = 16, 256


class Body(BaseModel):
    """Base of all bodies: other fields and other types are errors, and null stands for absence."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """Return the fields that are not null: clients send an answer back with ``"refusal": null``."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class ChatMessage(Body):
    """One message of plain text."""

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("role", mode="before")
    @classmethod
    def rename_developer(cls, role: Any) -> Any:
        """Return "system" for "developer", OpenAI's newer name of it."""
        return "system" if role == "developer" else role

    @field_validator("content", mode="before")
    @classmethod
    def join_parts(cls, content: Any) -> Any:
        """Return OpenAI's list of text parts as one text."""
        if not isinstance(content, list):
            return content
        texts = []
        for part in content:
            is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
            if not is_text or not isinstance(part["text"], str):
                raise ValueError('expected text or parts {"type": "text", "text": ...}')
            texts.append(part["text"])
        return "".join(texts)


class StreamOptions(Body):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class Candidates(Body):
    """The candidates that are sampled and their ranking: the options of ``dph.best_of_n``."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: list[str] = Field(default=[], max_length=MOST_STOPS)
    seed: int | None = None
    rank: str | None = None
    head: str | None = None
    risk: float = 1.0
    normalise: Literal["strip", "words", "number"] = "strip"
    confidence: float | None = None
    round_size: int = 4
    prune_every: int | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def list_of_stops(cls, stop: Any) -> Any:
        """Return one stop text as a list."""
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def check_length(cls, stop: list[str]) -> list[str]:
        """Raise ValueError for texts that are too long: each token is compared with them."""
        if any(len(text) > LONGEST_STOP for text in stop):
            raise ValueError(f"expected texts of at most {LONGEST_STOP} characters")
        return stop


class Chat(Candidates):
    """Body of ``/v1/chat/completions``."""

    model: str
    n: int = 1
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_candidates: bool = False


class Score(Body):
    """Body of ``/v1/score``."""

    model: str | None = None
    conversations: list[list[ChatMessage]] = Field(min_length=1)
    heads: list[str] | None = None


class Rerank(Body):
    """Body of ``/v1/rerank``, in the form of Jina's and Cohere's clients."""

    model: str | None = None
    query: str
    documents: list[str] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True
    head: str | None = None

    @field_validator("query", mode="before")
    @classmethod
    def plain_query(cls, query: Any) -> Any:
        """Return {"text": ...} as text."""
        return _plain(query)

    @field_validator("documents", mode="before")
    @classmethod
    def plain_documents(cls, documents: Any) -> Any:
        """Return documents {"text": ...} as texts."""
        return list(map(_plain, documents)) if isinstance(documents, list) else documents


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(content: bytes, form: type[AnyBody]) -> AnyBody:
    """Return a body of JSON. Raises ApiError (400), which names the first field that is wrong or not supported."""
    try:
        values = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"body: expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"body: expected a JSON object, got {shown(values)}")
    try:
        return form.model_validate(_relevant(values, form))
    except ValidationError as error:
        raise _wrong_field(error) from None


def _relevant(values: Mapping[str, Any], form: type[Body]) -> dict[str, Any]:
    """Return the fields that are not without effect."""
    kept = {}
    for name, value in values.items():
        is_known = name in form.model_fields
        is_neutral = name in NEUTRAL and type(value) in (type(NEUTRAL[name]), float) and value == NEUTRAL[name]
        if is_known or not (name in HARMLESS or is_neutral):
            kept[name] = value
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"text"}:
        return value["text"]
    return value


def _wrong_field(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    name = ""
    for part in first["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    name = shown(name).strip("'")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: not supported", param=name, code="unsupported_field")
    if first["type"] == "missing":
        return ApiError(400, f"{name}: expected a value, got none", param=name)
    if first["type"] in ("too_short", "too_long"):
        context = first["ctx"]
        most = f"least {context['min_length']}" if first["type"] == "too_short" else f"most {context['max_length']}"
        return ApiError(400, f"{name}: expected at {most}, got {len(first['input'])}", param=name)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return ApiError(400, f"{name}: {message}, got {shown(first['input'])}", param=name)
