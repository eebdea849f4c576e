"""Prompts of a source, such as a file of rows."""

from __future__ import annotations

from typing import Any

from dph.data.rows import open_prompts
from dph.improve.prompts import Prompt


def read_prompts(source: str, **options: Any) -> list[Prompt]:
    """Return the rows of a source with ``prompt`` (text or messages) or ``messages``.

    ``options`` as of ``dph.data.rows.open_source``. Raises UserError if the source is missing, empty or malformed.
    """
    rows, conversations = open_prompts(source, **options)
    return [Prompt(messages, rows.fields(i), rows.location(i)) for i, messages in enumerate(conversations)]
