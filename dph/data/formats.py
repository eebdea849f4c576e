"""What a record is: text, a conversation or a preference, from any of the forms that TRL documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dph import chat
from dph.chat import Encoded, Message
from dph.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is a target, and the document's end, unless that ``goes_on`` in another record."""

    text: str
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with at least one from the assistant."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that end in the assistant's answer, the better one first."""

    chosen: list[Message]
    rejected: list[Message]


Record = Text | Conversation | Preference

FORMS = {
    "preference": "prompt, chosen and rejected (text or messages), or chosen and rejected (whole conversations)",
    "conversation": "messages, or prompt and completion, or a preference, whose chosen answer is taken",
    "text": "text, or a conversation, whose contents are joined",
}


def record(fields: Mapping[str, Any], kind: str, where: str = "record", text_field: str = "text") -> Record:
    """One object of a JSONL file or hub data set as a record of ``kind`` (text, conversation or preference).

    The forms are those that TRL documents. Raises UserError that begins with ``where``.
    """
    present = {key for key, value in fields.items() if value is not None}
    if kind == "text" and text_field in present:
        chat.check_text(fields[text_field], f"{where}: {text_field}")
        return Text(fields[text_field])
    if {"chosen", "rejected"} <= present:
        found = Preference(_side(fields, "chosen", where), _side(fields, "rejected", where))
        return found if kind == "preference" else lower(found.chosen, kind, where)
    if kind != "preference" and "messages" in present:
        return lower(_messages(fields, "messages", "user", where), kind, where)
    if kind != "preference" and {"prompt", "completion"} <= present:
        if "label" in present and fields["label"] is not True:  # TRL's unpaired preference: false marks a bad answer
            raise UserError(f"{where}: label: expected true beside a completion to learn, got {fields['label']!r}")
        messages = _messages(fields, "prompt", "user", where) + _messages(fields, "completion", "assistant", where)
        return lower(messages, kind, where)
    named = [key if key in present else f"{key} (null)" for key in fields]
    expected = FORMS[kind] if kind != "text" else FORMS[kind].replace("text", text_field, 1)
    raise UserError(f"{where}: expected a {kind}: {expected}; got the fields {', '.join(named) or '(none)'}")


def lower(messages: list[Message], kind: str, where: str) -> Record:
    """Messages as a conversation or as text."""
    if kind == "text":
        return Text(chat.text(messages))
    chat.check_answered(messages, where)
    return Conversation(messages)


def _messages(fields: Mapping[str, Any], name: str, role: str, where: str) -> list[Message]:
    """A field's messages; plain text becomes one message of ``role``."""
    value = fields[name]
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    chat.check(value, f"{where}: {name}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _side(fields: Mapping[str, Any], name: str, where: str) -> list[Message]:
    """The whole conversation of one side of a preference, its prompt explicit, implied, or repeated in the side."""
    prompt = _messages(fields, "prompt", "user", where) if fields.get("prompt") else []
    if isinstance(fields[name], str) and not prompt:
        raise UserError(f"{where}: {name}: expected a prompt beside an answer in plain text, got none")
    side = _messages(fields, name, "assistant", where)
    if side[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: {name}: expected the assistant's answer at the end, got a {side[-1]['role']} message"
        )
    whole = side[: len(prompt)] == prompt or (side[0]["role"] != "assistant" and prompt[-1]["role"] == "user")
    return side if whole else prompt + side


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], Encoded | tuple[Encoded, Encoded]]:
    """The function that encodes records: a Preference gives (chosen, rejected), masked to their final answers.

    What is encoded already is returned as it is.
    """
    plain, eos = chat.plain(tokenizer), chat.eos_token(tokenizer)

    def encode(record: Record | Encoded | tuple[Encoded, Encoded]) -> Encoded | tuple[Encoded, Encoded]:
        if isinstance(record, Encoded | tuple):
            return record
        if isinstance(record, Text):
            tokens = plain(record.text)
            every = [True] * len(tokens) + [not record.goes_on]
            return Encoded([eos, *tokens], [*tokens, eos], every, every, None)
        if isinstance(record, Conversation):
            return chat.encode(record.messages, tokenizer)
        chosen, rejected = (chat.encode(side, tokenizer, last_only=True) for side in (record.chosen, record.rejected))
        return chosen, rejected

    return encode
