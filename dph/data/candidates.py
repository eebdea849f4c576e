"""Candidates of a prompt, some of which are right: rows of best-of-N sets.

| fields of a row | right ones |
|---|---|
| prompt, candidates, ``correct`` | those with true or 1; numbers between are shares |
| prompt, chosen, rejected | chosen; both a text or a list of them (RewardBench 2) |

``subset`` names the part of the set that a row belongs to. The prompt is text or messages, with ``system`` or without;
messages may be named ``messages``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dph import chat
from dph.chat import Message
from dph.data.formats import parse_record
from dph.data.rows import open_source, text_options
from dph.errors import UserError, shown, shown_names

FIELDS = ("candidates", "correct", "chosen", "rejected", "subset", "id", "prompt", "messages")


@dataclass(frozen=True)
class Candidates:
    """Conversations that share a prompt and end in a candidate each, and how right each is, from 0 to 1.

    ``subset`` is None, and ``id`` empty, for a row without.
    """

    conversations: list[list[Message]]
    correct: list[float]
    subset: str | None
    id: str

    def encode(self, tokenizer: Any) -> list[chat.Encoded]:
        """Return the encoded conversations, each masked to its candidate."""
        return [chat.encode(conversation, tokenizer, last_only=True) for conversation in self.conversations]

    @property
    def texts(self) -> list[str]:
        """The candidates alone."""
        return [conversation[-1]["content"] for conversation in self.conversations]


def read_candidates(spec: str | Path, **options: Any) -> list[Candidates]:
    """Return the rows of a source; ``options`` as of ``dph.data.rows.open_source``.

    Raises UserError, which names file and line, if one is malformed.
    """
    found: list[Candidates] = []
    rendered = text_options(**options)["rendered"]

    def visit(place: str) -> Callable[[int, Mapping[str, Any]], None]:
        return lambda number, fields: found.append(parse_candidates(fields, f"{place}{number}", rendered))

    open_source(spec, visit, **options)
    return found


def parse_candidates(fields: Mapping[str, Any], where: str, rendered: bool = False) -> Candidates:
    """Return a row of a best-of-N set. Raises UserError, which begins with ``where``, if it is none."""
    if fields.get("candidates") is not None:
        answers, correct = fields["candidates"], fields.get("correct")
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{where}: candidates: expected a list of answers, got {shown(answers)}")
        if not isinstance(correct, list) or len(correct) != len(answers):
            raise UserError(f"{where}: correct: expected {len(answers)} values, one a candidate, got {shown(correct)}")
        for i, value in enumerate(correct):
            if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
                raise UserError(
                    f"{where}: correct.{i}: expected true, false or a number from 0 to 1, got {shown(value)}"
                )
    elif fields.get("chosen") is not None and fields.get("rejected") is not None:
        chosen, rejected = (_listed(fields[side], f"{where}: {side}") for side in ("chosen", "rejected"))
        answers, correct = [*chosen, *rejected], [1] * len(chosen) + [0] * len(rejected)
    else:
        raise UserError(
            f"{where}: expected prompt, candidates and correct, or prompt, chosen and rejected; got the fields "
            f"{shown_names(fields)}"
        )
    prompts = [fields[name] for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(prompts) != 1:
        raise UserError(f"{where}: expected prompt or messages, got {'both' if prompts else 'neither'}")
    prompt = {"prompt": prompts[0], **{key: value for key, value in fields.items() if key not in FIELDS}}
    conversations = []
    for i, answer in enumerate(answers):
        if not isinstance(answer, str | list):
            raise UserError(f"{where}: answer {i}: expected text or messages, got {shown(answer)}")
        record = parse_record({**prompt, "completion": answer}, "conversation", where, rendered=rendered)
        conversations.append(record.messages)
    subset, name = ("" if fields.get(key) is None else str(fields[key]) for key in ("subset", "id"))
    return Candidates(conversations, list(map(float, correct)), subset or None, name)


def _listed(side: Any, where: str) -> list[Any]:
    """Return the answers of one side: a text, messages, or a list of such."""
    if isinstance(side, str) or (isinstance(side, list) and side and isinstance(side[0], Mapping)):
        return [side]
    if not isinstance(side, list) or not side:
        raise UserError(f"{where}: expected an answer or a list of answers, got {shown(side)}")
    return side
