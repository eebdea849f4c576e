"""Prompts of a source, such as a file of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dph.chat import Message
from dph.data.formats import parse_prompt
from dph.data.rows import open_source, text_options
from dph.improve.prompts import Prompt


def read_prompts(source: str, **options: Any) -> list[Prompt]:
    """Return the rows of a source with ``prompt`` (text or messages) or ``messages``.

    ``options`` as of ``dph.data.rows.open_source``. Raises UserError if the source is missing, empty or malformed.
    """
    conversations: list[list[Message]] = []
    rendered = text_options(**options)["rendered"]

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        return lambda number, row: conversations.append(parse_prompt(row, f"{place}{number}", rendered))

    rows, prompts = open_source(source, visit, with_answers=False, **options), []
    for i, messages in enumerate(conversations):
        prompts.append(Prompt(messages, rows.fields(i), rows.location(i)))
    return prompts
